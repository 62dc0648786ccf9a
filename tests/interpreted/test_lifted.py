"""Whole models on kernels, in the interpreter: outputs and all gradients within the budget of the reference."""

import pytest
import torch

import planecycle_fast as pcf
from benchmarks import traffic
from planecycle_fast.ops import custom

from ..hosts import HOSTS
from ..kernelcheck.models import check_model
from ..kernelcheck.recorder import recording

SETTINGS = [  # of lifting, by turns
    {}, {"pool_method": "PCm"}, {"mode": "slice2d"}, {"globals_at": "plane"}, {"mode": "flatten3d"},
    {"cycle_order": ("DH", "DW"), "pool_method": "PCm", "globals_at": "plane"}, {"cycle_order": ("DW", "DW", "HW")},
]  # fmt: skip


def _models():
    for i, host in enumerate(HOSTS):
        settings, dtype = SETTINGS[i % len(SETTINGS)], (torch.float32, torch.bfloat16)[i % 2]
        if settings.get("mode") == "flatten3d" and host.rope and host.head_dim % 16:
            settings = {}
        yield pytest.param(host, settings, dtype, id=f"{host.name} {dtype} {settings}")


@pytest.mark.parametrize("host, settings, dtype", list(_models()))
def test_models_are_within_the_budget(host, settings, dtype):
    with recording() as record:
        check_model(host, settings, dtype)
    assert set(record.launches) >= {"add_norm_kernel", "add_norm_backward_kernel", "column_sums_kernel"}
    assert ("rope_kernel" in record.launches) == host.rope


@pytest.mark.parametrize(
    "settings, changes",
    [({}, 4), ({"pool_method": "PCm"}, 4), ({"mode": "slice2d"}, 1), ({"globals_at": "plane"}, 4)], ids=str,
)  # fmt: skip
def test_a_block_on_kernels_moves_at_most_40(settings, changes):
    """Elements of C per row, by what operations declare; a change of planes costs no launch and no byte."""
    rows = traffic.lifted_rows("kernels", torch.bfloat16, backend="triton", **settings)
    assert len(rows) == changes
    for row in rows:
        assert row.moved == pytest.approx(rows[-1].moved) and row.moved <= 40
        assert (row.launches, row.copies) == (9, 0)


def test_operations_of_a_model_are_those_of_the_backend():
    """Recorded launches of whole blocks are what operations declare."""
    host = HOSTS[0]
    lifted, counted = pcf.lift(host.make(), backend="triton"), traffic.Traffic()
    with torch.no_grad(), traffic.fused(counted, ("attention",)), counted, recording() as record:
        lifted(host.volume(batch=1, depth=2, grid=(2, 3)))
    ours = [row for name, row in counted.rows.items() if name in custom.OPS]
    assert sum(row.launches for row in ours) == sum(record.launches.values()) > 0
