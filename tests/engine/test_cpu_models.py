"""Whole models on backend "cpu": outputs and all gradients within the budget of the reference; inference in groups."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import planecycle_fast as pcf
from planecycle_fast.engine import block as stream
from planecycle_fast.engine import cpu_groups as groups
from planecycle_fast.runtime import native

from ..host_models import BY_NAME, HOSTS

if not native.ready():
    pytest.skip(f"backend 'cpu' is not usable: {native.why_not_native()}", allow_module_level=True)
pytest.importorskip("triton", reason="the test bed needs triton")

from ..kernelcheck.budget import Errors, check, errors
from ..kernelcheck.models import check_model

SETTINGS = [  # of lifting, by turns
    {}, {"pool_method": "PCm"}, {"mode": "slice2d"}, {"globals_at": "plane"}, {"mode": "flatten3d"},
    {"cycle_order": ("DH", "DW"), "pool_method": "PCm", "globals_at": "plane"}, {"cycle_order": ("DW", "DW", "HW")},
]  # fmt: skip
SHAPES = [(1, 3, (2, 5)), (2, 1, (3, 1)), (1, 4, (1, 3))]  # batch, depth, (H, W) in tokens


def _models(dtypes):
    for i, host in enumerate(HOSTS):
        for j, dtype in enumerate(dtypes):
            settings = SETTINGS[(i + 3 * j) % len(SETTINGS)]
            if settings.get("mode") == "flatten3d" and host.rope and host.head_dim % 16:
                settings = {}
            yield pytest.param(host, settings, dtype, SHAPES[(i + j) % 3], id=f"{host.name} {dtype} {settings}")


@pytest.mark.parametrize("host, settings, dtype, shape", list(_models([torch.float32, torch.bfloat16])))
def test_models_are_within_the_budget(host, settings, dtype, shape):
    check_model(host, settings, dtype, shape=shape, backend="cpu")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2-swiglu"])
def test_every_mode_is_within_the_budget(name, settings):
    if settings.get("mode") == "flatten3d" and BY_NAME[name].rope and BY_NAME[name].head_dim % 16:
        pytest.skip("its heads have no sections for three axes")
    check_model(BY_NAME[name], settings, torch.float16, shape=(2, 3, (4, 5)), backend="cpu")


def _patches(host, settings, dtype, context, backend, seeds=6):
    """(a model's patches, their errors against float64) of some volumes."""
    model = host.make().to(dtype)
    wide = copy.deepcopy(model).double()
    largest = Errors(dtype)
    for seed in range(seeds):
        volume = host.volume(batch=2, depth=3, grid=(2, 5)) + seed
        volume = (volume * (1 + seed)).to(dtype)
        with context():
            exact = pcf.lift(wide, backend="reference", **settings)(volume.double()).patches.double()
            reference = pcf.lift(model, backend="reference", **settings)(volume).patches
        largest = errors("patches", reference, exact).worse(largest)
        if seed == 0:
            first, first_exact = volume, exact
    with context():
        return pcf.lift(model, backend=backend, **settings)(first).patches, first_exact, largest


@pytest.mark.parametrize("size", [1, 2**30], ids=["one sequence at a time", "all at once"])
@pytest.mark.parametrize("host, settings, dtype, shape", list(_models([torch.float32, torch.bfloat16])))
def test_inference_is_within_the_budget(monkeypatch, host, settings, dtype, shape, size):
    monkeypatch.setattr(groups, "GROUP_BYTES", size)
    runs = in_groups(monkeypatch)
    got, exact, largest = _patches(host, settings, dtype, torch.inference_mode, "cpu")
    check("patches", got, exact, largest)
    assert runs == [not block.kept for block in pcf.lift(host.make(), backend="cpu", strict=False).descriptions()]


def in_groups(monkeypatch):
    """Of each block that runs from now on, whether it ran in groups. On backend "cpu" alone."""
    runs = []

    def counted(block, held, layer, following):
        done = groups.run_in_groups(block, held, layer, following)
        if layer.choice.add_norm == "cpu":
            norm = done is not None and not isinstance(done[0], pcf.Stream)  # the last step is no block
            runs.extend([False] if done is None else [True] * (done[1] - norm))
        return done

    monkeypatch.setattr(stream, "run_in_groups", counted)
    return runs


@pytest.mark.parametrize("size", [1, 2**30], ids=["one sequence at a time", "all at once"])
@pytest.mark.parametrize("name", ["timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov2-g", "hf-dinov3-gated"])
def test_inference_in_float16(monkeypatch, name, size):
    monkeypatch.setattr(groups, "GROUP_BYTES", size)
    runs = in_groups(monkeypatch)
    got, exact, largest = _patches(BY_NAME[name], {}, torch.float16, torch.inference_mode, "cpu")
    check("patches", got, exact, largest)
    assert runs and all(runs)


def test_streams_and_embeddings_are_not_written_to():
    """Blocks in groups write in place; what others may hold stays what it was."""
    host = BY_NAME["timm-dinov3-no-globals"]
    lifted, kept = pcf.lift(host.make(), backend="cpu", cycle_order=("HW",)), []
    lifted.patch_embed.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    for block in lifted.blocks:
        block.register_forward_hook(
            lambda m, args, out: kept.extend([(t, t.clone()) for t in (*args[0], *out) if t is not None])
        )
    with torch.inference_mode():
        features = lifted.intermediate(host.volume(), n=len(lifted.blocks))
    assert len(features) == len(lifted.blocks) and len(kept) > len(features)
    assert all(torch.equal(t, before) for t, before in kept)


@pytest.mark.parametrize("why", ["gradients", "a hook on a linear layer", "compiled"])
def test_blocks_that_do_not_run_in_groups(monkeypatch, why):
    runs, host = in_groups(monkeypatch), BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), backend="cpu"), host.volume()
    if why == "gradients":
        lifted(volume)
    elif why == "compiled":
        with torch.no_grad():
            torch.compile(lifted, backend="eager")(volume)
    else:
        for module in lifted.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            lifted(volume)
    assert len(runs) == len(lifted.blocks) and not any(runs)


