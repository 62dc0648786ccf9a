"""Whole models on kernels, in the interpreter: outputs and all gradients within the budget of the reference."""

from itertools import product

import pytest
import torch

import planecycle_fast as pcf
from benchmarks import traffic
from planecycle_fast.ops import registration as custom

from ..host_models import BY_NAME, HOSTS
from ..kernelcheck.models import check_model
from ..kernelcheck.recorder import recording

SETTINGS = [  # of lifting, by turns
    {}, {"pool_method": "PCm"}, {"mode": "slice2d"}, {"globals_at": "plane"}, {"mode": "flatten3d"},
    {"cycle_order": ("DH", "DW"), "pool_method": "PCm", "globals_at": "plane"}, {"cycle_order": ("DW", "DW", "HW")},
]  # fmt: skip


TWINS = [f"timm-dinov3-{size}" for size in ("s+", "b", "l-qkvb", "h+")]  # of s, s-qkvb and 7b
SHAPES = [(1, 3, (2, 5)), (2, 1, (3, 1)), (1, 4, (1, 3))]  # batch, depth, (H, W) in tokens


def _models():
    for (i, host), (j, dtype) in product(enumerate(HOSTS), enumerate((torch.float32, torch.bfloat16))):
        settings = SETTINGS[(i + 3 * j) % len(SETTINGS)]
        if settings.get("mode") == "flatten3d" and host.rope and host.head_dim % 16:
            settings = {}
        name, marks = f"{host.name} {dtype} {settings}", [pytest.mark.full] if host.name in TWINS else []
        yield pytest.param(host, settings, dtype, SHAPES[(i + j) % 3], id=name, marks=marks)


@pytest.mark.parametrize("host, settings, dtype, shape", list(_models()))
def test_models_are_within_the_budget(host, settings, dtype, shape):
    with recording() as record:
        check_model(host, settings, dtype, shape=shape)
    assert set(record.launches) >= {"add_norm_kernel", "add_norm_backward_kernel", "column_sums_kernel"}
    assert ("rope_kernel" in record.launches) == host.rope


LONG = (1, 2, (8, 9))  # 72 patches, more than one tile takes
OWN = [  # hosts, and what of their attention there is to see
    ("timm-dinov3-s", torch.bfloat16, SHAPES[0], []),  # packed, turned on load
    ("hf-dinov3", torch.float32, SHAPES[1], []),  # three layers
    ("timm-dinov2-s", torch.float32, SHAPES[2], []),  # nothing turns
    ("facebook-stand-in", torch.bfloat16, SHAPES[0], pytest.mark.full),
    ("timm-dinov3-s", torch.float32, LONG, pytest.mark.full),  # turned in place before
    ("hf-dinov3", torch.bfloat16, LONG, pytest.mark.full),
    ("timm-dinov2-s-reg4", torch.bfloat16, LONG, pytest.mark.full),
]


@pytest.mark.parametrize("name, dtype, shape", [pytest.param(*case, marks=marks) for *case, marks in OWN], ids=str)
def test_models_with_attention_of_our_own_are_within_the_budget(name, dtype, shape):
    with recording() as record:
        check_model(BY_NAME[name], {}, dtype, shape=shape, attention="triton")
    assert any("self_attention" in kernel and "backward" in kernel for kernel in record.launches)
    assert ("rope_kernel" in record.launches) == (BY_NAME[name].rope and shape == LONG)


def test_attention_of_our_own_takes_norms_of_queries_and_keys_in_another_dtype(monkeypatch):
    """On a GPU autocast has them in float32, next to values in bfloat16."""
    norm = torch.nn.functional.layer_norm

    def in_float32(x, *settings):
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), *settings)

    host = BY_NAME["timm-dinov3-s"]
    model, volume, found = host.make(qk_norm=True), host.volume(batch=1, depth=2, grid=(2, 3)), []
    monkeypatch.setattr(torch.nn.functional, "layer_norm", in_float32)
    for settings in ({"backend": "triton", "attention": "triton"}, {"backend": "reference"}):
        lifted = pcf.lift(model, **settings)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(lifted(volume).patches.float())
    assert (found[0] - found[1]).abs().max() < 0.05 * found[1].abs().max()


