"""`lift(graphs=True)`: what is captured when, what runs eagerly and why; by the stand-in of `graph_standin`."""

import copy
import gc
import pickle
import re
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import planecycle_fast as pcf
from planecycle_fast.engine import graph_store

from .. import standins
from ..standins import DinoVisionTransformer
from .graph_standin import use_standin
from .test_cuda_graphs import CHANGES, same, step


@pytest.fixture
def recorder(monkeypatch):
    return use_standin(monkeypatch)


def models(graphs=True, **settings):
    """A lifted model with graphs, the same without, and a volume."""
    model = DinoVisionTransformer(depth=2, patch_size=2, embed_dim=16, **settings).eval()
    model.scales = {"a": 1.0}
    return pcf.lift(model, graphs=graphs), pcf.lift(model), torch.randn(1, 3, 2, 4, 6)


def report(model, capsys):
    capsys.readouterr()
    model.report()
    return capsys.readouterr().out


def counts(recorder, model, volume, times=3):
    """How many passes have been recorded after each of several calls."""
    found = []
    for _ in range(times):
        model(volume)
        found.append(len(recorder.recorded))
    return found


@torch.no_grad()
def test_the_second_of_a_shape_is_captured(recorder, capsys):
    lifted, eager, volume = models()
    assert "the second volume of a size will be captured" in report(lifted, capsys)
    kept = []
    for i in range(4):
        for batch in (1, 2):
            new = torch.randn(batch, 3, 2, 4, 6)
            kept.append((lifted(new), eager(new)))
        assert len(recorder.recorded) == (0 if i == 0 else 2)
    assert all(same(*each) for each in kept)  # results are the caller's
    found = report(lifted, capsys)
    assert "graphs: 2 captured, 0 of at most 256 MiB" in found
    assert "2x3x2x4x6 float32, without gradients: captured, 3 replays" in found
    with torch.inference_mode():
        assert same(lifted(volume), eager(volume))


def test_training(recorder):
    """With gradients that add up, a scaler, an optimiser, frozen parts and random numbers: the same bits as eager."""
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        lifted, _, volume = models(graphs, drop_path_rate=0.5)
        lifted.train().patch_embed.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in lifted.parameters() if p.requires_grad], 0.01)
        scaler = torch.amp.GradScaler("cpu")
        for i in range(8):
            torch.manual_seed(i)
            volume = torch.randn_like(volume)
            scaler.scale(lifted(volume).patches.square().mean()).backward()
            if i % 2:
                nn.utils.clip_grad_norm_(lifted.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        results.append([*lifted.state_dict().values()])
    assert same(*results)
    assert len(recorder.recorded) == 1 and recorder.recorded[0].gradients


def test_two_passes_before_their_backward(recorder):
    lifted, eager, volume = models()
    for _ in range(4):
        found = []
        for run in (lifted, eager):
            lifted.zero_grad()
            one, other = run(volume), run(volume + 1)
            (one.patches * other.patches).sum().backward()
            found.append([p.grad for p in lifted.parameters()])
        assert same(*found)
    assert len(recorder.recorded) == 2
    kept = [lifted(volume) for _ in range(7)]  # whose backward never comes
    assert same(kept[0], kept[-1])
    assert len(recorder.recorded) <= graph_store.AT_ONCE


@pytest.mark.parametrize("change, _", CHANGES[:-1])  # what is put around blocks is not in both
@torch.no_grad()
def test_a_change_runs_eagerly_and_is_captured_again(recorder, change, _):
    lifted, eager, volume = models()
    assert counts(recorder, lifted, volume) == [0, 1, 1] and same(lifted(volume), eager(volume))
    change(lifted)
    eager.__dict__.update(pool_method=lifted.pool_method, gelu=lifted.gelu)
    try:
        expected = eager(volume)
    except Exception as error:
        with pytest.raises(type(error), match=re.escape(str(error)[:20])):
            lifted(volume)
    else:
        got = lifted(volume)
        assert lifted.training or all([torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected)])