def test_autocast():
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume(batch=2, depth=3, grid=(3, 5))
    with torch.no_grad():
        exact = pcf.lift(copy.deepcopy(model).double(), backend="reference")(volume.double()).patches
        with torch.autocast("cpu", torch.bfloat16):
            reference, got = (pcf.lift(model, backend=name)(volume).patches for name in ("reference", "cpu"))
    assert got.dtype == reference.dtype
    assert (got - exact).abs().max() <= 2 * (reference - exact).abs().max()


@pytest.mark.parametrize("block_type", ["PlaneCycle", "Slice2D", "Flatten3D"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_accelerated_models(build, block_type, context):
    model = build(block_type)
    volume = torch.randn(2, 3, 3, 8, 12)
    with context():
        expected = model(volume)
        pcf.accelerate(model, backend="cpu")
        got = model(volume)
    for a, b in zip(got.values(), expected.values()) if isinstance(got, dict) else [(got, expected)]:
        if b is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_weights_may_change_between_passes():
    """In ways that no version counter shows."""
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, backend="cpu")
    lifted(volume)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    torch.testing.assert_close(lifted(volume).patches, pcf.lift(model, backend="reference")(volume).patches)


@pytest.mark.parametrize("name", ["timm-dinov3-no-globals", "timm-dinov3-s", "hf-dinov3"])
@torch.no_grad()
def test_autocast_with_and_without_globals(name):
    """A stream that comes in in bfloat16 is widened by a float32 LayerScale."""
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (pcf.lift(model, backend=backend)(volume).patches for backend in ("reference", "cpu"))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_stream_of_any_strides():
    """As a hook may return it, where the next block keeps the plane."""
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    expected = pcf.lift(model, mode="slice2d", backend="cpu")(volume).patches
    lifted = pcf.lift(model, mode="slice2d", backend="cpu")
    lifted.blocks[0].register_forward_hook(lambda m, args, out: pcf.Stream(out.tokens().mT.contiguous().mT))
    torch.testing.assert_close(lifted(volume).patches, expected)


@torch.no_grad()
def test_weights_of_other_kinds_are_called(monkeypatch):
    """Quantised or sharded weights are tensors of a subclass."""

    class Quantised(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += func is nn.functional.linear
            return super().__torch_function__(func, types, args, kwargs or {})

    host, runs = BY_NAME["timm-dinov3-s"], in_groups(monkeypatch)
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, backend="cpu")
    expected = lifted(volume).patches
    layer = model.blocks[1].mlp.fc2
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    torch.testing.assert_close(lifted(volume).patches, expected)
    assert Quantised.calls and runs[:7] == [True] * 6 + [False]


@pytest.mark.parametrize("part", ["mlp", "norm2", "attn"])
@torch.no_grad()
def test_a_block_of_several_dtypes_runs_as_a_whole(monkeypatch, part):
    """`to` changes what parameters hold, not the parameters. What happens then is up to the operations."""
    host, runs = BY_NAME["timm-dinov3-s"], in_groups(monkeypatch)
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, backend="cpu")
    lifted(volume)
    assert runs == [True] * 5
    getattr(model.blocks[0], part).double()
    try:
        torch.testing.assert_close(lifted(volume).patches, pcf.lift(model, backend="reference")(volume).patches)
    except RuntimeError as error:
        assert "dtype" in str(error)
    assert part == "norm2" or runs[5] is False


@torch.no_grad()
def test_what_watches_operations_sees_those_of_a_block():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    host, seen = BY_NAME["timm-dinov3-s"], Counter()
    lifted = pcf.lift(host.make(), backend="cpu")
    with Names():
        lifted(host.volume())
    blocks = len(lifted.blocks)
    expected = {
        "planecycle_fast_cpu::rope_",
        "planecycle_fast_cpu::add_norm_",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
    assert all(seen[name] == blocks for name in expected)
    products = seen["aten::addmm"] + seen["aten::mm"] + seen["mkldnn::_linear_pointwise"]
    assert products == 4 * blocks and not any("blocks_" in name for name in seen)
