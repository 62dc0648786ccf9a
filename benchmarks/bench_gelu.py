"""gelu: the exact GELU between the linear layers of an MLP; ours is torch's kernel, in place in inference.

Liger and FlashAttention have the tanh approximation only, which is another function.

make bench
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from planecycle_fast.ops import gelu, gelu_ref

from .op_benchmark import benchmark_of
from .op_cells import INFERENCE, OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape, step in product(shapes, STEPS):
        yield cell(shape, step, device, dtype)


def cell(shape: Shape, step: str, device: str, dtype: torch.dtype) -> OpCell:
    rows, hidden = shape.hidden_rows

    def ours():
        backend = backend_of(device, "gelu")
        return lambda x: gelu(x, inplace=step == INFERENCE, backend=backend)

    return OpCell(
        "gelu", shape.label, step, dtype, {"x": (rows, hidden)}, {OURS: ours, REFERENCE: fixed(gelu_ref)},
        moved=rows * hidden * (5 if step == TRAINING else 2),  # x and result; gradient and x to a gradient
    )  # fmt: skip


test_gelu = benchmark_of(cells)
