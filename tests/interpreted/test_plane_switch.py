"""The Triton kernel of plane_switch passes everything."""

import pytest
import torch

from planecycle_fast.ops.custom import Cost
from planecycle_fast.ops.plane_switch_triton import OP
from planecycle_fast.planes import DW, HW

from ..kernelcheck.harness import op_tests
from ..specs.plane_switch import SPEC, case, op_arguments

TestPlaneSwitch = op_tests(SPEC)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_each_row_is_read_once_and_written_once(pool_method):
    """24 patches; globals of 4 slices become those of 2. With declared costs held against what kernels do, above."""
    c = case(HW, DW, (4, 2, 3), 5, 8, batch=3, pool_method=pool_method)
    forward, backward = op_arguments(c.make(torch.float32), c.settings)
    row = 8 * 4
    assert OP.cost(*forward) == Cost(3 * (24 + 5 * 4) * row, 3 * (24 + 5 * 2) * row, 1)
    read = {"PCg": 4, "PCm": 2}[pool_method]  # each of 4 slices reads the one it was pooled into; PCm reduces 2 once
    assert OP.cost(*backward) == Cost(3 * (24 + 5 * read) * row, 3 * (24 + 5 * 4) * row, 1)
