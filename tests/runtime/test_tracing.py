"""torch.jit.trace records the reference, for one shape, and what it records computes what the model computes."""

import io

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition

from ..host_models import BY_NAME, HOSTS
from ..standins import Converter, DinoVisionTransformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
IN_MAKE_TEST = ("timm-dinov3-s", "timm-vit-no-globals", "hf-dinov2", "facebook-stand-in")
LAYERS = {"hf": "num_hidden_layers"}
ADVICE = "while it does, 'auto' is the reference"


class Tensors(nn.Module):
    """All tensors of what a function makes of a module's input."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x):
        return self.function(self.module, x)


def close(got, expected):
    expected = [t for t in expected if t is not None]
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def traced(module, *inputs, **settings):
    """As it is after it was written and read."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs, **settings), file)
    file.seek(0)
    return torch.jit.load(file)


def cases():
    for host in HOSTS:
        for mode in ("planecycle", "slice2d", "flatten3d"):
            full = host.name not in IN_MAKE_TEST or mode != "planecycle"
            yield pytest.param(host, mode, marks=[pytest.mark.full] if full else [], id=f"{host.name}-{mode}")


@pytest.mark.parametrize("host, mode", list(cases()))
def test_a_traced_model_is_the_model(host, mode):
    lifted, volume = pcf.lift(host.make(**{LAYERS.get(host.name[:2], "depth"): 3}), mode=mode), host.volume(depth=3)
    with torch.no_grad():
        trace = traced(lifted, volume)
        for other in (torch.randn_like(volume), 3 * volume):
            close(trace(other), lifted(other))


def test_another_shape_is_refused():
    host = BY_NAME["timm-dinov3-s"]
    with torch.no_grad():
        trace = torch.jit.trace(pcf.lift(host.make(depth=2)), host.volume(batch=2, depth=3, grid=(2, 3)))
        shapes = [(3, 2, (2, 3)), (2, 3, (3, 2)), (1, 3, (2, 3)), (2, 6, (1, 3))]  # as many tokens, and not
        for batch, depth, grid in shapes:
            with pytest.raises(RuntimeError, match="unflatten"):
                trace(host.volume(batch, depth, grid=grid))


def switched(backend="auto"):
    return lambda _, x: [pcf.ops.plane_switch(x, HW, DW, (3, 4, 5), 2, transition(3, 4, 3), backend=backend)]


def test_other_backends_by_name_are_refused(monkeypatch):
    host = BY_NAME["facebook-stand-in"]
    model, volume = host.make(depth=2), host.volume(batch=1, depth=3)
    for module, x in (
        (pcf.lift(model, backend="cpu"), volume),
        (Tensors(None, switched("cpu")), torch.randn(3, 22, 8)),
    ):
        module(x)
        with pytest.raises(ValueError, match=f"backend 'cpu' is not usable: torch.jit.trace.*{ADVICE}"):
            torch.jit.trace(module, x)
    lifted = pcf.lift(model)
    with pytest.raises(ValueError, match=ADVICE), pcf.use_backend("cpu"):
        torch.jit.trace(lifted, volume)
    with monkeypatch.context() as within, pytest.raises(ValueError, match=ADVICE):
        within.setenv("PLANECYCLE_FAST_BACKEND", "cpu")
        torch.jit.trace(lifted, volume)
    with torch.no_grad():
        lifted = pcf.lift(model, backend="cpu", strict=False)
        close(torch.jit.trace(lifted, volume)(2 * volume), lifted(2 * volume))


def accelerated(block_type="PlaneCycle"):
    model = DinoVisionTransformer(block_type, depth=2).eval()
    return pcf.accelerate(Converter()(model) if block_type == "PlaneCycle" else model)


WITHIN = {  # a module, what is made of its input, its input
    "layers": (
        lambda: pcf.lift(BY_NAME["hf-dinov2"].make(num_hidden_layers=3)),
        lambda m, x: [t for f in m.intermediate(x, (0, 2)) for t in f if t is not None],
        (1, 3, 2, 42, 28),
    ),
    "pooled": (
        lambda: pcf.lift(BY_NAME["timm-vit-no-globals"].make(depth=2)),
        lambda m, x: [m(x).pooled()],
        (1, 3, 2, 48, 32),
    ),
    "flatten3d": (lambda: accelerated("Flatten3D"), lambda m, x: [*m.get_intermediate_layers(x)], (1, 3, 2, 8, 12)),
    "accelerated": (accelerated, lambda m, x: [m.forward_features(x)["x_norm_patchtokens"]], (1, 3, 2, 8, 12)),
    "any layer": (
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        lambda m, x: [pcf.plane_cycle(x, None, lambda t, grid: m(t), "DW", layout="maps")[0]],
        (1, 3, 4, 5, 8),
    ),
    "rope": (
        lambda: nn.Identity(),
        lambda m, x: [pcf.ops.rope(x, pcf.ops.Tables((torch.eye(4)[:, :4],), (torch.eye(4)[:, :4],)), 1)],
        (2, 5, 3, 8),
    ),
    "plane_switch": (lambda: nn.Identity(), switched(), (3, 22, 8)),
    "swiglu": (lambda: nn.Identity(), lambda m, x: [pcf.ops.swiglu(x, 2 * x), pcf.ops.gelu(x)], (2, 5, 8)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_within_other_modules(name):
    make, function, shape = WITHIN[name]
    module, x = Tensors(make(), function), torch.randn(shape)
    with torch.no_grad():
        trace = traced(module, x, strict=False)
        close(trace(2 * x), module(2 * x))


def test_a_trace_is_differentiated():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(depth=2)), host.volume(batch=1, depth=2)
    gradients = []
    for model in (lifted, torch.jit.trace(lifted, volume)):
        lifted.zero_grad()
        model(2 * volume)[0].square().mean().backward()
        gradients.append([p.grad for p in lifted.parameters()])
    close(*gradients)


@pytest.mark.parametrize("name", ["timm-dinov3-s", "facebook-stand-in"])
def test_onnx(name):
    onnx, evaluator = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference").ReferenceEvaluator
    host, file = BY_NAME[name], io.BytesIO()
    lifted, volume = pcf.lift(host.make(depth=2)), host.volume(batch=1, depth=2)
    with torch.no_grad():
        torch.onnx.export(lifted, (volume,), file, dynamo=False, opset_version=17)
        model, other = onnx.load_from_string(file.getvalue()), torch.randn_like(volume)
        outputs = evaluator(model).run(None, {model.graph.input[0].name: other.numpy()})
        close([torch.from_numpy(out) for out in outputs], lifted(other))


def test_what_cannot_be_recorded_is_refused():
    lifted = pcf.lift(BY_NAME["timm-dinov3-s"].make(depth=2))
    for module in (lifted, lifted.blocks[0]):
        with pytest.raises(
            TypeError, match=r"torch\.jit\.script; use torch\.export, or torch\.jit\.trace for one shape"
        ):
            torch.jit.script(module)
    with pytest.raises((TypeError, torch.fx.proxy.TraceError), match="got Proxy|symbolically traced"):
        torch.fx.symbolic_trace(lifted)