@torch.no_grad()
def test_weights_in_place_and_modes_by_turns(recorder):
    lifted, eager, volume = models()
    assert counts(recorder, lifted, volume) == [0, 1, 1]
    lifted.norm.weight.mul_(2)
    assert same(lifted(volume), eager(volume))
    for _ in range(3):  # each mode keeps its graph
        lifted.train()(volume)
        lifted.eval()(volume)
    assert len(recorder.recorded) == 2


@torch.no_grad()
def test_what_changes_all_the_time_is_captured_ever_more_rarely(recorder):
    lifted, _, volume = models()
    for i in range(100):
        lifted.blocks[0].norm1.eps = 1e-5 * (1 + i)
        lifted(volume)
    assert len(recorder.recorded) <= 6


@torch.no_grad()
def test_least_recently_used_graphs_go(recorder, capsys):
    lifted, _, _ = models(pcf.GraphOptions(limit=100_000))
    volumes = [torch.randn(batch, 3, 8, 4, 6) for batch in (4, 5, 6, 40)]
    for volume in volumes[:2]:
        counts(recorder, lifted, volume)
    lifted(volumes[0])
    assert "graphs: 2 captured" in report(lifted, capsys)
    counts(recorder, lifted, volumes[2], 2)
    found = report(lifted, capsys)
    assert re.search("5x3x8x4x6.*: eager, its graph gave way to others", found)
    assert re.search("4x3x8x4x6.*: captured", found) and re.search("6x3x8x4x6.*: captured", found)
    counts(recorder, lifted, volumes[3], 2)
    assert re.search("40x3x8x4x6.*: eager, its graph takes .* MiB, of at most 0", report(lifted, capsys))
    for batch in range(1, 2 * graph_store.ENTRIES):
        lifted(torch.randn(batch, 3, 1, 2, 2))
    assert len(lifted.graphs._entries) == graph_store.ENTRIES


@torch.no_grad()
def test_no_graph_holds_on_to_weights_that_are_gone(recorder, capsys):
    lifted, _, volume = models()
    for batch in (1, 2):
        counts(recorder, lifted, volume.repeat(batch, 1, 1, 1, 1))
    assert lifted.graphs.captured == 2
    storage = weakref.ref(lifted.norm.weight.untyped_storage())
    lifted.norm.weight.data = lifted.norm.weight.data * 2
    lifted(volume)
    gc.collect()  # a model and its graphs are in cycles
    assert lifted.graphs.captured == 0 and storage() is None
    counts(recorder, lifted, volume)
    lifted.graphs.clear()
    assert lifted.graphs.captured == 0 and "0 captured" in report(lifted, capsys)


@torch.no_grad()
def test_a_model_that_moves_takes_its_graphs_along(recorder):
    lifted, _, volume = models()
    assert counts(recorder, lifted, volume) == [0, 1, 1]
    storage = weakref.ref(lifted.norm.weight.untyped_storage())
    lifted.double()
    gc.collect()
    assert lifted.graphs.captured == 0 and storage() is None  # before any other pass


@torch.no_grad()
def test_memory_that_an_eager_pass_needs(recorder, monkeypatch, capsys):
    lifted, eager, volume = models()
    counts(recorder, lifted, volume)
    large = volume.repeat(2, 1, 1, 1, 1)
    expected, run, held = eager(large), type(lifted)._run, []

    def scarce(self, volume, *rest):
        held.append(self.graphs.captured)
        if held[-1] and len(volume) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, volume, *rest)

    monkeypatch.setattr(type(lifted), "_run", scarce)
    assert same(lifted(large), expected) and held == [1, 0] and recorder.given_back == 1
    assert "eager, an eager pass needed its memory" in report(lifted, capsys)
    counts(recorder, lifted, volume, 6)
    with pytest.raises(torch.OutOfMemoryError), torch.enable_grad():  # a second run might draw other numbers
        lifted(large)


def test_eager_passes_do_not_wait_for_a_capture(recorder):
    lifted, _, volume = models(pcf.GraphOptions(largest=144))
    with lifted.graphs._lock, ThreadPoolExecutor() as threads:
        assert threads.submit(lifted, torch.cat([volume, volume])).result(60).patches.requires_grad


