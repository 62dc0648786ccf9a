"""rope of queries and keys, in the packed qkv of a block.

make bench
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, rope, rope_ref
from planecycle_fast.ops.rotary.rope_within import rope_within

from . import op_peers as peers
from .op_benchmark import benchmark_of
from .op_cells import GLOBALS, OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed


def axial(shape: Shape, device: str) -> Axial:
    """Angles of DINOv3 along HW."""
    return Axial(Rope(make_periods(shape.channels // shape.heads // 4, base=100.0, device=device)), shape.sizes[1:])


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape in shapes:
        angles = axial(shape, device)
        for step in STEPS:
            yield cell(shape, step, angles, device, dtype)


def cell(shape: Shape, step: str, angles: Axial, device: str, dtype: torch.dtype) -> OpCell:
    (n, rows), heads = shape.sequences, shape.heads
    tables = angles.tables()

    def ours():
        backend = backend_of(device, "rope")
        own = angles if backend == "triton" else tables  # as lifted models give them

        def call(qkv: Tensor) -> tuple[Tensor, ...]:  # (N, rows, 3*heads, hd), changed
            if step == TRAINING:
                return rope_within(qkv, own, GLOBALS, False, backend)
            queries_keys, values = qkv.split([2 * heads, heads], 2)
            rope(queries_keys, own, GLOBALS, inplace=True, backend=backend)
            return *queries_keys.split(heads, 2), values

        return call

    def reference(qkv: Tensor) -> tuple[Tensor, ...]:
        queries_keys, values = qkv.split([2 * heads, heads], 2)
        return *rope_ref(queries_keys, tables, GLOBALS).split(heads, 2), values

    def separate():
        sin, cos = peers.dense(tables, GLOBALS, torch.float32)

        def call(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = qkv.split(heads, 2)
            return peers.rotate_half(q, sin, cos), peers.rotate_half(k, sin, cos), v

        return call

    forward = 4 * n * rows * shape.channels  # queries and keys, read and written
    backward = 6 * n * rows * shape.channels  # gradients of q, k and v, read and written to one of qkv
    return OpCell(
        "rope", shape.label, step, dtype,
        {"qkv": (n, rows, 3 * heads, shape.channels // heads)},
        {
            OURS: ours, REFERENCE: fixed(reference), peers.SEPARATE: separate,
            peers.FLASH_TRITON: peers.flash_rotary(tables, GLOBALS, dtype, device),
            peers.LIGER: peers.liger_rotary(tables, GLOBALS, dtype, device),
        },
        moved=forward + (backward if step == TRAINING else 0),
    )  # fmt: skip


test_rope = benchmark_of(cells)
