"""Lifted models on kernels on a real GPU: budget, torch.compile, CUDA graphs, streams, devices, repeats."""

import copy

import pytest
import torch

pytest.importorskip("timm", reason="needs timm and transformers, whose models it runs")
pytest.importorskip("transformers", reason="needs timm and transformers, whose models it runs")

import planecycle_fast as pcf

from ..host_models import BY_NAME, HOSTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]
pytest.importorskip("triton", reason="needs triton")

from ..kernelcheck.models import check_model

MODES = [{}, {"pool_method": "PCm"}, {"mode": "slice2d"}, {"mode": "flatten3d"}, {"globals_at": "plane"}]
NAMES = ["timm-dinov3-s", "hf-dinov3", "hf-dinov2-swiglu"]


def lifted_on_gpu(name="timm-dinov3-s", device="cuda", dtype=torch.bfloat16, backend="triton", **settings):
    host = BY_NAME[name]
    lifted = pcf.lift(host.make().to(device, dtype), backend=backend, **settings)
    return lifted, host.volume(batch=2, depth=7, dtype=dtype).to(device)


def same(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_host_is_within_the_budget(host, dtype):
    check_model(host, {}, dtype, "cuda", (2, 7, (3, 5)))


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_is_within_the_budget(name, settings):
    check_model(BY_NAME[name], settings, torch.bfloat16, "cuda", (2, 9, (5, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth, grid", [(9, (8, 9)), (2, (17, 20))], ids=["77 rows", "345 rows"])
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3"])
def test_own_attention_of_many_rows_is_within_the_budget(name, depth, grid, dtype):
    """In training, where others may be faster: q, k and v in one and apart, turned before attention loads them."""
    check_model(BY_NAME[name], {}, dtype, "cuda", (1, depth, grid), attention="triton")


@torch.no_grad()
def test_fc1_takes_gelu_into_its_epilogue(monkeypatch):
    """Outputs are as near to float64 as those of fc1 and then GELU; a CUDA graph has the same bits."""
    from planecycle_fast.ops.activations import linear_gelu, linear_gelu_table

    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs a GPU of compute capability 9.0 or 10.x")
    lifted, volume = lifted_on_gpu("timm-dinov2-s")
    exact = pcf.lift(copy.deepcopy(pcf.unlift(lifted)).double(), backend="reference")(volume.double()).patches
    plain = lifted(volume).patches
    fc1 = lifted.blocks[0].mlp.fc1
    key = (torch.cuda.get_device_capability()[0], fc1.in_features, fc1.out_features)
    monkeypatch.setitem(linear_gelu_table.MEASURED, key, (1, 1.0, 2.0))
    monkeypatch.setattr(linear_gelu, "LEAST_ROWS", 1)
    fused = lifted(volume).patches
    assert not torch.equal(fused, plain)
    assert (fused - exact).abs().max() < 2 * (plain - exact).abs().max()
    assert torch.equal(pcf.cuda_graph(lifted, volume)(volume).patches, fused)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    lifted, volume = lifted_on_gpu(name, dtype=torch.float32)
    reference = pcf.lift(pcf.unlift(lifted), backend="reference")
    with torch.no_grad():
        exact = reference(volume)
        with torch.autocast("cuda", torch.bfloat16):
            expected, got = reference(volume), lifted(volume)
    largest = (expected.patches - exact.patches).abs().max()
    assert (got.patches - exact.patches).abs().max() <= 2 * largest


@pytest.mark.parametrize("settings", [*MODES, {"attention": "triton", "mode": "flatten3d"}], ids=str)
def test_replays_equal_eager(settings):
    lifted, volume = lifted_on_gpu(**settings)
    graph = pcf.cuda_graph(lifted, volume)
    kept = []
    for seed in range(3):
        torch.manual_seed(seed)
        new = torch.randn_like(volume)
        with torch.no_grad():
            kept.append((graph(new), lifted(new)))
    assert all(same(got, expected) for got, expected in kept)  # results stay what they were


def test_weights_may_change_in_place_after_capture():
    lifted, volume = lifted_on_gpu()
    graph = pcf.cuda_graph(lifted, volume)
    with torch.no_grad():
        lifted.blocks[0].norm1.weight.mul_(2)
        assert same(graph(volume), lifted(volume))


def test_a_graph_of_autocast_follows_weights():
    lifted, volume = lifted_on_gpu(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        graph = pcf.cuda_graph(lifted, volume)
        lifted.blocks[0].mlp.fc1.weight.mul_(2)
        torch.clear_autocast_cache()  # or eager passes go on with the cast of before
        assert same(graph(volume), lifted(volume))
    with pytest.raises(ValueError, match="autocast"):
        graph(volume)


def test_a_graph_from_inference_mode_and_a_volume_with_a_gradient():
    lifted, volume = lifted_on_gpu()
    with torch.inference_mode():
        graph, expected = pcf.cuda_graph(lifted, volume), lifted(volume)
    got = graph(volume.clone().requires_grad_())
    assert same(got, expected) and not got.patches.requires_grad


def test_a_graph_refuses_what_it_was_not_captured_for():
    lifted, volume = lifted_on_gpu()
    graph = pcf.cuda_graph(lifted, volume)
    with pytest.raises(ValueError, match="volume must have the captured shape"):
        graph(volume[:1])
    with pytest.raises(ValueError, match="volume must have the captured dtype, torch.bfloat16, got torch.float32"):
        graph(volume.float())
    with pytest.raises(ValueError, match="volume must have the captured device, cuda:0, got cpu"):
        graph(volume.cpu())
    lifted.blocks[0].norm1.weight.data = lifted.blocks[0].norm1.weight.data.clone()
    with pytest.raises(ValueError, match="norm1.weight has moved in memory"):
        graph(volume)
    lifted, volume = lifted_on_gpu()
    graph = pcf.cuda_graph(lifted, volume)
    lifted.load_state_dict({name: t.clone() for name, t in lifted.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="has been replaced"):
        graph(volume)


def test_what_cannot_be_captured_says_so():
    lifted, volume = lifted_on_gpu()
    lifted.blocks[1].register_forward_pre_hook(lambda m, args: args[0].residual.sum().item() and None)
    with pytest.raises(RuntimeError, match="the model cannot be captured in a CUDA graph"):
        pcf.cuda_graph(lifted, volume)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_inductor(name):
    torch._dynamo.reset()
    lifted, volume = lifted_on_gpu(name, dtype=torch.float32)
    with torch.no_grad():
        expected, got = lifted(volume), torch.compile(lifted)(volume)
    torch.testing.assert_close(got.patches, expected.patches, rtol=1e-3, atol=1e-4)


@pytest.mark.alone
def test_a_side_stream():
    lifted, volume = lifted_on_gpu()
    with torch.no_grad():
        expected = lifted(volume)
        late = torch.zeros_like(volume)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late.copy_(volume)
            got = lifted(late)  # on another stream it would read zeros
        stream.synchronize()
    assert same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    lifted, volume = lifted_on_gpu(device="cuda:1")
    with torch.no_grad(), torch.cuda.device(0):
        got = lifted(volume)
        expected = pcf.lift(copy.deepcopy(pcf.unlift(lifted)).to("cuda:0"), backend="triton")(volume.to("cuda:0"))
    assert same([t if t is None else t.cpu() for t in got], [t if t is None else t.cpu() for t in expected])


def test_a_thousand_times_the_same_bits():
    lifted, volume = lifted_on_gpu()

    def run():
        out = lifted(volume).patches
        return out.detach(), *torch.autograd.grad(
            out.float().square().sum(), list(lifted.parameters()), allow_unused=True
        )

    first = run()
    assert all(same(run(), first) for _ in range(1000))
