"""plane_switch: rows alone, and the whole boundary of two blocks, with the sum before and the norm after.

make bench
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.geometry.planes import DH, DW, HW, Plane
from planecycle_fast.geometry.pooling import transition
from planecycle_fast.ops import Norm, plane_switch, plane_switch_ref

from . import op_peers as peers
from .op_benchmark import benchmark_of
from .op_cells import GLOBALS, INFERENCE, OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed

EPS = 1e-5
CHANGES = [(HW, DW, "PCg"), (DW, DH, "PCg"), (DH, HW, "PCg"), (HW, DW, "PCm")]


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape in shapes:
        for change, step in product(CHANGES if device == "cuda" else CHANGES[:2], STEPS):
            yield cell(shape, change, True, step, device, dtype)
        yield cell(shape, CHANGES[1], False, INFERENCE, device, dtype)


def cell(
    shape: Shape, change: tuple[Plane, Plane, str], whole: bool, step: str, device: str, dtype: torch.dtype
) -> OpCell:
    old, new, pool_method = change
    sizes, channels = shape.sizes, shape.channels
    m = transition(old.slices(sizes), new.slices(sizes), sizes[0], pool_method)
    rows = [shape.batch * p.slices(sizes) * (GLOBALS + p.length(sizes)) for p in (old, new)]
    where = (old, new, sizes, GLOBALS)

    def ours():
        backend = backend_of(device, "plane_switch")

        def call(x: Tensor, branch=None, scale=None, weight=None, bias=None):
            norm = Norm(weight, bias, EPS) if whole else None
            return plane_switch(x, *where, m, branch, scale, norm, backend=backend)

        return call

    def reference(x: Tensor, branch=None, scale=None, weight=None, bias=None):
        return plane_switch_ref(x, *where, m, branch, scale, Norm(weight, bias, EPS) if whole else None)

    def separate(x: Tensor, branch=None, scale=None, weight=None, bias=None):
        if not whole:
            return peers.separate_passes(x, *where, pool_method)
        changed = peers.separate_passes(x + branch * scale, *where, pool_method)
        return changed, F.layer_norm(changed, (channels,), weight, bias, EPS)

    tensors = {"x": (shape.batch * old.slices(sizes), GLOBALS + old.length(sizes), channels)}
    if whole:
        tensors |= {"branch": tensors["x"]} | {name: (channels,) for name in ("scale", "weight", "bias")}
    forward = rows[0] + rows[1]
    backward = 3 * rows[1] + 3 * rows[0]  # two gradients and the sum; branch to two gradients
    moved = forward if not whole else 2 * forward + (backward if step == TRAINING else 0)
    label = f"{shape.label}, {old} to {new}, {pool_method}, {'sum and norm' if whole else 'rows alone'}"
    return OpCell(
        "plane_switch", label, step, dtype, tensors,
        {OURS: ours, REFERENCE: fixed(reference), peers.SEPARATE: fixed(separate)}, moved=moved * channels,
    )  # fmt: skip


test_plane_switch = benchmark_of(cells)
