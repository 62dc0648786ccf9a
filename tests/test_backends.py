"""Choosing a backend: by name, by context, by environment; never a silent fallback."""

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.backends import BACKENDS, VARIABLE, pick, why_not

from .toy import ToyViT, toy_lift


def test_every_backend_has_a_reason_or_works():
    assert list(pcf.backends()) == list(BACKENDS)
    assert pcf.backends()["reference"] is None
    assert all(reason is None or reason for reason in pcf.backends().values())


def test_auto_and_override(monkeypatch):
    assert pick() == "reference"
    with pcf.use_backend("reference"):
        assert pick() == "reference"
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        pick()
    with pcf.use_backend("reference"):  # the context wins over the environment
        assert pick() == "reference"
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        toy_lift(ToyViT())(torch.randn(1, 3, 3, 4, 6))
    monkeypatch.setenv(VARIABLE, "tritom")
    with pytest.raises(ValueError, match="got 'tritom'"):
        pick()


def test_use_backend_raises_on_entering_and_restores():
    with pytest.raises(ValueError, match="backend 'cpu' is not usable"), pcf.use_backend("cpu"):
        raise AssertionError("entered")
    with pytest.raises(KeyError), pcf.use_backend("reference"):
        raise KeyError
    assert pick() == "reference"
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        why_not("fast")