@pytest.mark.parametrize("shape", [SHAPES[0], pytest.param((1, 2, (18, 18)), marks=pytest.mark.full)], ids=str)
def test_inference_turns_on_load_what_a_program_holds(shape):
    """Without gradients: no pass of its own but for keys, of more rows than that."""
    host, (batch, depth, grid) = BY_NAME["timm-dinov3-s"], shape
    model, volume = host.make(), host.volume(batch=batch, depth=depth, grid=grid)
    with recording() as record, torch.no_grad():
        got = pcf.lift(model, backend="triton", attention="triton").intermediate(volume, [1])[0]
        expected = pcf.lift(model, backend="reference").intermediate(volume, [1])[0]
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ("rope_kernel" in record.launches) == (shape != SHAPES[0])


@pytest.mark.parametrize("block_type", ["PlaneCycle", "Slice2D", "Flatten3D"])
def test_accelerated_models(build, block_type):
    """Outputs and all gradients of models of the authors' code are what they are without kernels."""
    model, volume = build(block_type), torch.randn(1, 3, 2, 8, 12)
    found = []
    for backend in ("reference", "triton"):
        pcf.accelerate(model, backend=backend)
        outputs = model(volume)["x_norm_patchtokens"] if isinstance(model(volume), dict) else model(volume)
        leaves = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(outputs.square().sum(), leaves, allow_unused=True)
        found.append([outputs, *[g for g in grads if g is not None]])
        pcf.restore(model)
    assert len(found[0]) == len(found[1]) > 10
    for expected, got in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_a_block_without_a_change_of_planes_moves_what_a_2d_block_moves():
    rows = {row.planes: row for row in traffic.lifted_rows("kernels", torch.bfloat16, backend="triton")}
    [plain] = traffic.lifted_rows("kernels", torch.bfloat16, backend="triton", mode="slice2d")
    same = rows["HW to HW"]
    assert (same.moved, same.launches, same.copies) == (plain.moved, plain.launches, plain.copies)


@pytest.mark.parametrize(
    "settings, changes",
    [({}, 4), ({"pool_method": "PCm"}, 4), ({"mode": "slice2d"}, 1), ({"globals_at": "plane"}, 4),
     ({"mode": "flatten3d"}, 1)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_a_block_on_kernels_moves_at_most_40(settings, changes, training):
    """Elements of C per row, by what operations declare; a change of planes costs no launch and no byte."""
    rows = traffic.lifted_rows("kernels", torch.bfloat16, backend="triton", training=training, **settings)
    assert len(rows) == changes
    for row in rows:
        assert row.moved == pytest.approx(rows[-1].moved) and row.moved <= 40
        assert (row.launches, row.copies) == (9, 0)


def test_operations_of_a_model_are_those_of_the_backend():
    """Recorded launches of whole blocks are what operations declare."""
    host = HOSTS[0]
    lifted, counted = pcf.lift(host.make(), backend="triton"), traffic.Traffic()
    with torch.no_grad(), traffic.fused(counted, ("attention",)), counted, recording() as record:
        lifted(host.volume(batch=1, depth=2, grid=(2, 3)))
    ours = [row for name, row in counted.rows.items() if name in custom.OPS]
    assert sum(row.launches for row in ours) == sum(record.launches.values()) > 0


@pytest.mark.parametrize("name", ["hf-dinov3", "timm-dinov3-s", "facebook-stand-in"])
def test_gradients_in_training(name):
    """With coordinates drawn as the host draws them, of which some draw a part alone."""
    host = next(host for host in HOSTS if host.name == name)
    model, volume, found = host.make().train(), host.volume(batch=1, depth=2, grid=(2, 3)), []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        outputs = pcf.lift(model, backend=backend)(volume).patches
        leaves = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(outputs.square().sum(), leaves, allow_unused=True))
    assert sum(g is not None for g in found[0]) > 10
    for expected, got in zip(*found):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))
