"""What a pass runs is decided once; operations that are called directly decide for themselves."""

import dataclasses

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.ops import choice as choices
from planecycle_fast.ops.choice import Choice
from planecycle_fast.runtime import backends

from ..toy import ToyViT, toy_lift

CPU, ROW = torch.device("cpu"), torch.zeros(1, 2)


@pytest.fixture
def decided(monkeypatch):
    """Each backend that is asked for from now on."""
    asked, pick = [], backends.pick
    monkeypatch.setattr(backends, "pick", lambda *args: (asked.append(args), pick(*args))[1])
    return asked


@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_asks_once_whatever_its_depth(decided, grad):
    for depth in (2, 7):
        lifted = toy_lift(ToyViT(depth=depth).float().eval())
        lifted.adapter.model.periods = lifted.adapter.model.periods.float()
        decided.clear()
        with torch.set_grad_enabled(grad):
            lifted(torch.randn(1, 3, 3, 4, 6))
        assert len(decided) == 1


def test_it_cannot_be_changed():
    found = Choice.of("reference", "auto", True, CPU)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.add_norm = "triton"


@pytest.mark.parametrize("operation", choices.OPERATIONS)
def test_a_choice_is_what_operations_choose_for_themselves(operation):
    for asked in ("auto", "reference"):
        assert getattr(Choice.of(asked, "auto", True, CPU), operation) == backends.pick(asked, CPU, operation)


def test_use_backend_holds_for_passes_that_begin_within():
    with pcf.use_backend("reference"):
        inside = Choice.of("auto", "auto", True, CPU)
    assert (inside.asked, inside.plane_switch) == ("reference", "reference")
    assert Choice.of("auto", "auto", True, CPU).asked == "auto"


def test_long_rows():
    found = dataclasses.replace(Choice.of("reference", "auto", True, CPU), asked="auto", add_norm="triton")
    assert found.for_rows(8192) is found and found.for_rows(8193).add_norm == "reference"
    with pytest.raises(ValueError, match="8193 channels, backend 'triton' holds whole rows of at most 8192"):
        dataclasses.replace(found, asked="triton").for_rows(8193)


def test_the_mode_is_that_of_the_place():
    with torch.no_grad():
        found = Choice.of("auto", "auto", True, CPU)
    assert (found.grad, found.writes, found.autocast) == (False, True, None)
    assert found.here(ROW).grad and not found.grad
    with torch.no_grad():
        assert found.here(ROW) is found
        with torch.autocast("cpu", torch.bfloat16):
            assert found.here(ROW).autocast == torch.bfloat16
        with torch.autograd.forward_ad.dual_level():
            inside = Choice.of("auto", "auto", True, CPU)
            assert not inside.writes and inside.attention == "reference" and inside.add_norm == "reference"


def test_the_one_rule_for_what_is_overwritten():
    with torch.no_grad():
        found = Choice.of("auto", "auto", True, CPU)
    t = torch.ones(2)
    assert found.may_overwrite(t, new=True) and not found.may_overwrite(t, new=False)
    assert not found.may_overwrite(nn.Parameter(t), new=True)
    assert not dataclasses.replace(found, writes=False).may_overwrite(t, new=True)
