"""Choosing a backend: by name, by context, by environment; never a silent fallback."""

import subprocess
import sys

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.runtime import native
from planecycle_fast.runtime.backends import BACKENDS, VARIABLE, _found, pick, why_not

from ..toy import ToyViT, toy_lift


def test_every_backend_has_a_reason_or_works():
    assert list(pcf.backends()) == list(BACKENDS)
    assert pcf.backends()["reference"] is None
    assert all(reason is None or reason for reason in pcf.backends().values())


CPU = torch.device("cpu")


def test_auto_and_override(monkeypatch):
    assert pick("auto", CPU) == ("cpu" if native.ready() else "reference")
    assert pick("auto", torch.device("meta")) == "reference"
    with pcf.use_backend("reference"):
        assert pick() == "reference"
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        pick("auto", CPU)
    with pcf.use_backend("reference"):  # the context wins over the environment
        assert pick() == "reference"
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        toy_lift(ToyViT())(torch.randn(1, 3, 3, 4, 6))
    monkeypatch.setenv(VARIABLE, "tritom")
    with pytest.raises(ValueError, match="got 'tritom'"):
        pick()


def test_leaving_a_block_leaves_the_innermost(monkeypatch):
    module = sys.modules[pick.__module__]
    monkeypatch.setattr(module, "BACKENDS", ("other", "reference"))
    monkeypatch.setattr(module, "why_not", lambda *_: None)
    with pcf.use_backend("reference"), pcf.use_backend("other"):
        with pcf.use_backend("reference"):
            assert pick() == "reference"
        assert pick() == "other"


def test_use_backend_raises_on_entering_and_restores():
    with pytest.raises(ValueError, match="backend 'triton' is not usable"), pcf.use_backend("triton"):
        raise AssertionError("entered")
    with pytest.raises(KeyError), pcf.use_backend("reference"):
        raise KeyError
    assert pick("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        why_not("fast")


@pytest.fixture
def no_cache():
    found = dict(_found)
    _found.clear()
    yield
    _found.clear()
    _found.update(found)


class _Missing:
    """As where triton is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")


@pytest.mark.usefixtures("no_cache")
def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert why_not("triton") == "triton is not installed: pip install triton"


@pytest.mark.usefixtures("no_cache")
def test_triton_is_broken(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise OSError("libtriton.so: undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert why_not("triton") == "importing triton failed: OSError: libtriton.so: undefined symbol"


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("compilers, listed", [({}, "none"), ({"amd": None, "cpu": None}, "amd, cpu")])
def test_triton_without_a_backend_for_nvidia(monkeypatch, compilers, listed):
    backends = pytest.importorskip("triton.backends")
    monkeypatch.setattr(backends, "backends", compilers)
    assert why_not("triton") == f"this triton has no backend for NVIDIA GPUs; it has {listed}"


@pytest.mark.usefixtures("no_cache")
def test_triton_is_too_old(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.delattr(triton, "knobs")
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert why_not("triton") == "triton 3.1.0 is too old; it needs triton 3.6 or newer"


WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import torch
import planecycle_fast as pcf
from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition
assert "triton" not in sys.modules
x = torch.randn(3, 22, 8)
for m in (transition(3, 4, 3), transition(3, 4, 3, "PCm")):
    assert pcf.ops.plane_switch(x, HW, DW, (3, 4, 5), 2, m).shape == (4, 17, 8)
try:
    pcf.ops.plane_switch(x, HW, DW, (3, 4, 5), 2, m, backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("no error")
from planecycle_fast.commands.cli import main
assert main(["info"]) == 0
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "triton is not installed: pip install triton" in line]
    assert [line.split()[:2] for line in lines] == [["backend", "triton"], ["triton", "triton"]]
    assert not done.stderr
