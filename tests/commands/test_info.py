"""`planecycle-fast info` says what is here, and why something is not."""

from importlib import metadata

import torch

import planecycle_fast as pcf
from planecycle_fast.commands import info
from planecycle_fast.commands.cli import main
from planecycle_fast.runtime.attentions import ATTENTIONS, attentions
from planecycle_fast.runtime.backends import backends
from planecycle_fast.version import versions


def test_everything_is_listed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    assert ["version", "planecycle-fast", pcf.__version__] in lines and ["torch", torch.__version__] in lines
    for name, reason in (backends() | attentions()).items():
        assert [name, *(reason or "usable").split()] in [
            line[-len((reason or "usable").split()) - 1 :] for line in lines
        ]
    assert "no CUDA device was found" in out and f"{tmp_path / 'kernels'} (not there yet)" in out
    assert "cpu" in info.devices() and "cores" in out


def test_packages_that_are_missing(monkeypatch):
    found = metadata.version

    def version(package):
        if package == "timm":
            raise metadata.PackageNotFoundError(package)
        return found(package)

    monkeypatch.setattr(metadata, "version", version)
    assert versions()["timm"] == "not installed" and versions()["numpy"] == found("numpy")


def test_attentions_have_reasons():
    assert attentions()["auto"] is None
    usable = {name for name, reason in attentions().items() if reason is None}
    assert {"auto", "sdpa", "reference"} <= usable <= set(ATTENTIONS) - {"triton"}
    assert all(reason is None or reason for reason in attentions().values())
