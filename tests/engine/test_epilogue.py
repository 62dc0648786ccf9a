"""`lift(gelu=...)`: which GELU an MLP has, and where fc1 takes it into its epilogue."""

import copy
import io
import pickle
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import planecycle_fast as pcf
from planecycle_fast.engine import branches
from planecycle_fast.engine.report import table_of
from planecycle_fast.ops.activations import linear_gelu as op
from planecycle_fast.ops.activations import linear_gelu_table
from planecycle_fast.ops.activations.gelu import TANH_ERROR, gelu_ref, gelu_tanh
from planecycle_fast.ops.choice import Choice

from ..host_models import BY_NAME

HOST, GATED = BY_NAME["timm-dinov2-s"], BY_NAME["timm-dinov3-s+"]
NAMED = "tanh_epilogue"


class At(NamedTuple):
    """As much of a `Layer` as an MLP asks for."""

    choice: Choice


@pytest.fixture
def made():
    torch.manual_seed(0)
    return HOST.make().eval(), HOST.volume()


def tanh_twin(model):
    """The 2D model with another activation: its own code runs."""
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return twin


def test_the_error_is_what_is_said():
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    worst = (gelu_tanh(x) - gelu_ref(x)).abs().max().item()
    assert 4.7e-4 < worst <= TANH_ERROR
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert (gelu_tanh(values) - gelu_ref(values)).abs().max() <= TANH_ERROR


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_name_means_the_tanh_approximation_everywhere(made, backend, grad):
    """Outputs and gradients are those of a model whose activation it is."""
    model, volume = made
    with torch.set_grad_enabled(grad):
        got = pcf.lift(model, backend=backend, gelu=NAMED)(volume).patches
        expected = pcf.lift(tanh_twin(model), backend="reference", strict=False)(volume).patches
        exact = pcf.lift(model, backend="reference")(volume).patches
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - exact).abs().max() > 4 * (got - expected).abs().max()
    if grad:
        weight = model.blocks[0].mlp.fc1.weight
        found = torch.autograd.grad(got.square().sum(), weight)[0]
        twin = tanh_twin(model)
        other = pcf.lift(twin, backend="reference", strict=False)(volume).patches
        wanted = torch.autograd.grad(other.square().sum(), twin.blocks[0].mlp.fc1.weight)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_hooks_lora_and_autocast_have_the_same_function(made):
    model, volume = made
    seen = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out))
    lifted = pcf.lift(model, gelu=NAMED)
    with torch.no_grad():
        got = lifted(volume).patches
        torch.testing.assert_close(got, pcf.lift(model, backend="reference", gelu=NAMED)(volume).patches)
        assert len(seen) == 2
        with torch.autocast("cpu", torch.bfloat16):
            narrow = lifted(volume).patches
    assert (narrow.float() - got).abs().max() < 0.1 * got.abs().max()


@pytest.mark.parametrize("gelu, activate", [("triton", gelu_ref), (NAMED, gelu_tanh)])
def test_under_torch_compile_fc1_and_gelu_are_two(made, monkeypatch, gelu, activate):
    """Inductor fuses GELU by itself, and cannot look into kernels that take descriptors."""
    model, _ = made
    monkeypatch.setattr(branches, "linear_gelu_on", None)
    monkeypatch.setattr(branches, "linear_gelu_tanh", None)
    block = pcf.lift(model).descriptions()[0]
    here = replace(Choice.of("reference", "auto", True, torch.device("cpu")), gelu=gelu)

    def mlp(x):
        return branches.mlp_branch(block, x, At(here.here(x)))

    x = torch.randn(2, 3, model.blocks[0].mlp.fc1.in_features)
    with torch.no_grad():
        got = torch.compile(mlp, backend="eager", fullgraph=True)(x)
        expected = model.blocks[0].mlp.fc2(activate(model.blocks[0].mlp.fc1(x)))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("call", [pcf.lift, pcf.accelerate])
def test_other_names_are_refused(call, build):
    model = HOST.make() if call is pcf.lift else build()
    with pytest.raises(ValueError, match="gelu must be one of exact, tanh_epilogue, got 'tanh'"):
        call(model, gelu="tanh")


def test_mlps_that_have_no_gelu_are_refused_unless_told_otherwise():
    model, volume = GATED.make().eval(), GATED.volume()
    with pytest.raises(ValueError, match="gelu 'tanh_epilogue' would leave block 0's mlp .*swiglu, and no GELU"):
        pcf.lift(model, gelu=NAMED)(volume)
    with torch.no_grad():
        got = pcf.lift(model, gelu=NAMED, strict=False)(volume).patches
        torch.testing.assert_close(got, pcf.lift(model)(volume).patches, rtol=1e-4, atol=1e-5)


def test_mlps_of_the_models_own_code_are_refused(made):
    model, volume = made
    model.blocks[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="gelu 'tanh_epilogue' would leave block 2's mlp to the model's own code"):
        pcf.lift(model, gelu=NAMED)(volume)
    pcf.lift(model, gelu=NAMED, strict=False)(volume)


