"""torch.export records the reference, for all sizes that a host takes; what is saved runs where we are not."""

import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import planecycle_fast as pcf
from planecycle_fast.runtime.backends import pick, why_not

from ..host_models import BY_NAME, HOSTS, MORE_HOSTS
from ..standins import Converter, DinoVisionTransformer

ADVICE = "records torch's own operations, is running; while it does, 'auto' is the reference"
LAYERS = {"hf": "num_hidden_layers"}
QUICK = "timm-dinov3-s"
BEIT = "timm-beit"  # its biases are resampled to each plane's size in Python, which makes numbers of D, H and W


class Made(nn.Module):
    """What a function makes of a module's input."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, volume):
        return self.function(self.module, volume)


def lifted(name, layers=2, **settings):
    return pcf.lift(BY_NAME[name].make(**{LAYERS.get(name[:2], "depth"): layers}), **settings)


def close(got, expected, atol=1e-5):
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a is b is None or torch.testing.assert_close(a, b, rtol=0, atol=atol) is None


def kept(program):
    """As it is after it was written and read."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def dynamic(model, host):
    """The axes that may have any size, a size of slices, and others."""
    axes, fixed = {0: Dim("B"), 2: Dim("D"), 3: host.patch * Dim("H"), 4: host.patch * Dim("W")}, None
    try:
        model.adapter.check_image_size(4 * host.patch, 6 * host.patch)
    except ValueError:  # of a model for one size
        fixed, axes = (3, 5), {0: axes[0], 2: axes[2]}
    if host.name.startswith(BEIT):
        del axes[2]
    # One of the others is the size that positions of these models are trained for, and one a cube.
    others = [(3, 5, (3, 7)), (1, 4, (4, 4)), (4, 2, (2, 3)), (1, 1, (4, 6))]
    if fixed:
        others = [(batch, depth if 2 in axes else 3, fixed) for batch, depth, _ in others]
    return axes, host.volume(2, 3, grid=fixed or (4, 6)), [host.volume(b, d, grid=grid) for b, d, grid in others]


def cases():
    found = []
    for host in [*HOSTS, *MORE_HOSTS]:
        for backend in ("auto", "reference"):
            for strict in (False, True):
                full = host.name != QUICK or backend == "reference" or strict
                name = f"{host.name}-{backend}-{'strict' if strict else 'not strict'}"
                found.append(pytest.param(host, backend, strict, marks=[pytest.mark.full] if full else [], id=name))
    return found


@pytest.mark.parametrize("host, backend, strict", cases())
def test_one_program_for_all_sizes(host, backend, strict):
    model = lifted(host.name, backend=backend)
    axes, volume, others = dynamic(model, host)
    with torch.no_grad():
        program = kept(export(model, (volume,), dynamic_shapes=(axes,), strict=strict))
        assert not [node for node in program.graph.nodes if "planecycle" in str(node.target)]
        for other in (volume, *others):
            features = program.module()(other)
            assert type(features) is pcf.VolumeFeatures and features.pooled().shape[0] == other.shape[0]
            close(features, model(other))


VARIANTS = {
    "slice2d": dict(mode="slice2d"),
    "flatten3d": dict(mode="flatten3d"),
    "PCm": dict(pool_method="PCm"),
    "plane": dict(globals_at="plane"),
    "plane-PCm": dict(globals_at="plane", pool_method="PCm"),
}


@pytest.mark.full
@pytest.mark.parametrize("slices", ["any", "one"])
@pytest.mark.parametrize("name", VARIANTS)
def test_modes(name, slices):
    host, model = BY_NAME["timm-dinov3-s"], lifted("timm-dinov3-s", 3, **VARIANTS[name])
    axes, volume, others = dynamic(model, host)
    if slices == "one":
        axes = {axis: axes[axis] for axis in (0, 2)}
        others = [host.volume(b, d, grid=(4, 6)) for b, d in ((1, 5), (3, 4), (2, 1))]
    with torch.no_grad():
        program = export(model, (volume,), dynamic_shapes=(axes,)).module()
        for other in others:
            close(program(other), model(other))


