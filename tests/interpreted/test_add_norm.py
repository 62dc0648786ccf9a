"""The kernels of add_norm, and of plane_switch in full, against their reference, in the interpreter."""

import pytest
import torch

from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.ops import Norm, add_norm, add_norm_ref
from planecycle_fast.ops.residual import add_norm_backward_triton

from ..kernelcheck import checks
from ..kernelcheck.harness import op_tests
from ..specs.add_norm import SPEC, case

TestAddNorm = op_tests(SPEC, examples=20)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("channels", [24, 1025], ids=["one piece", "a head and a tail"])
def test_programs_of_several_tiles(monkeypatch, channels, pool_method):
    """As volumes have that are too large to run here: every program adds up several tiles, the last one fewer."""
    monkeypatch.setattr(add_norm_backward_triton, "PATCH_PROGRAMS", 3)
    monkeypatch.setattr(add_norm_backward_triton, "GLOBAL_PROGRAMS", 2)
    checks.error_budget(SPEC, case(HW, DW, (5, 7, 2), 3, channels, 2, pool_method), torch.float32)


@pytest.mark.parametrize("channels", [32, 100, 1152, 1280, 4096, 8191, 8192])
def test_any_width(channels):
    c = case(HW, DW, (2, 2, 1), 1, channels)
    checks.plain(SPEC, c)
    checks.float64(SPEC, c)


def test_no_sequences():
    x = torch.zeros(0, 4, 8, requires_grad=True)
    for got, expected in zip(add_norm(x, None, None, NORM, backend="triton"), add_norm_ref(x, None, None, NORM)):
        assert got.shape == expected.shape


def test_a_wider_branch_is_summed_in_its_own_precision():
    x, branch = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=torch.float64)
    for got, expected in zip(add_norm(x, branch, None, NORM, backend="triton"), add_norm_ref(x, branch, None, NORM)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


NORM = Norm(None, None, 1e-6)