def test_accelerated(build):
    model, volume = build(), torch.randn(1, 3, 2, 8, 12)
    with torch.no_grad():
        exact = pcf.accelerate(model).forward_features(volume)["x_norm_patchtokens"]
        other = pcf.accelerate(model, gelu=NAMED).forward_features(volume)["x_norm_patchtokens"]
        again = copy.deepcopy(model).forward_features(volume)["x_norm_patchtokens"]
        reference = pcf.accelerate(model, backend="reference", gelu=NAMED).forward_features(volume)
    torch.testing.assert_close(again, other)
    again = reference["x_norm_patchtokens"]
    torch.testing.assert_close(other, again, rtol=1e-4, atol=1e-5)
    assert (other - exact).abs().max() > 4 * (other - again).abs().max()


def test_it_survives_copies_files_and_old_pickles(made):
    model, volume = made
    lifted = pcf.lift(model, gelu=NAMED)
    buffer = io.BytesIO()
    torch.save(lifted, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(lifted), pickle.loads(pickle.dumps(lifted)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = lifted(volume).patches
        for twin in copies:
            assert twin.gelu == NAMED
            torch.testing.assert_close(twin(volume).patches, expected)
    old = copy.deepcopy(lifted)
    del old.__dict__["gelu"]
    assert old.gelu == pickle.loads(pickle.dumps(old)).gelu == "exact"
    assert f"gelu={NAMED}" in lifted.extra_repr() and "gelu" not in old.extra_repr()


@pytest.mark.parametrize("mode", ["planecycle", "slice2d"])
def test_it_is_a_setting_of_the_result_and_recorded(made, tmp_path, mode):
    model, _ = made
    pcf.lift(model, mode=mode, gelu=NAMED).save_pretrained(tmp_path, model_args=dict(depth=5))
    assert pcf.from_pretrained(tmp_path).gelu == NAMED
    assert pcf.from_pretrained(tmp_path, gelu="exact").gelu == "exact"


def test_the_report_says_which_way_it_goes(made, capsys, monkeypatch):
    model, _ = made
    pcf.lift(model, gelu=NAMED).report()
    assert "fc1 + gelu: tanh_epilogue, off by up to 0.00048 from the exact one" in capsys.readouterr().out
    monkeypatch.setattr(op, "why_not_on", lambda device: None)
    lifted = pcf.lift(model.bfloat16())
    choice = replace(Choice.of("reference", "auto", True, torch.device("cpu")), gelu="triton")
    assert "fc1, then gelu: torch's, static: not measured on compute capability 0.x" in table_of(
        lifted.descriptions(), choice
    )
    channels = model.blocks[0].mlp.fc1.in_features
    key = (0, channels, model.blocks[0].mlp.fc1.out_features)
    monkeypatch.setitem(linear_gelu_table.MEASURED, key, (1000, 1.0, 2.0))
    text = table_of(lifted.descriptions(), choice)
    assert "fc1 + gelu: triton, from 65,536 rows on, measured on an H100: 1 ms for 2 at 1,000 rows (prototype)" in text
    for reason, settings in (
        ("in training", dict(training=True)),
        ("fewer than 65,536 rows", dict(planes={"HW": (65, 1000), "DW": (64, 1001)})),
    ):
        assert f"fc1, then gelu: torch's, {reason}" in table_of(lifted.descriptions(), choice, **settings)
    assert "torch's, under autocast" in table_of(lifted.descriptions(), replace(choice, autocast=torch.bfloat16))
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert "fc1 is more than a weight and a bias" in table_of(lifted.descriptions(), choice)
    assert "torch's, of float32" in table_of(pcf.lift(model.float()).descriptions()[1:], choice)


def test_where_the_table_says_that_it_wins():
    assert all(linear_gelu_table.row(*key).wins for key in linear_gelu_table.MEASURED)
    between = linear_gelu_table.row(9, 512, 2048)
    assert between == (True, "static: between widths where it was measured to win on an H100")
    assert linear_gelu_table.row(9, 1280, 5120) == (False, "static: not measured from 1280 to 5120 channels")
    assert linear_gelu_table.row(10, 384, 1536) == (False, "static: not measured on compute capability 10.x")
    assert not linear_gelu_table.row(9, 384, 384).wins


def test_devices_that_the_kernel_is_for(monkeypatch):
    assert op.why_not_on(torch.device("cpu")) == "it needs tensors on a CUDA device, got cpu"
    device = torch.device("cuda", 0)
    found = []
    for capability in ((8, 0), (9, 0), (10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found.append(op.why_not_on(device) is None)
    assert found == [False, True, True, True, False]


def test_on_a_cpu_auto_is_torch(made):
    x, weight, bias = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16)
    for backend in ("auto", "cpu", "reference"):
        got = pcf.ops.linear_gelu(x, weight, bias, backend=backend)
        assert torch.equal(got, F.gelu(F.linear(x, weight, bias)))
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        pcf.ops.linear_gelu(x, weight, bias, backend="triton")
    with pytest.raises(TypeError, match="weight must be a floating-point tensor, got torch.int64"):
        pcf.ops.linear_gelu(x, torch.ones(16, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight must have shape \(hidden, 8\), got \(16, 9\)"):
        pcf.ops.linear_gelu(x, torch.ones(16, 9))
    with pytest.raises(ValueError, match=r"bias must have shape \(16,\), got \(3,\)"):
        pcf.ops.linear_gelu(x, weight, torch.ones(3))
    with pytest.raises(ValueError, match="weight must be on the device of x .* got cpu and torch.float16"):
        pcf.ops.linear_gelu(x, weight.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert pcf.ops.linear_gelu(x, weight.bfloat16(), bias).dtype == torch.bfloat16
