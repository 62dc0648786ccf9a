"""`planecycle-fast export` and `pcf.export_model`: checked files, or none and one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.export import exporting
from planecycle_fast.export import formats as export_formats
from planecycle_fast.runtime.compiling import compiler

from ..host_models import BY_NAME
from ..pages import python
from ..saved_models import with_statistics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TWO = dict(cycle_order=("HW", "DW"))
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DINOv3 of Hugging Face, and the statistics of its images."""
    return with_statistics(tmp_path_factory.mktemp("models") / "small", layers=2)


@pytest.fixture
def export(folder, tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path: status, lines of stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments, model=folder, volume="1x4x32"):
        status = main(["export", model, "--volume", volume, "--cycle-order", "HW,DW", *arguments])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return command


@pytest.fixture
def lifted():
    return pcf.lift(BY_NAME["facebook-stand-in"].make(depth=2), **TWO)


VOLUME = torch.zeros(1, 3, 2, 32, 32)


def alone(code, cwd, *forbidden):
    """Runs code in a process that cannot import planecycle_fast, nor what else is forbidden."""
    first = "import sys\n" + "".join([f"sys.modules[{name!r}] = None\n" for name in ("planecycle_fast", *forbidden)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", first + code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_command(export, folder, tmp_path):
    status, out, err = export("--to", "jit")
    assert (status, err) == (0, []) and [p.name for p in tmp_path.iterdir()] == ["small.pt"]
    rows = [re.fullmatch(r"(\w+) +([\dx ]+?) +largest error (\S+)", line) for line in out]
    shapes = {row[1]: row[2] for row in rows if row}
    assert shapes == {"patches": "1 x 4 x 2 x 2 x 64", "cls": "1 x 4 x 64", "registers": "1 x 4 x 4 x 64",
                      "pooled": "1 x 64"}  # fmt: skip
    assert all(float(row[3]) < 1e-4 for row in rows if row) and out[-1] == "written: small.pt"
    note = {"planecycle_fast": ""}
    torch.jit.load("small.pt", _extra_files=note)
    about = json.loads(note["planecycle_fast"])
    assert about["mode"] == "planecycle" and about["cycle_order"] == ["HW", "DW"] and about["pool_method"] == "PCg"
    assert about["mean"] == pytest.approx([0.4, 0.5, 0.6]) and about["std"] == pytest.approx([0.2, 0.25, 0.3])
    assert about["patch_size"] == [16, 16] and about["volume"] == "B,C,D,height,width" and about["model"] == folder
    assert about["planecycle_fast"] == pcf.__version__ and about["dynamic"] == []


@pytest.mark.parametrize("mode", ["slice2d", pytest.param("flatten3d", marks=pytest.mark.full)])
def test_settings_are_those_of_the_lift(export, folder, tmp_path, mode):
    status, _, err = export("--to", "export", "--dynamic", "none", "--mode", mode, "--out", "p.pt2", "--dtype", "fp64")
    assert (status, err) == (0, [])
    model, volume = pcf.load_model(folder)[0].double(), torch.randn(1, 3, 4, 32, 32).double()
    got = torch.export.load("p.pt2").module()(volume)
    torch.testing.assert_close(got["patches"], pcf.lift(model, mode)(volume).patches, rtol=0, atol=1e-9)
    with pytest.raises((AssertionError, RuntimeError), match="Guard failed|shape"):
        torch.export.load("p.pt2").module()(volume[:, :, :3])


def test_settings_that_a_folder_records(tmp_path, monkeypatch, capsys):
    """As `features` follows them: what is given wins. The file says which they were, depth's position too."""
    monkeypatch.chdir(tmp_path)
    host = BY_NAME["hf-dinov2"].make(num_hidden_layers=1)
    recorded = dict(cycle_order=("DW",), pool_method="PCm", globals_at="plane", depth_position="rope1d")
    pcf.lift(host, **recorded).save_pretrained("saved")
    volume, note = torch.randn(1, 3, 3, 28, 42), {"planecycle_fast": ""}
    command = ["export", "saved", "--to", "jit", "--volume", "1x3x28x42", "--overwrite"]
    for given in ({}, {"depth_position": "sincos", "globals_at": "depth"}):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        assert main([*command, *options]) == 0
        got = torch.jit.load("saved.pt", _extra_files=note)(volume)
        right = pcf.lift(host, **(recorded | given))(volume)
        torch.testing.assert_close(got["patches"], right.patches, rtol=0, atol=1e-5)
        about = json.loads(note["planecycle_fast"])
        assert {name: about[name] for name in recorded} == recorded | {"cycle_order": ["DW"]} | given
    Path("saved", "planecycle.json").write_text('{"mode": 3}')
    capsys.readouterr()
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "must have a name as mode" in err


BAD = [
    (["--to", "tflite"], "to must be one of onnx, export, aoti, jit, got 'tflite'"),
    (["--to", "jit", "--dynamic", "D"], "dynamic must be none for to 'jit', which holds one shape, got 'D'"),
    (
        ["--to", "export", "--dynamic", "B,C"],
        "dynamic must be none, all, or names of B, D, H, W such as B,D, got 'B,C'",
    ),
    (["--to", "export", "--dynamic", ""], "dynamic must be none, all, or names of B, D, H, W such as B,D, got ''"),
    (
        ["--to", "export", "--dynamic", "D,D"],
        "dynamic must be none, all, or names of B, D, H, W such as B,D, got 'D,D'",
    ),
    (["--to", "jit", "--volume", "8"], "volume must be like 1x32x256"),
    (["--to", "jit", "--volume", "1x4x30"], "volume's slices must be a multiple of the patch"),
    (["--to", "jit", "--out", "m.onnx"], "out must be a file ending in .pt for to 'jit', got m.onnx"),
    (["--to", "onnx", "--out", "m"], "out must be a file ending in .onnx for to 'onnx', got m"),
    (["--to", "jit", "--out", "no/m.pt"], "out must be in an existing folder that can be written to, got no/m.pt"),
    (["--to", "jit", "--out", "old.pt"], "out must be new, got old.pt; --overwrite"),
    (["--to", "jit", "--mode", "3d"], "mode must be one of planecycle, slice2d, flatten3d, got '3d'"),
    (["--to", "jit", "--cycle-order", "HX"], "cycle_order"),
    (["--to", "jit", "--pool-method", "max"], "pool_method must be"),
    (["--to", "jit", "--globals-at", "top"], "globals_at must be"),
    (["--to", "jit", "--depth-position", "z"], "depth_position must be one of none, sincos, rope1d, got 'z'"),
    (["--to", "jit", "--depth-position", "rope1d"], "rotary embeddings follow every plane already"),
    (["--to", "jit", "--dtype", "int8"], "dtype must be one of fp32, bf16, fp16, fp64, got 'int8'"),
    (["--to", "jit", "--device", "tpu"], "device must be 'auto' or one that torch can use here, got 'tpu'"),
    (["--dynamic", "D"], "Missing option '--to'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(export, tmp_path, arguments, message):
    if "onnx" in arguments:
        pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    (tmp_path / "old.pt").write_bytes(b"old")
    status, out, err = export(*arguments)
    assert status != 0 and out == [] and len(err) == 1 and message in err[0], err
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt"] and (tmp_path / "old.pt").read_bytes() == b"old"


@pytest.mark.parametrize("model, message", [("dino4", "model must be a known"), ("no/such", "model no/such")])
def test_models_that_are_not_there(export, tmp_path, model, message):
    status, out, err = export("--to", "jit", "--out", "m.pt", model=model)
    assert status == 1 and out == [] and len(err) == 1 and message in err[0], err
    assert [*tmp_path.iterdir()] == []


def test_random_weights_are_asked_for(export, tmp_path, monkeypatch):
    from planecycle_fast.weights.load import random_note

    small = BY_NAME["timm-dinov3-s"].make(depth=2)
    monkeypatch.setattr("planecycle_fast.commands.export.load_model", lambda name: (small, random_note(name)))
    status, out, err = export("--to", "jit", model="a-model")
    assert status == 1 and out == [] and err[0].endswith("; --random-weights takes them anyway") and len(err) == 1
    assert [*tmp_path.iterdir()] == []
    status, out, err = export("--to", "jit", "--random-weights", model="a-model")
    assert (status, err) == (0, []) and "RANDOM" in out[0] and [p.name for p in tmp_path.iterdir()] == ["a-model.pt"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_their_extra(export, tmp_path, monkeypatch, package):
    for other in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(other, reason="needs onnx, onnxscript and onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = export("--to", "onnx")
    expected = f"package {package!r} is not installed; it comes with: pip install 'planecycle-fast[export]'"
    assert (status, out, err) == (1, [], [f"planecycle-fast: {expected}"]) and [*tmp_path.iterdir()] == []


def test_aoti_needs_a_compiler(export, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    status, out, err = export("--to", "aoti")
    assert (status, out) == (1, []) and err == [
        "planecycle-fast: to 'aoti' needs a C++ compiler: c++, g++, or what CXX names"
    ]


FAULTS = {
    "a little off": (lambda got: got | {"cls": got["cls"] + 2e-3}, "cls of the exported model must be within"),
    "not a number": (lambda got: got | {"pooled": got["pooled"] * float("nan")}, "pooled .* got nan"),
    "lost": (lambda got: {"patches": got["patches"]}, r"cls of the exported model must be \(1, 4, 64\).*, got nothing"),
    "of another shape": (lambda got: got | {"patches": got["patches"][:, :1]}, r"patches .* got \(1, 1, 2, 2, 64\)"),
    "of another dtype": (lambda got: got | {"cls": got["cls"].double()}, "cls .* torch.float64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_the_model_is_not_written(export, tmp_path, monkeypatch, fault):
    change, message = FAULTS[fault]
    right = export_formats.FORMATS["jit"]

    def load(path):
        run = right.load(path)
        return lambda volume: change(dict(run(volume)))

    monkeypatch.setitem(export_formats.FORMATS, "jit", right._replace(load=load))
    (tmp_path / "small.pt").write_bytes(b"old")
    status, out, err = export("--to", "jit", "--overwrite")
    assert status == 1 and out == [] and len(err) == 1 and re.search(message, err[0]), err
    assert [p.name for p in tmp_path.iterdir()] == ["small.pt"] and (tmp_path / "small.pt").read_bytes() == b"old"


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_full_disk(export, tmp_path, monkeypatch, where):
    def full(*arguments, **settings):
        if where == "writing":
            Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = (torch.jit, "save") if where == "writing" else (exporting.os, "replace")
    monkeypatch.setattr(*target, full)
    status, out, err = export("--to", "jit")
    assert status == 1 and out == [] and len(err) == 1 and "No space left on device" in err[0]
    assert [*tmp_path.iterdir()] == []


def test_what_an_exporter_raises_is_one_line(export, tmp_path, monkeypatch):
    def fails(*arguments, **settings):
        raise KeyError("many\nlines\n" * 200)

    monkeypatch.setattr(torch.export, "export", fails)
    status, out, err = export("--to", "export")
    assert status == 1 and out == [] and len(err) == 1 and len(err[0]) < 600
    assert "to 'export' of this model in float32 with dynamic D is not possible: " in err[0]
    assert [*tmp_path.iterdir()] == []


def test_replacing(lifted, tmp_path):
    path = tmp_path / "m.pt"
    for file in (path, tmp_path / "m.pt.data"):
        file.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"out must be new, got .*m\.pt; --overwrite \(overwrite=True\) replaces it"):
        pcf.export_model(lifted, VOLUME, path, "jit")
    done = pcf.export_model(lifted, VOLUME, path, "jit", overwrite=True)
    assert done.files == (path,) and [*tmp_path.iterdir()] == [path] and path.stat().st_size > 1000


REFUSED = {
    "no lifted model": (TypeError, "lifted must be a model made by lift", lambda m: m.adapter.model, {}),
    "in training": (ValueError, "lifted must be in eval mode", lambda m: m.train(), {}),
    "cpu": (ValueError, "backend must be one of auto, reference .* got 'cpu'.*'auto' takes", None, {"backend": "cpu"}),
    "triton": (ValueError, "backend must be one of auto, reference .* got 'triton'", None, {"backend": "triton"}),
    "flash2": (ValueError, "attention must be one of auto, sdpa, reference .*", None, {"attention": "flash2"}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("to", export_formats.FORMATS)
def test_models_that_are_refused(lifted, tmp_path, what, to):
    kind, message, change, settings = REFUSED[what]
    lifted.__dict__.update(settings)  # also where this machine could not choose it
    with pytest.raises(kind, match=message):
        pcf.export_model(lifted if change is None else change(lifted), VOLUME, tmp_path / f"m{_suffix(to)}", to)
    assert [*tmp_path.iterdir()] == []


def _suffix(to):
    return export_formats.FORMATS[to].suffix


def test_a_backend_by_name_from_outside(lifted, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANECYCLE_FAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match="backend must be one of auto, reference to be exported, got 'cpu'"):
        pcf.export_model(lifted, VOLUME, tmp_path / "m.pt", "jit")


def test_features_that_are_not_finite(lifted, tmp_path):
    with torch.no_grad():
        lifted.blocks[1].mlp.fc2.bias[3] = float("inf")
    with pytest.raises(ValueError, match="features must be finite.* they begin in layer 1"):
        pcf.export_model(lifted, VOLUME, tmp_path / "m.pt", "jit")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(lifted, tmp_path, dtype):
    done = pcf.export_model(lifted.to(dtype), VOLUME.to(dtype), tmp_path / "m.pt", "jit")
    assert [output.name for output in done.outputs] == ["patches", "cls", "registers", "pooled"]
    assert torch.jit.load(done.files[0])(VOLUME.to(dtype))["patches"].dtype == dtype


@pytest.mark.parametrize(
    "dynamic, to, expected",
    [(None, "onnx", ("D",)), (None, "jit", ()), ("all", "aoti", ("B", "D", "H", "W")), ("none", "onnx", ()),
     ("D, B", "export", ("B", "D")), (["H", "D"], "export", ("D", "H")), ((), "jit", ())],
)  # fmt: skip
def test_names_of_sizes(dynamic, to, expected):
    assert exporting.parse_dynamic(dynamic, to) == expected


def test_dynamic_depth(tmp_path):
    """Of an example of one slice, too."""
    lifted, example = pcf.lift(BY_NAME["hf-clip"].make(num_hidden_layers=1), cycle_order=("DW",)), VOLUME[:, :, :1]
    done = pcf.export_model(lifted, example, tmp_path / "m.pt2", "export", dynamic="D")
    assert done.checked == (1, 3, 2, 32, 32) and done.dynamic == ("D",)
    run = torch.export.load(done.files[0]).module()
    for depth in (1, 3, 7):
        volume = torch.randn(1, 3, depth, 32, 32)
        for got, right in zip(run(volume).values(), export_formats.NamedTensors(lifted)(volume).values()):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-4)


def test_sizes_that_a_model_does_not_take(tmp_path):
    host = BY_NAME["timm-eva02-s"]  # for slices of 42 x 70 pixels
    with pytest.raises(ValueError, match="dynamic D,H is not possible for this model: .*42.*70"):
        pcf.export_model(pcf.lift(host.make(depth=1)), host.volume(1, 2), tmp_path / "m.pt2", "export", "D,H")
    assert [*tmp_path.iterdir()] == []


HOW = {"onnx": ("model.onnx", "onnxruntime"), "export": ("program.pt2", "torch"), "aoti": ("compiled.pt2", "torch"),
       "jit": ("traced.pt", "torch")}  # fmt: skip


@pytest.mark.parametrize(
    "to",
    [
        "onnx",
        "jit",
        pytest.param("export", marks=pytest.mark.full),
        pytest.param("aoti", marks=[pytest.mark.full, needs_compiler]),
    ],
)
def test_the_documentations_ways_to_run_them(tmp_path, to):
    """In processes without this package, and for ONNX without torch."""
    file, package = HOW[to]
    if to == "onnx":
        for other in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(other, reason="needs onnx, onnxscript and onnxruntime")
    code = next(block.code for block in python("docs/export.md") if file in block.code and block.language == "python")
    assert f"import {package}\n" in code
    lifted, dynamic = pcf.lift(BY_NAME["hf-clip"].make(num_hidden_layers=1)), None if to == "jit" else "D"
    pcf.export_model(lifted, torch.zeros(1, 3, 4, 32, 32), tmp_path / file, to, dynamic)
    alone(code, tmp_path, *(["torch"] if to == "onnx" else []))
