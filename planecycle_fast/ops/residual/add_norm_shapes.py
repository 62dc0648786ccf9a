"""Where the rows of add_norm are, before and after a change of planes, and how many programs of a kernel write them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry.planes import PLANES, Plane, row_map
from ...geometry.pooling import Transition


def promoted(
    x: Tensor,  # (..., C)
    branch: Tensor | None,  # (..., C)
    scale: Tensor | None,  # (C,)
) -> torch.dtype:
    """The dtype of ``x + scale * branch``."""
    dtype = x.dtype
    for t in (branch, scale):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


class Shapes(NamedTuple):
    """A change of planes, in rows of contiguous tensors."""

    old: Plane
    new: Plane
    sizes: list[int]  # (D, H, W) in tokens
    num_globals: int
    via: int
    pool: str  # "none" (g = 0), "bands" (PCg), "mean" (PCm)
    batch: int
    channels: int

    @classmethod
    def of(
        cls,
        rows: Tensor,  # (B*P, g + L, C), plane order of `plane`
        plane: str,
        old: str,
        new: str,
        sizes: list[int],
        num_globals: int,
        via: int,
        mean: bool,
    ) -> Shapes:
        """By tensors in the order of one of both planes."""
        batch = rows.shape[0] // PLANES[plane].slices(sizes)
        channels = int(rows.shape[2])  # a number, also where torch traces sizes: kernels are compiled for it
        pool = "none" if num_globals == 0 else "mean" if mean else "bands"
        return cls(PLANES[old], PLANES[new], sizes, num_globals, via, pool, batch, channels)

    @property
    def is_identity(self) -> bool:
        """Whether rows stay where and what they are. (Where M is the identity the caller gives no globals.)"""
        return self.old == self.new and self.num_globals == 0

    def rows(self, plane: Plane) -> tuple[int, int, int]:
        """The shape of tensors in a plane's order: (B*P, g + L, C)."""
        return self.batch * plane.slices(self.sizes), self.num_globals + plane.length(self.sizes), self.channels

    @property
    def arguments(self) -> tuple[int, ...]:
        """What kernels are given: num_globals, n0 to n2, x_volume to x_2, out_volume to out_0, num_in, num_out, via."""
        before, after, sizes, g = self.old, self.new, self.sizes, self.num_globals
        num_in, num_out = before.slices(sizes), after.slices(sizes)
        x_seq, out_seq = g + before.length(sizes), g + after.length(sizes)
        steps = zip(after.axes, row_map(before, after, sizes, g).strides)
        x_strides = [x_seq if axis in before.batch else rows for axis, rows in steps]
        n0, n1, n2 = after.ordered(sizes)
        out_0 = out_seq if after.batch else n1 * n2
        return (
            g, n0, n1, n2, num_in * x_seq, x_seq, *x_strides, num_out * out_seq, out_seq, out_0, num_in, num_out,
            self.via,
        )  # fmt: skip

    def patch_tiles(self, block_r: int) -> int:
        """Tiles of block_r patches, each within one plane of the slowest axis."""
        n0, n1, n2 = self.new.ordered(self.sizes)
        return self.batch * n0 * -(-n1 * n2 // block_r)

    def global_tiles(self, block_r: int, slices: int) -> int:
        """Tiles of globals: block_r tokens of one of so many slices, or for PCm one token of all of them."""
        if self.pool == "bands":
            return self.batch * slices * -(-self.num_globals // block_r)
        return self.batch * self.num_globals

    def moved(self, plane: Plane, slices: int | None = None) -> int:
        """Rows of all patches, and of the globals of so many slices; None: of a plane's."""
        slices = plane.slices(self.sizes) if slices is None else slices
        return self.batch * (math.prod(self.sizes) + self.num_globals * slices)

    @property
    def bands(self) -> int:
        """Slices of globals that are read per volume and token by all rows of M, of PCg, or of its transpose."""
        first, last = Transition(self.old.slices(self.sizes), self.new.slices(self.sizes), self.via).bands()
        return int((last - first + 1).sum())

    def check(self, programs: int) -> None:  # or tiles, where a program takes several
        """Raises ValueError for more than Triton kernels can count."""
        from ..plane_change.plane_switch_triton import _check_limits

        _check_limits(self.old, self.new, self.sizes, self.channels, self.num_globals, self.via, programs)