@pytest.mark.full
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "function",
    [lambda m, v: m.intermediate(v, (0, 1)), lambda m, v: [map.cls for map in m.attention_maps(v, 1, (1, 0, 2))]],
    ids=["intermediate", "attention_maps"],
)
def test_other_outputs(function, strict):
    host, model = BY_NAME["timm-dinov3-s"], Made(lifted("timm-dinov3-s"), function)
    axes, volume, others = dynamic(model.module, host)
    with torch.no_grad():
        program = kept(export(model, (volume,), dynamic_shapes=(axes,), strict=strict))
        for other in others[:-1]:  # the last one has no patch (1, 0, 2)
            close(program.module()(other), model(other))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
def test_what_a_tap_changes(strict):
    host, model = BY_NAME["timm-vit-no-globals"], lifted("timm-vit-no-globals", 1)
    model.tap(0).register_forward_hook(lambda tap, inputs, maps: 2 * maps)
    with torch.no_grad():
        program = export(model, (host.volume(2, 4),), dynamic_shapes=({0: Dim("B"), 2: Dim("D")},), strict=strict)
        volume = host.volume(3, 5)
        close(program.module()(volume), model(volume))


@pytest.mark.full
def test_all_of_beits_biases_are_for_one_size():
    host, model = BY_NAME[BEIT], lifted(BEIT)
    volume = host.volume(1, 2)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant|Not all"):
        export(model, (volume,), dynamic_shapes=({2: Dim("D")},))


