"""swiglu between the linear layers of a gated MLP; gate and value in one tensor, and in two.

make bench
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from planecycle_fast.ops import swiglu, swiglu_ref

from . import op_peers as peers
from .op_benchmark import benchmark_of
from .op_cells import INFERENCE, OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape, packed, step in product(shapes, (True, False), STEPS):
        yield cell(shape, packed, step, device, dtype)


def cell(shape: Shape, packed: bool, step: str, device: str, dtype: torch.dtype) -> OpCell:
    rows, hidden = shape.hidden_rows
    inplace = step == INFERENCE and not packed

    def ours():
        backend = backend_of(device, "swiglu")
        return lambda gate, value=None: swiglu(gate, value, inplace, backend=backend)

    return OpCell(
        "swiglu", f"{shape.label}, {'one tensor' if packed else 'two tensors'}", step, dtype,
        {"joined": (rows, 2 * hidden)} if packed else {"gate": (rows, hidden), "value": (rows, hidden)},
        {
            OURS: ours, REFERENCE: fixed(swiglu_ref), peers.FLASH_JIT: peers.flash_swiglu(device, packed),
            peers.LIGER: peers.liger_swiglu(device, packed),
        },
        moved=rows * hidden * (8 if step == TRAINING else 3),  # backward reads three and writes two
    )  # fmt: skip


test_swiglu = benchmark_of(cells)