@torch.no_grad()
def test_shallow_copies_have_graphs_of_their_own(recorder):
    lifted, eager, volume = models()
    counts(recorder, lifted, volume)
    other = copy.copy(lifted)
    other.pool_method = "PCm"
    expected = pcf.lift(pcf.unlift(lifted), pool_method="PCm")(volume)
    assert counts(recorder, other, volume) == [1, 2, 2]
    assert same(other(volume), expected) and same(lifted(volume), eager(volume)) and len(recorder.recorded) == 2


@torch.no_grad()
def test_lora_that_is_scaled_or_merged(recorder):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra lora")
    lifted, _, volume = models()
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    adapted = peft.get_peft_model(lifted, config).eval()
    layers = [m for m in adapted.modules() if hasattr(m, "merged_adapters") and hasattr(m, "scaling")]
    assert counts(recorder, adapted, volume) == [0, 1, 1] and layers
    before = adapted(volume).patches
    for layer in layers:
        layer.scaling["default"] *= 3
    scaled = adapted(volume).patches
    assert not torch.allclose(before, scaled)
    counts(recorder, adapted, volume)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(volume).patches, scaled, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_large_volumes_are_eager(recorder, capsys):
    lifted, _, volume = models(pcf.GraphOptions(largest=144))
    assert volume.numel() == 144
    assert counts(recorder, lifted, volume.repeat(2, 1, 1, 1, 1)) == [0, 0, 0]
    assert "eager, 3 times: volumes of more than 144 elements keep a GPU busy" in report(lifted, capsys)
    assert counts(recorder, lifted, volume) == [0, 1, 1]


@torch.no_grad()
def test_parts_on_another_device(recorder, capsys):
    lifted, _, volume = models()
    lifted.rope_embed.to("meta")
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            lifted(volume)
    assert not recorder.recorded and "rope_embed.periods is on meta, the volume on cpu" in report(lifted, capsys)


@torch.no_grad()
def test_no_memory_to_capture(recorder, capsys):
    lifted, eager, volume = models()
    recorder.error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(4):
        assert same(lifted(volume), eager(volume))
    assert recorder.given_back == 1  # it is not tried again at once
    assert "eager, there was not enough memory" in report(lifted, capsys)


@torch.no_grad()
def test_hooks_are_called_in_every_pass(recorder, capsys):
    lifted, eager, volume = models()
    seen = []
    handle = lifted.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out))
    for _ in range(4):
        assert torch.allclose(lifted(volume).patches, eager(volume).patches, atol=1e-5)
    assert len(seen) == 4 and not recorder.recorded
    assert "its blocks.1: it has hooks" in report(lifted, capsys)
    handle.remove()
    whole = lifted.register_forward_hook(lambda m, args, out: seen.append(out))  # around the pass: both can be
    assert counts(recorder, lifted, volume, graph_store.REFUSED + 2)[-1] == 1
    assert len(seen) == 4 + graph_store.REFUSED + 2
    whole.remove()


class Around(nn.Module):
    def __init__(self, block, calls):
        super().__init__()
        self.block, self.calls = block, calls

    def forward(self, *args):
        self.calls.append(args)
        return self.block(*args)


@torch.no_grad()
def test_what_is_around_blocks_is_called_in_every_pass(recorder, capsys):
    calls = []
    lifted, _, volume = models()
    accelerated = pcf.accelerate(standins.DinoVisionTransformer("Slice2D", depth=2, patch_size=2).eval(), graphs=True)
    for model, reason in ((lifted, "a block is within a Around"), (accelerated, "a block as a whole is called")):
        model.blocks[0] = Around(model.blocks[0], calls)
        counts(recorder, model, volume)
        assert reason in report(model, capsys)
    assert len(calls) == 6 and not recorder.recorded


