"""What rope turns by, and its reference.

Angles come as `Tables`, one row per index of an axis (a host's dense table of one row per token is the case of a single
axis), or as `Axial`: what a kernel makes them from itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry.rope import Augmentation, Rope, Tables, dense_table


class Axial(NamedTuple):
    """Angles as `Rope.sincos` makes them, without a table: coordinates from sizes, divided by periods."""

    rope: Rope
    grid: Sequence[int]  # sizes of the plane's axes, two or three
    augmentation: Augmentation | None = None
    periods: Sequence[Tensor] | None = None  # `Rope.axis_periods` of these axes, where they are known already

    def tables(self) -> Tables:
        """The same as tables of each axis, to the bit of those of `Rope.sincos`."""
        return self.rope.axis_tables(self.grid, self.augmentation)


def rope_ref(
    x: Tensor,  # (N, g + L, heads, hd), any strides; a packed (N, g + L, 3*heads, hd) too
    angles: Tables | Axial,
    num_globals: int,  # g
    turned: int | None = None,
    inplace: bool = False,
    in_table_dtype: bool = False,
) -> Tensor:  # like x
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times unless in place.

    Computes in the dtype that x and the tables promote to, or in the tables' own, and rounds to x's.
    """
    if isinstance(angles, Axial):
        angles = angles.tables()
    half, dtype, table_dtype = x.shape[3] // 2, x.dtype, angles.sin[0].dtype
    compute = table_dtype if in_table_dtype else torch.promote_types(dtype, table_dtype)
    sin, cos = _rows(angles.sin), _rows(angles.cos)  # (L, 1, hd/2)
    turned = x.shape[2] if turned is None else turned
    heads = x[:, :, :turned]
    patches = heads[:, num_globals:].to(compute)
    a, b = patches[..., :half], patches[..., half:]
    first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    globals_ = heads[:, :num_globals]
    narrow = torch.promote_types(compute, dtype) != compute  # hosts that compute there round globals as well
    if not inplace:
        globals_ = globals_.to(compute).to(dtype) if narrow else globals_
        out = torch.cat([globals_, torch.cat([first, second], -1)], 1)
        return out if turned == x.shape[2] else torch.cat([out, x[:, :, turned:]], 2)
    heads[:, num_globals:, :, :half] = first
    heads[:, num_globals:, :, half:] = second
    if narrow:
        globals_.copy_(globals_.to(compute))
    return x


def _rows(tables: Sequence[Tensor]) -> Tensor:
    """One table of all tokens, (L, 1, hd/2), from those of the axes."""
    dense = tables[0] if len(tables) == 1 else dense_table(tables, [t.shape[0] for t in tables])
    return dense[:, None]
