"""Lifted models in ONNX, by both of torch's exporters, run by onnxruntime."""

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.export import formats as export_formats
from planecycle_fast.export.formats import NamedTensors

from ..export.test_export_command import alone
from ..host_models import BY_NAME

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
onnx = pytest.importorskip("onnx", reason="needs onnx, onnxscript and onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")

HOSTS = ("timm-dinov3-s", "hf-dinov3", "hf-dinov2", "hf-clip", "facebook-stand-in")
OTHERS = ("timm-eva02-s", "hf-mae", "hf-siglip", "facebook-stand-in-untied", "timm-vit-no-globals", "hf-dinov2-swiglu")


def lifted(host, depth=2, **settings):
    """All three changes of planes, in as few layers as there may be."""
    layers = "num_hidden_layers" if host.name.startswith("hf") else "depth"
    return pcf.lift(host.make(**{layers: depth}), **({"cycle_order": ("HW", "DW")} | settings))


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it raises is enough
    return onnxruntime.InferenceSession(path, options)


def check(run, model, volume):
    """Outputs of a session are those of the model."""
    with torch.no_grad():
        expected = NamedTensors(model)(volume)
    outputs = run.run(None, {"volume": volume.numpy()})
    assert [out.name for out in run.get_outputs()] == list(expected)
    for got, right in zip(outputs, expected.values()):
        torch.testing.assert_close(torch.from_numpy(got), right, rtol=0, atol=1e-4)


def cases():
    for dynamic, names in (("D", (*HOSTS, *OTHERS)), ("B,D", HOSTS)):
        for name in names:
            yield pytest.param(name, dynamic, id=f"{name}-{dynamic}")


@pytest.mark.full
@pytest.mark.parametrize("name, dynamic", list(cases()))
def test_depth_is_dynamic(tmp_path, name, dynamic):
    host = BY_NAME[name]
    model, path = lifted(host), tmp_path / "m.onnx"
    done = pcf.export_model(model, host.volume(1, 3), path, "onnx", dynamic)
    assert done.files == (path,) and [*tmp_path.iterdir()] == [path]
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    assert [domain.domain for domain in graph.opset_import if domain.domain not in ("", "ai.onnx")] == []
    run = session(path)
    batch = "B" if "B" in dynamic else 1
    assert [(i.name, i.shape[:3]) for i in run.get_inputs()] == [("volume", [batch, 3, "D"])]
    for b, depth in ((1, 1), (1, 2), (1, 7), *([(3, 4)] if "B" in dynamic else [])):
        check(run, model, host.volume(b, depth))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run.run(None, {"volume": host.volume(1, 3, grid=(3, 6)).numpy()})


@pytest.mark.full
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3", "facebook-stand-in"])
@pytest.mark.parametrize("settings", [{"mode": "flatten3d"}, {"globals_at": "plane", "pool_method": "PCm"}], ids=str)
def test_every_size_is_dynamic(tmp_path, name, settings):
    host = BY_NAME[name]
    model, path = lifted(host, **settings), tmp_path / "m.onnx"
    pcf.export_model(model, host.volume(1, 3), path, "onnx", "all")
    run = session(path)
    assert run.get_inputs()[0].shape == ["B", 3, "D", "height", "width"]
    for batch, depth, grid in ((1, 5, (2, 3)), (3, 2, (5, 4)), (1, 1, (3, 5))):
        check(run, model, host.volume(batch, depth, grid=grid))


@pytest.mark.full
@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_dynamic(tmp_path, name):
    host = BY_NAME[name]
    model, path = lifted(host, depth=3, cycle_order=("HW", "DW", "DH")), tmp_path / "m.onnx"
    pcf.export_model(model, host.volume(2, 3), path, "onnx", "none")
    check(session(path), model, host.volume(2, 3))


@pytest.mark.full
def test_weights_beyond_two_gigabytes_are_a_second_file(tmp_path, monkeypatch):
    """And none of it is there where the check fails. The files run where neither torch nor this package is."""
    monkeypatch.setattr(export_formats, "LARGEST_ONNX", 1000)
    host = BY_NAME["hf-clip"]
    model, path = lifted(host, depth=1), tmp_path / "m.onnx"
    done = pcf.export_model(model, host.volume(1, 3), path, "onnx", "none")
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "m.onnx.data"] == list(done.files)
    assert path.stat().st_size < done.files[1].stat().st_size
    check(session(path), model, host.volume(1, 3))
    code = "import onnxruntime, numpy; s = onnxruntime.InferenceSession('m.onnx')\n"
    code += "assert len(s.run(None, {'volume': numpy.zeros(s.get_inputs()[0].shape, 'float32')})) == 3"
    alone(code, tmp_path, "torch")
    with pytest.raises(ValueError, match="out must be new"):
        pcf.export_model(model, host.volume(1, 3), path, "onnx", "none")
    path.unlink()
    with pytest.raises(ValueError, match=r"out must be new, got .*m\.onnx\.data"):
        pcf.export_model(model, host.volume(1, 3), path, "onnx", "none")
    monkeypatch.setitem(
        export_formats.FORMATS, "onnx", export_formats.FORMATS["onnx"]._replace(load=lambda path: lambda volume: [])
    )
    with pytest.raises(ValueError, match="patches of the exported model must be .* got nothing"):
        pcf.export_model(model, host.volume(1, 3), tmp_path / "n.onnx", "onnx", "none")
    assert [*tmp_path.iterdir()] == [tmp_path / "m.onnx.data"]


@pytest.mark.parametrize(
    "name",
    ["hf-clip", *[pytest.param(n, marks=pytest.mark.full) for n in (*HOSTS, *OTHERS, "timm-beit") if n != "hf-clip"]],
)
def test_the_exporter_of_traces(tmp_path, name):
    """D, height and width are constants, whatever is declared: another size raises, and is never another result."""
    host, file = BY_NAME[name], tmp_path / "m.onnx"
    grid = (4, 4) if name == "timm-vit-no-globals" else (3, 5)  # what timm's interpolate with has no ONNX there
    model, volume = lifted(host).eval(), host.volume(2, 3, grid=grid)
    settings = dict(input_names=["volume"], output_names=list(NamedTensors(model)(volume)))
    with torch.no_grad():
        for axes in ({}, {2: "D"}):
            module = NamedTensors(model).eval()
            torch.onnx.export(module, (volume,), file, dynamo=False, dynamic_axes={"volume": axes}, **settings)
            onnx.checker.check_model(str(file), full_check=True)
            run = session(file)
            check(run, model, torch.randn_like(volume))
            for depth in (1, 6):  # of which one has as many rows as twice the batch
                with pytest.raises(Exception, match="Got invalid dimensions|Reshape"):
                    run.run(None, {"volume": host.volume(2, depth, grid=grid).numpy()})
        assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
