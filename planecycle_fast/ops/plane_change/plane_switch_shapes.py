"""What a change of planes makes of shapes, whichever backend computes it: where rows are and how many programs of a
kernel write them, `Shapes`; and what torch is told of plane_switch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ...geometry.planes import PLANES, Plane, Sizes, row_map
from ...geometry.pooling import Transition
from ..tiles import LIMIT, MAX_PROGRAMS


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
        out_strides = (num_out * out_seq, out_seq, out_seq if after.batch else n1 * n2)
        return g, n0, n1, n2, num_in * x_seq, x_seq, *x_strides, *out_strides, num_in, num_out, self.via

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
        _check_limits(self.old, self.new, self.sizes, self.channels, self.num_globals, self.via, programs)


def _check_limits(
    before: Plane, after: Plane, sizes: list[int], channels: int, g: int, via: int, programs: int
) -> None:
    both = before.slices(sizes), after.slices(sizes)
    counted = [math.prod(sizes), channels]  # each by itself: torch.compile would remember which of them is the largest
    if g:  # 64-bit division, which longer products need, spills
        counted += [slices * other for slices in both for other in (g, via + 1)]
    if any([count > LIMIT for count in counted]) or programs > MAX_PROGRAMS:
        slices = max(both)
        raise ValueError(
            f"x is too large for backend 'triton': {tuple(sizes)} tokens of {channels} channels, {slices} slices of "
            f"{g} globals by way of {via}, {programs} programs; expected at most 2**30 tokens, channels and globals, "
            "2**30 as the product of slices where there are globals, and 2**31 - 1 programs"
        )


def fake(x: Tensor, old: str, new: str, sizes: list[int], num_globals: int, *_: object) -> Tensor:
    before, after = PLANES[old], PLANES[new]
    sequences = x.shape[0] // before.slices(sizes) * after.slices(sizes)
    return x.new_empty(sequences, num_globals + after.length(sizes), x.shape[2])


def adjoint(
    old: str, new: str, sizes: list[int], num_globals: int, via: int, mean: bool, transposed: bool
) -> tuple[Any, ...]:
    return new, old, sizes, num_globals, via, mean, not transposed


def call_of(switch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`plane_switch_ref` in one pass, by what `linear` gives for an operation.

    With derivatives in forward and reverse mode, any number of times. Patches are bit for bit those of the reference;
    globals are summed in float32 (float64 for float64, and on "cpu").

    It raises ValueError on "triton" for a volume of more than 2**30 tokens, channels or globals; with globals, more
    than 2**30 slices times those of the transition's step (32,767 by way of as many go); more than 2**31 - 1 programs.
    """

    def plane_switch(
        x: Tensor,  # (B*P1, g + L1, C), plane order of `old`, any strides
        old: Plane,
        new: Plane,
        sizes: Sizes,  # (D, H, W) in tokens
        num_globals: int,  # g
        transition: Transition,  # M, (P2, P1)
    ) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`, contiguous
        via = transition.num_prev if transition.via is None else transition.via
        return switch(x, old.name, new.name, list(sizes), num_globals, via, transition.mean, False)

    return plane_switch
