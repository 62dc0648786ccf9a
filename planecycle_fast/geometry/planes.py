"""The planes of a volume, cycles of planes, and the row maps between them.

A volume has three token axes, D, H and W (numbers 0, 1, 2). A *plane* says which axis is the batch
(one sequence per index) and which axes, row-major, make up one sequence (DESIGN: paper section 2.1):

    plane   batch axis   sequence        sequences P   length L
    HW      D            (H, W)          D             H*W
    DW      H            (D, W)          H             D*W
    DH      W            (D, H)          W             D*H
    DHW     none         (D, H, W)       1             D*H*W

*Plane order* is the tensor ``(B*P, g + L, C)``, contiguous, the g global tokens of a sequence first.
``HW`` order is what a 2D ViT sees slice by slice, and is called canonical.

`Plane.axes` is the one place that says so. Everything that moves rows derives from it: the reference by
`permutation`, kernels and C++ code by `row_map`, the same map as an affine function of coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = ("D", "H", "W")
Sizes = Sequence[int]  # (D, H, W) in tokens


@dataclass(frozen=True)
class Plane:
    """One way to cut a volume into sequences. Use the instances `HW`, `DW`, `DH`, `DHW`."""

    name: str
    batch: tuple[int, ...]  # the one batch axis, or nothing
    sequence: tuple[int, ...]  # the axes of one sequence, row-major; also the RoPE axes

    @property
    def axes(self) -> tuple[int, ...]:
        """The three axes, slowest first, in which this plane's order visits the patches."""
        return self.batch + self.sequence

    def slices(self, sizes: Sizes) -> int:
        """P, the number of sequences per volume of `sizes` = (D, H, W) tokens."""
        return sizes[self.batch[0]] if self.batch else 1

    def grid(self, sizes: Sizes) -> tuple[int, ...]:
        """(n0, n1), or (n0, n1, n2) for DHW: the sizes of one sequence's axes."""
        return tuple([sizes[a] for a in self.sequence])

    def ordered(self, sizes: Sizes) -> tuple[int, int, int]:
        """`sizes` = (D, H, W) in the order of this plane's `axes`."""
        slowest, middle, fastest = self.axes
        return sizes[slowest], sizes[middle], sizes[fastest]

    def length(self, sizes: Sizes) -> int:
        """L, the number of patches in one sequence."""
        return math.prod(self.grid(sizes))

    def __str__(self) -> str:
        return self.name


HW = Plane("HW", (0,), (1, 2))
DW = Plane("DW", (1,), (0, 2))
DH = Plane("DH", (2,), (0, 1))
DHW = Plane("DHW", (), (0, 1, 2))
PLANES = {p.name: p for p in (HW, DW, DH, DHW)}
DEFAULT_CYCLE = ("HW", "DW", "DH", "HW")  # paper section 2.3


def parse_plane(plane: str | Plane, argument: str = "plane") -> Plane:
    """The plane called `plane`. Raises TypeError or ValueError, naming `argument`."""
    if isinstance(plane, Plane) and (PLANES.get(plane.name) is plane or plane in PLANES.values()):
        return plane
    if not isinstance(plane, (str, Plane)):
        raise TypeError(f"{argument} must be the name of a plane, got {type(plane).__name__} {plane!r}")
    if plane not in PLANES:
        raise ValueError(f"{argument} must be one of {', '.join(PLANES)}, got {plane!r}")
    return PLANES[plane]


def parse_cycle(cycle_order: str | Sequence[str | Plane]) -> tuple[Plane, ...]:
    """Planes of a cycle, of any length, repeated over a network's layers.

    Args:
        cycle_order: names in order, ``("HW", "DW", "DH", "HW")``, or one string ``"HW,DW,DH,HW"``.

    Raises:
        TypeError: not a sequence of names.
        ValueError: an empty cycle or an unknown plane.
    """
    if isinstance(cycle_order, str):
        cycle_order = [name.strip() for name in cycle_order.split(",")] if cycle_order.strip() else []
    if not isinstance(cycle_order, Sequence):
        raise TypeError(
            f"cycle_order must be a sequence of plane names, got {type(cycle_order).__name__} {cycle_order!r}"
        )
    if len(cycle_order) == 0:
        raise ValueError("cycle_order must name at least one plane, got an empty cycle")
    return tuple(parse_plane(plane, f"cycle_order[{i}]") for i, plane in enumerate(cycle_order))


def permutation(old: Plane, new: Plane) -> tuple[int, ...]:
    """How to permute patches (B, *old.ordered(sizes), C) into (B, *new.ordered(sizes), C)."""
    return (0, *[1 + old.axes.index(axis) for axis in new.axes], 4)


@dataclass(frozen=True)
class RowMap:
    """Where each patch row of a new plane comes from, as an affine function of its coordinates.

    New row (i0, i1, i2), the coordinates along the new plane's `axes`, is old row
    ``offset + i0*strides[0] + i1*strides[1] + i2*strides[2]``. Rows are counted within one volume,
    over all ``P * (g + L)`` rows of the old plane, globals included. Multiply by C only in 64 bits:
    a volume has more than 2^31 elements before it fills a large GPU.
    """

    sizes: tuple[int, int, int]  # of the new plane's axes, slowest first
    strides: tuple[int, int, int]  # in old rows
    offset: int  # = g: the first patch follows the first sequence's globals

    def index(self, device: torch.device | str = "cpu") -> Tensor:
        """Old row of each new patch row, new rows in order: int64, shape (D*H*W,)."""
        steps = [torch.arange(n, device=device) * s for n, s in zip(self.sizes, self.strides)]
        return (self.offset + steps[0][:, None, None] + steps[1][:, None] + steps[2]).flatten()


def row_map(old: Plane, new: Plane, sizes: Sizes, num_globals: int = 0) -> RowMap:
    """The map from `new`'s patch rows to `old`'s rows, for a volume of `sizes` = (D, H, W) tokens."""
    rows = 1
    stride = {}  # of each volume axis, in old rows
    for axis in reversed(old.sequence):
        stride[axis] = rows
        rows *= sizes[axis]
    for axis in old.batch:  # one step along the batch axis skips a sequence and its globals
        stride[axis] = num_globals + rows
    return RowMap(
        sizes=new.ordered(sizes),
        strides=new.ordered([stride[axis] for axis in range(3)]),
        offset=num_globals,
    )