@pytest.mark.parametrize("name", ["timm-dinov3-s", pytest.param("hf-dinov3", marks=pytest.mark.full)])
def test_activation_checkpointing_is_eager(recorder, capsys, name):
    pytest.importorskip("timm", reason="needs timm and transformers, whose models it runs")
    pytest.importorskip("transformers", reason="needs timm and transformers, whose models it runs")
    from ..host_models import BY_NAME

    model, volume = BY_NAME[name].make().train(), BY_NAME[name].volume(1, 2)
    model.set_grad_checkpointing() if "timm" in name else model.gradient_checkpointing_enable()
    lifted = pcf.lift(model, graphs=True)
    counts(recorder, lifted, volume)
    assert not recorder.recorded and "activation checkpointing runs blocks again" in report(lifted, capsys)


@torch.no_grad()
def test_volumes_of_one_channel_have_graphs_of_their_own(recorder):
    """The weights' sum is multiplied then, with other roundings."""
    lifted, eager, volume = models()
    for _ in range(3):
        for each in (torch.randn_like(volume), torch.randn_like(volume)[:, :1].expand(-1, 3, -1, -1, -1)):
            assert same(lifted(each), eager(each))
    assert len(recorder.recorded) == 2


@torch.no_grad()
def test_taps_and_layers_and_maps(recorder):
    lifted, eager, volume = models()
    for _ in range(3):
        for a, b in zip(lifted.intermediate(volume, [0, 1], norm=False), eager.intermediate(volume, [0, 1], False)):
            assert same(a, b)
    assert len(recorder.recorded) == 1
    assert lifted.attention_maps(volume)[0].cls is not None
    seen, steps = [], []
    lifted.after_steps = steps.append
    counts(recorder, lifted, volume)
    assert sum(steps) == 3 * 3  # blocks and the last norm, of each pass
    lifted.tap(0).register_forward_hook(lambda m, args, out: seen.append(out))
    counts(recorder, lifted, volume)
    assert len(seen) == 3


def traced(lifted, volume):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lifted, volume, check_trace=False)


def transformed(lifted, volume):
    torch.func.vmap(lambda v: lifted(v).patches)(volume[None])


def counted(lifted, volume):
    with FlopCounterMode(display=False) as counter:
        lifted(volume)
    assert counter.get_total_flops() > 0


def checkpointed(lifted, volume):
    with torch.enable_grad():
        out = torch.utils.checkpoint.checkpoint(lambda v: lifted(v).patches, volume, use_reentrant=False)
        out.sum().backward()


def watched(lifted, volume):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        lifted(volume)


def within_another(lifted, volume):
    pcf.engine.cuda_recorder.RECORDER.capturing = True
    lifted(volume)
    pcf.engine.cuda_recorder.RECORDER.capturing = False


PASSING = [
    (traced, "torch.jit.trace is running"),
    (transformed, "a transform of torch.func"),
    (counted, "a dispatch mode sees all operations"),
    (checkpointed, "hooks decide what is kept for backward"),
    (watched, "anomaly detection"),
    (within_another, "another graph is being captured"),
]


@pytest.mark.parametrize("run, reason", PASSING, ids=lambda value: getattr(value, "__name__", ""))
@torch.no_grad()
def test_passes_that_somebody_sees_run_eagerly(recorder, capsys, run, reason):
    lifted, eager, volume = models()
    counts(recorder, lifted, volume)
    for _ in range(2):
        run(lifted, volume)
    assert len(recorder.recorded) == 1
    assert re.search(rf"eager, \d+ times: {reason}", report(lifted, capsys))
    assert same(lifted(volume), eager(volume))


@torch.no_grad()
def test_compiled_as_one_graph(recorder):
    lifted, eager, volume = models()
    counts(recorder, lifted, volume)
    torch._dynamo.reset()
    compiled = torch.compile(lifted, backend="eager", fullgraph=True)
    assert same(compiled(volume), eager(volume))
    torch._dynamo.reset()


@torch.no_grad()
def test_autocast_and_settings_have_graphs_of_their_own(recorder):
    lifted, eager, volume = models()
    counts(recorder, lifted, volume)
    with torch.autocast("cpu", torch.bfloat16):
        assert counts(recorder, lifted, volume) == [1, 2, 2]
        assert same(lifted(volume), eager(volume))
    with pcf.use_backend("reference"):
        assert counts(recorder, lifted, volume) == [2, 3, 3]
        assert same(lifted(volume), eager(volume))
    assert same(lifted(volume), eager(volume)) and len(recorder.recorded) == 3


