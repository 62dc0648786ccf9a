"""What benchmarks call ours runs our kernels, and computes the same."""

import pytest
import torch

from benchmarks.op_peers import as_blocks_do
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial
from planecycle_fast.ops.multihead_attention.self_attention import self_attention_ref

from ..kernelcheck.recorder import recording


@pytest.mark.parametrize(
    "grid, training, ropes",
    [((4, 4), False, 0), ((8, 8), True, 1), ((18, 18), False, 1)],
    ids=["all turns on load", "turned in place", "keys in a pass of their own"],
)
def test_attention_as_blocks_run_it(grid, training, ropes):
    torch.manual_seed(0)
    angles = Axial(Rope(make_periods(4, base=100.0)), grid)
    qkv = torch.randn(1, 5 + grid[0] * grid[1], 3, 16).bfloat16()
    expected = self_attention_ref(qkv.float(), None, None, angles, 5)
    leaf = qkv.clone().requires_grad_(training)
    with recording() as record:
        got = as_blocks_do(angles, 5, training, "triton")(leaf)
    assert sum([n for name, n in record.launches.items() if name.startswith("rope")]) == ropes
    assert sum([n for name, n in record.launches.items() if name.startswith("self_attention")]) == 1
    assert got.requires_grad == training
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=2e-2)
