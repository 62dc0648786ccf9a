"""add_norm: residual + LayerScale * branch and its norm, within a block; LayerNorm and RMSNorm.

make bench
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from planecycle_fast.ops import Norm, add_norm, add_norm_ref

from . import op_peers as peers
from .op_benchmark import benchmark_of
from .op_cells import OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed

EPS = 1e-5


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape, rms, step in product(shapes, (False, True), STEPS):
        yield cell(shape, rms, step, device, dtype)


def cell(shape: Shape, rms: bool, step: str, device: str, dtype: torch.dtype) -> OpCell:
    rows = (*shape.sequences, shape.channels)
    vectors = ("scale", "weight") if rms else ("scale", "weight", "bias")

    def ours():
        backend = backend_of(device, "add_norm")
        return lambda x, branch, scale, weight, bias=None: add_norm(
            x, branch, scale, Norm(weight, bias, EPS, rms), backend=backend
        )

    def reference(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None):
        return add_norm_ref(x, branch, scale, Norm(weight, bias, EPS, rms))

    others = {peers.LIGER: peers.liger_add_rms_norm(EPS, device)} if rms else {
        peers.FLASH_TRITON: peers.flash_add_norm(EPS, device), peers.LIGER: peers.liger_add_norm(EPS, device),
    }  # fmt: skip
    elements = shape.sequences[0] * shape.sequences[1] * shape.channels
    forward, backward = 4, 6  # x, branch, sum, norm; two gradients, sum and branch to two gradients
    return OpCell(
        "add_norm", f"{shape.label}, {'RMSNorm' if rms else 'LayerNorm'}", step, dtype,
        {"x": rows, "branch": rows} | {name: (shape.channels,) for name in vectors},
        {OURS: ours, REFERENCE: fixed(reference), **others},
        moved=elements * (forward + (backward if step == TRAINING else 0)),
    )  # fmt: skip


test_add_norm = benchmark_of(cells)