def test_what_is_saved_runs_without_the_package(tmp_path):
    """Plain tuples; VolumeFeatures need the package, and torch says which."""
    model, volume = lifted("timm-dinov3-no-globals", 1), BY_NAME["timm-dinov3-no-globals"].volume(1, 2)
    plain = Made(model, lambda m, v: tuple([t for t in m(v) if t is not None]))
    with torch.no_grad():
        torch.export.save(export(plain, (volume,)), tmp_path / "plain.pt2")
        torch.export.save(export(model, (volume,)), tmp_path / "named.pt2")
        torch.save([volume, model(volume).patches], tmp_path / "example.pt")
    script = (
        "import sys, torch\n"
        "volume, expected = torch.load('example.pt')\n"
        "[patches] = torch.export.load('plain.pt2').module()(volume)\n"
        "torch.testing.assert_close(patches, expected, rtol=0, atol=1e-5)\n"
        "assert not [name for name in sys.modules if name.startswith('planecycle')]\n"
        "try:\n"
        "    torch.export.load('named.pt2')\n"
        "except Exception:\n"
        "    import planecycle_fast\n"
        "else:\n"
        "    raise AssertionError('VolumeFeatures came from nowhere')\n"
        "features = torch.export.load('named.pt2').module()(volume)\n"
        "assert features.cls is None and type(features) is planecycle_fast.VolumeFeatures\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "planecycle_fast.VolumeFeatures (import planecycle_fast)" in run.stderr


def test_a_backend_by_name_is_refused(monkeypatch):
    host = BY_NAME["timm-vit-no-globals"]
    model, volume = host.make(depth=1), host.volume(1, 2)
    with pytest.raises(ValueError, match=f"backend 'cpu' is not usable: torch.export, which {ADVICE}"):
        export(pcf.lift(model, backend="cpu"), (volume,))
    with pytest.raises(ValueError, match=ADVICE), pcf.use_backend("cpu"):
        export(pcf.lift(model), (volume,))
    monkeypatch.setenv("PLANECYCLE_FAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match=ADVICE):
        export(pcf.lift(model), (volume,))
    monkeypatch.delenv("PLANECYCLE_FAST_BACKEND")
    loose = pcf.lift(model, backend="cpu", strict=False)
    with torch.no_grad():
        close(export(loose, (volume,)).module()(2 * volume), loose(2 * volume))


def test_torch_compile_is_no_export():
    """Up to torch 2.11 torch.compiler.is_exporting() says so of all that is compiled."""
    chosen = []

    def compiled(x):
        chosen.append(pick("auto", x.device, "rope"))
        return x + 1

    torch.compile(compiled, backend="eager")(torch.ones(3))
    assert chosen == [pick("auto", torch.device("cpu"), "rope")]
    if why_not("cpu") is None:
        assert chosen == ["cpu"]


def gradients(model, run, volume):
    model.zero_grad()
    loss = sum([t.square().mean() for t in run(volume) if t is not None])
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


RECORDERS = {
    "torch.export": lambda model, volume: export(model, (volume,)).module(),
    "torch.jit.trace": lambda model, volume: torch.jit.trace(model, volume),
    "make_fx": lambda model, volume: make_fx(lambda v: [t for t in model(v) if t is not None])(volume),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_recorded_without_gradients_has_them(recorder):
    host, model = BY_NAME["timm-dinov3-s"], lifted("timm-dinov3-s")
    volume = host.volume(1, 2, grid=(2, 3))
    with torch.no_grad():
        run = RECORDERS[recorder](model, volume)
    direct, recorded = (2 * volume).requires_grad_(), (2 * volume).requires_grad_()
    expected, got = gradients(model, model, direct), gradients(model, run, recorded)
    torch.testing.assert_close(recorded.grad, direct.grad)
    if recorder == "torch.jit.trace":  # the others have weights of their own
        close([got[name] for name in expected], [*expected.values()])


@pytest.mark.full
def test_again_after_training():
    host, model = BY_NAME["timm-dinov3-s"], lifted("timm-dinov3-s").train()
    volume, optimizer = host.volume(2, 3), torch.optim.SGD(model.parameters(), lr=1.0)
    before = export(model.eval(), (volume,)).module()(volume).patches.detach().clone()
    gradients(model.train(), model, volume)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = export(model, (volume,)).module()(volume)
        close(after, model(volume))
    assert not torch.allclose(after.patches, before, atol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("strict", [False, True])
def test_augmentation_in_training_is_drawn_by_the_program(strict):
    model = lifted("hf-dinov3", layers=1)
    model.config.pos_embed_rescale = 2.0
    volume = BY_NAME["hf-dinov3"].volume(1, 2)
    with torch.no_grad():
        program = export(model.train(), (volume,), strict=strict).module()
        first, second = program(volume).patches, program(volume).patches
    assert not torch.equal(first, second)


@pytest.mark.full
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2", "hf-vit"])
def test_narrow(name, how):
    host, model = BY_NAME[name], lifted(name, backend="reference")
    axes, volume, others = dynamic(model, host)
    if how == "bfloat16":
        model, volume, others = model.bfloat16(), volume.bfloat16(), [other.bfloat16() for other in others]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        program = export(model, (volume,), dynamic_shapes=(axes,)).module()
        for other in others:
            got, expected = program(other), model(other)
            assert got.patches.dtype == expected.patches.dtype
            close(got, expected, atol=0.05)


@pytest.mark.full
@pytest.mark.parametrize("block_type", ["PlaneCycle", "Flatten3D"])
def test_accelerated_models(block_type):
    """For one size of volumes: their own code makes the tables, and torch.export numbers of its sizes."""
    model = DinoVisionTransformer(block_type, depth=2).eval()
    accelerated = pcf.accelerate(Converter()(model) if block_type == "PlaneCycle" else model)
    module = Made(accelerated, lambda m, v: m.get_intermediate_layers(v, n=2, return_class_token=True))
    volume = torch.randn(2, 3, 4, 8, 12)
    with torch.no_grad():
        program = export(module, (volume,), dynamic_shapes=({0: Dim("B")},)).module()
        for other in (volume, torch.randn(3, 3, 4, 8, 12)):
            close(program(other), module(other))


@pytest.mark.parametrize("name", ["timm-dinov3-s", pytest.param("timm-dinov3-7b", marks=pytest.mark.full)])
def test_flop_counter(name):
    """Of torch: by every backend as many, with gradients and without."""
    model, volume = lifted(name), BY_NAME[name].volume(1, 2)
    counts = set()
    for run in (model, pcf.lift(pcf.unlift(model), backend="reference")):
        for grad in (True, False):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                run(volume)
            counts.add(counter.get_total_flops())
    assert len(counts) == 1 and counts.pop() > 1e6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_fvcore():
    """Slice by slice it counts what it counts for the 2D model."""
    FlopCountAnalysis = pytest.importorskip("fvcore.nn", reason="needs fvcore").FlopCountAnalysis
    model = lifted("timm-dinov3-s", mode="slice2d")
    volume = BY_NAME["timm-dinov3-s"].volume(1, 2)
    counts = [
        FlopCountAnalysis(module, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
        for module, x in ((model, volume), (pcf.unlift(model), volume.transpose(1, 2).flatten(0, 1)))
    ]
    assert counts[0] == counts[1] > 1e6
