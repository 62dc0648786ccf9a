"""CUDA graphs on a real GPU: `cuda_graph`, `lift(graphs=True)` and torch.compile's "reduce-overhead", all passes.

What needs no GPU, by a stand-in for the graph: tests/engine/test_cuda_graphs.py and test_graph_store.py.
"""

import copy
import gc

import pytest
import torch

pytest.importorskip("timm", reason="needs timm and transformers, whose models it runs")
pytest.importorskip("transformers", reason="needs timm and transformers, whose models it runs")

import planecycle_fast as pcf

from .. import standins
from ..host_models import BY_NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]
pytest.importorskip("triton", reason="needs triton")

MODES = [{}, {"pool_method": "PCm"}, {"mode": "slice2d"}, {"mode": "flatten3d"}, {"globals_at": "plane"}]
NAMES = ["timm-dinov3-s", "hf-dinov3", "hf-dinov2-swiglu"]


def on_gpu(name="timm-dinov3-s", dtype=torch.bfloat16, graphs=False, make=None, **settings):
    host = BY_NAME[name]
    model = host.make(**(make or {})).to("cuda", dtype)
    lifted = pcf.lift(model, graphs=graphs, **settings)
    return lifted, pcf.lift(model, **settings), host.volume(batch=2, depth=7, dtype=dtype).to("cuda")