@torch.no_grad()
def test_results_of_the_graph_where_asked_for(recorder):
    lifted, eager, volume = models(pcf.GraphOptions(own_results=False))
    counts(recorder, lifted, volume)
    first, second = lifted(volume), lifted(volume + 1)
    assert same(first, second) and same(second, eager(volume + 1))


@pytest.mark.parametrize("block_type", ["PlaneCycle", "Slice2D", "Flatten3D"])
def test_accelerated_models(recorder, capsys, block_type):
    made = standins.DinoVisionTransformer(block_type, depth=2, patch_size=2, untie_cls_and_patch_norms=True)
    model = standins.Converter()(made) if block_type == "PlaneCycle" else made
    model, volume = pcf.accelerate(model.train(), graphs=True), torch.randn(1, 3, 2, 4, 6)
    eager = pcf.accelerate(copy.deepcopy(model))
    for i in range(4):
        found = []
        for each in (model, eager):
            torch.manual_seed(i)
            each.zero_grad()
            out = each(volume)
            out["x_norm_patchtokens"].square().sum().backward()
            found.append([*[t for t in out.values() if t is not None], *[p.grad for p in each.parameters()]])
        assert same(*found) and None in found[0]
    with torch.no_grad():
        for _ in range(3):
            got, expected = [m.eval().get_intermediate_layers(volume, n=2, norm=False) for m in (model, eager)]
            assert same(got, expected)
    assert len(recorder.recorded) == 2
    assert "graphs: 2 captured" in report(model, capsys)
    with torch.no_grad():
        model.get_intermediate_layers.attention = "reference"
        model.get_intermediate_layers(volume, n=2, norm=False)
    assert "settings have changed" in report(model, capsys)
    masks = torch.zeros(1, 12, dtype=torch.bool) if block_type == "Flatten3D" else torch.zeros(2, 6, dtype=torch.bool)
    assert model(volume, masks=masks)["masks"] is masks


@torch.no_grad()
def test_copies_and_saved_models(recorder, tmp_path):
    lifted, eager, volume = models(pcf.GraphOptions(limit=10**9))
    counts(recorder, lifted, volume)
    for copied in (copy.deepcopy(lifted), pickle.loads(pickle.dumps(lifted))):
        assert copied.graphs is not lifted.graphs and copied.graphs.options == pcf.GraphOptions(limit=10**9)
        before = len(recorder.recorded)
        assert counts(recorder, copied, volume) == [before, before + 1, before + 1]
        assert same(copied(volume), eager(volume))
    assert "graphs" not in lifted.extra_repr()


@torch.no_grad()
def test_elsewhere_all_is_eager_and_said(capsys):
    lifted, eager, volume = models()
    for _ in range(3):
        assert same(lifted(volume), eager(volume))
    found = report(lifted, capsys)
    assert "graphs: none, everything runs eagerly: CUDA graphs need a CUDA device, the volume is on cpu" in found


def test_distributed_data_parallel(recorder, tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    lifted, eager, volume = models()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(lifted, find_unused_parameters=True)
        for _ in range(4):
            assert same(step(lifted, parallel, volume), step(lifted, eager, volume))
        assert len(recorder.recorded) == 1
    finally:
        dist.destroy_process_group()


def test_wrong_arguments():
    model = DinoVisionTransformer(depth=1)
    with pytest.raises(TypeError, match="graphs must be True, False or GraphOptions, got str"):
        pcf.lift(model, graphs="yes")
    for wrong in (0, -1, 0.5):
        with pytest.raises(ValueError, match="limit must be a positive number of bytes, or None"):
            pcf.GraphOptions(limit=wrong)
        with pytest.raises(ValueError, match="largest must be a positive number of elements, or None"):
            pcf.GraphOptions(largest=wrong)