def same(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(model, run, volume, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    out = run(volume)
    (out.patches.float().square().sum() + out.pooled().float().sum()).backward()
    return [*[t for t in out if t is not None], *[p.grad for p in model.parameters()]]


def reported(model, capsys):
    capsys.readouterr()
    model.report()
    return capsys.readouterr().out


@pytest.mark.parametrize("settings", [*MODES, {"attention": "triton", "mode": "flatten3d"}], ids=str)
def test_inference(settings):
    """The second pass of a size is captured; results are the caller's."""
    lifted, eager, volume = on_gpu(graphs=True, **settings)
    kept = []
    with torch.no_grad():
        eager(volume)  # some kernels are chosen once sizes repeat
        for seed in range(4):
            torch.manual_seed(seed)
            new = torch.randn_like(volume)
            kept.append((lifted(new), eager(new)))
    assert all(same(*each) for each in kept[1:]) and lifted.graphs.captured == 1


@pytest.mark.parametrize("name", NAMES)
def test_training(name):
    lifted, eager, volume = on_gpu(name, graphs=True)
    lifted.train().requires_grad_(True)
    next(iter(lifted.blocks)).requires_grad_(False)
    for seed in range(5):
        volume = torch.randn_like(volume)
        assert same(step(lifted, eager, volume, seed), step(lifted, lifted, volume, seed)) or seed == 0
    assert lifted.graphs.captured == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_scaler_and_gradients_that_add_up(dtype):
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        lifted, _, volume = on_gpu(dtype=torch.float32, graphs=graphs)
        optimizer = torch.optim.AdamW(lifted.train().parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        for i in range(8):
            torch.manual_seed(i)
            with torch.autocast("cuda", dtype):
                loss = lifted(torch.randn_like(volume)).patches.float().square().mean()
            scaler.scale(loss).backward()
            if i % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert not graphs or lifted.graphs.captured == 1
        results.append([t.clone() for t in lifted.state_dict().values()])
    assert same(*results)


def test_random_numbers_are_new_in_every_replay():
    """Drop path, dropout and the augmentation of positions; with a seed those of an eager pass."""
    make = dict(drop_path_rate=0.3, proj_drop_rate=0.2)
    lifted, eager, volume = on_gpu(graphs=True, make=make, backend="triton", strict=False)
    rope = pcf.unlift(lifted).rope
    rope.shift_coords, rope.rescale_coords = 0.3, 2.0  # drawn on the CPU, by timm
    lifted.train()
    for _ in range(3):
        lifted(volume)
    assert lifted.graphs.captured == 1
    first, again, other = [step(lifted, lifted, volume, seed) for seed in (1, 1, 2)]
    assert same(first, again) and not torch.equal(first[0], other[0])
    assert same(first, step(lifted, eager, volume, 1))


def test_drop_path_of_the_authors_kind():
    """It leaves sequences out, and positions are drawn on the GPU for each block."""
    made = standins.DinoVisionTransformer("PlaneCycle", depth=2, patch_size=16, drop_path_rate=0.5).cuda()
    model = pcf.accelerate(standins.Converter()(made).train(), graphs=True)
    eager, volume = pcf.accelerate(copy.deepcopy(model)), torch.randn(2, 3, 5, 48, 32, device="cuda")
    for seed in range(4):
        found = []
        for each in (model, eager):
            torch.manual_seed(seed)
            each.zero_grad()
            out = each(volume)
            out["x_norm_patchtokens"].square().sum().backward()
            found.append([*[t for t in out.values() if t is not None], *[p.grad for p in each.parameters()]])
        assert same(*found)
    assert model.report.graphs.captured == 1


@pytest.mark.alone
def test_a_thousand_replays_have_the_same_bits_and_take_no_memory():
    lifted, eager, volume = on_gpu(graphs=True)
    for _ in range(3):
        expected = step(lifted, eager, volume)
        step(lifted, lifted, volume)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    got = []
    for i in range(1000):
        got = step(lifted, lifted, volume)
        if i % 100 == 0:
            assert same(got, expected)
        del got
    lifted.zero_grad()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] <= before[0] and after[1] <= before[1] + 2**21


def test_two_passes_before_their_backward():
    lifted, eager, volume = on_gpu(graphs=True)
    for i in range(4):
        found = []
        for run in (lifted, eager):
            lifted.zero_grad()
            one, other = run(volume), run(volume + 1)
            (one.patches * other.patches).float().sum().backward()
            found.append([p.grad for p in lifted.parameters()])
        assert i == 0 or same(*found)
    assert lifted.graphs.captured == 2


def test_weights_and_modes_change():
    lifted, eager, volume = on_gpu(graphs=True)
    with torch.no_grad():
        for change in (
            lambda: lifted.blocks[0].norm1.weight.mul_(2),
            lambda: setattr(lifted.blocks[0].norm1.weight, "data", lifted.blocks[0].norm1.weight.data * 2),
            lambda: lifted.load_state_dict({k: t * 1.1 for k, t in lifted.state_dict().items()}, assign=True),
            lambda: lifted.to(torch.float32).to(torch.bfloat16),
            lambda: setattr(lifted.blocks[0].norm1, "eps", 0.1),
        ):
            for _ in range(3):
                lifted(volume)
            change()
            torch.cuda.empty_cache()
            assert same(lifted(volume), eager(volume))


def test_least_recently_used_graphs_give_their_memory_back(capsys):
    lifted, _, volume = on_gpu(graphs=True)
    with torch.no_grad():
        for _ in range(3):
            lifted(volume)
    one = max(1, next(iter(lifted.graphs._entries.values())).nbytes)
    lifted, _, volume = on_gpu(graphs=pcf.GraphOptions(limit=2 * one + one // 2))
    reserved = []
    with torch.no_grad():
        for batch in range(1, 7):
            for _ in range(3):
                lifted(volume[:1].repeat(batch % 2 + 1, 1, 1, 1, 1)[:, :, : 2 + batch % 5])
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
    assert 1 <= lifted.graphs.captured <= 3 and max(reserved) - reserved[0] <= 4 * one + 2**26
    assert "captured" in reported(lifted, capsys)


def test_what_cannot_be_captured_runs_eagerly(capsys):
    class Waits(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, stream, layer):
            assert float(stream.residual.float().abs().sum()) > 0  # to Python and back
            return self.block(stream, layer)

    lifted, eager, volume = on_gpu(graphs=True)
    lifted.blocks[0] = Waits(lifted.blocks[0])
    with torch.no_grad():
        for _ in range(4):
            assert torch.allclose(lifted(volume).patches.float(), eager(volume).patches.float(), atol=0.1, rtol=0.1)
    assert lifted.graphs.captured == 0 and "eager, it cannot be captured:" in reported(lifted, capsys)
    other, _, volume = on_gpu(graphs=True)  # and the next model is captured as ever
    with torch.no_grad():
        for _ in range(3):
            other(volume)
    assert other.graphs.captured == 1


@pytest.mark.alone
def test_no_memory_to_capture(capsys):
    lifted, eager, volume = on_gpu(graphs=True)
    with torch.no_grad():
        lifted(volume)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + 4 * 2**20
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(held / total)
        try:
            out = lifted(volume)
        except torch.OutOfMemoryError:  # of the eager pass itself: there is as little for it
            out = None
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if lifted.graphs.captured == 0:
            assert "not enough memory" in reported(lifted, capsys)
        assert out is None or same(out, eager(volume))
        assert same(lifted(volume), eager(volume))


@pytest.mark.alone
def test_within_another_capture_and_on_another_stream():
    lifted, eager, volume = on_gpu(graphs=True)
    with torch.no_grad():
        for _ in range(3):
            lifted(volume)
        graph, outer = pcf.cuda_graph(eager, volume), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(outer):
            with pytest.raises(RuntimeError, match="cannot be replayed here: another CUDA graph"):
                graph(volume)
            with pytest.raises(RuntimeError, match="cannot be captured here: another CUDA graph"):
                pcf.cuda_graph(eager, volume)
            inner = lifted(volume)  # eager launches, which the outer graph takes
        outer.replay()
        assert same(inner, eager(volume))
        late, side = torch.zeros_like(volume), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(volume)
            one = graph(late)
        other = graph(torch.zeros_like(volume))  # waits for the replay on the side stream
        torch.cuda.synchronize()
        assert same(one, eager(volume)) and same(other, eager(torch.zeros_like(volume)))


def test_data_that_is_pinned_meanwhile():
    """A thread that pins memory does not disturb a capture."""
    lifted, eager, volume = on_gpu(graphs=True)
    data = torch.utils.data.TensorDataset(volume.float().cpu().repeat(16, 1, 1, 1, 1))
    with torch.no_grad():
        for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, pin_memory=True):
            batch = batch.to("cuda", volume.dtype, non_blocking=True)
            assert same(lifted(batch), eager(batch)) or not lifted.graphs.captured
    assert lifted.graphs.captured == 1


def test_distributed_data_parallel(tmp_path):
    dist = torch.distributed
    if not (dist.is_available() and dist.is_nccl_available()):
        pytest.skip("needs NCCL")
    lifted, eager, volume = on_gpu(graphs=True)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(lifted, device_ids=[0], find_unused_parameters=True)
        for i in range(4):
            assert same(step(lifted, parallel, volume), step(lifted, eager, volume)) or i == 0
        assert lifted.graphs.captured == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_with_less_overhead(training):
    """`torch.compile(mode="reduce-overhead")` takes a lifted model as one graph, which is replayed as CUDA graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lifted, _, volume = on_gpu(dtype=torch.float32, make={"depth": 2})
    compiled = torch.compile(lifted, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        volume = torch.randn_like(volume)
        if training:
            expected = step(lifted, lifted, volume, seed)
            got = [None if t is None else t.clone() for t in step(lifted, compiled, volume, seed)]
        else:
            with torch.no_grad():
                expected, got = lifted(volume), [t.clone() for t in compiled(volume)]
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
