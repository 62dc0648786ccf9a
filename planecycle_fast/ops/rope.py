"""rope: rotary position embedding of queries and keys, in the rotate-half layout of DINOv3; globals stay as they are.

Halves a and b of a head's channels become ``a*cos - b*sin`` and ``b*cos + a*sin``. Angles of a plane are separable:
each axis has a table of its own for its section of the channels, so small tables of one row per index are enough. A
host's dense table of one row per token is the case of a single axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import pick


def rope_ref(
    x: Tensor,  # (N, g + L, heads, hd), any strides; a packed (N, g + L, 3*heads, hd) sliced to its q and k too
    sin: Sequence[Tensor],  # per axis (n_i, s_i), L = product of n_i, sum of s_i = hd/2
    cos: Sequence[Tensor],  # like sin
    num_globals: int,  # g
    inplace: bool = False,
    in_table_dtype: bool = False,
) -> Tensor:  # like x
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times unless in place.

    Computes in the dtype that x and the tables promote to, or in the tables' own, and rounds to x's.
    """
    half, dtype = x.shape[3] // 2, x.dtype
    compute = sin[0].dtype if in_table_dtype else torch.promote_types(dtype, sin[0].dtype)
    sin, cos = _rows(sin), _rows(cos)  # (L, 1, hd/2)
    patches = x[:, num_globals:].to(compute)
    a, b = patches[..., :half], patches[..., half:]
    first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    globals_ = x[:, :num_globals]
    narrow = torch.promote_types(compute, dtype) != compute  # hosts that compute there round globals as well
    if not inplace:
        globals_ = globals_.to(compute).to(dtype) if narrow else globals_
        return torch.cat([globals_, torch.cat([first, second], -1)], 1)
    x[:, num_globals:, :, :half] = first
    x[:, num_globals:, :, half:] = second
    if narrow:
        globals_.copy_(globals_.to(compute))
    return x


def _rows(tables: Sequence[Tensor]) -> Tensor:
    """One table of all tokens, (L, 1, hd/2), from those of the axes."""
    if len(tables) == 1:
        return tables[0][:, None]
    grid = [len(table) for table in tables]
    wide = []
    for axis, table in enumerate(tables):
        shape = [1] * len(grid) + [table.shape[1]]
        shape[axis] = grid[axis]
        wide.append(table.view(shape).expand(*grid, -1))
    return torch.cat(wide, -1).flatten(0, -2)[:, None]


def rope(
    x: Tensor,  # (N, g + L, heads, hd), any strides; a packed (N, g + L, 3*heads, hd) sliced to its q and k too
    sin: Sequence[Tensor],  # per axis (n_i, s_i), L = product of n_i, sum of s_i = hd/2
    cos: Sequence[Tensor],  # like sin
    num_globals: int,  # g
    inplace: bool = False,
    in_table_dtype: bool = False,
    backend: str = "auto",
) -> Tensor:  # like x
    """`rope_ref` on the backend asked for.

    Args:
        x: queries, keys, or both: heads are heads.
        sin, cos: of the angles, one to three tables (`Rope.angles` makes them per axis), or one dense one.
        inplace: write into x and return it; only where autograd does not need x.
        in_table_dtype: compute in the tables' dtype even if it is narrower than x's, and round globals to it as well,
            as facebookresearch/dinov3 does.

    Raises:
        TypeError: x or a table is not a floating-point tensor.
        ValueError: shapes that do not belong together, `inplace` on a tensor that needs a gradient, or a backend that
            is unknown or not usable.
    """
    _check(x, sin, cos, num_globals, inplace)
    pick(backend, x.device, op="rope")
    return rope_ref(x, sin, cos, num_globals, inplace, in_table_dtype)


def _check(x: Tensor, sin: Sequence[Tensor], cos: Sequence[Tensor], num_globals: int, inplace: bool) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"x must have shape (N, g + L, heads, hd) with an even hd, got {tuple(x.shape)}")
    if num_globals < 0:
        raise ValueError(f"num_globals must be at least 0, got {num_globals}")
    for name, tables in (("sin", sin), ("cos", cos)):
        if isinstance(tables, Tensor) or not isinstance(tables, Sequence) or not 1 <= len(tables) <= 3:
            raise ValueError(f"{name} must be a sequence of one to three tables, got {_shape(tables)}")
        for i, table in enumerate(tables):
            if not isinstance(table, Tensor) or not table.is_floating_point():
                got = getattr(table, "dtype", type(table).__name__)
                raise TypeError(f"{name}[{i}] must be a floating-point tensor, got {got}")
            if table.ndim != 2:
                raise ValueError(f"{name}[{i}] must have shape (n, s), got {tuple(table.shape)}")
    if [t.shape for t in sin] != [t.shape for t in cos]:
        raise ValueError(f"cos must have the shapes of sin, {_shape(sin)}, got {_shape(cos)}")
    expected, half = x.shape[1] - num_globals, x.shape[3] // 2
    if math.prod([len(t) for t in sin]) != expected or sum([t.shape[1] for t in sin]) != half:
        raise ValueError(
            f"sin must have tables (n, s) whose n multiply to L = {expected} and whose s add up to hd/2 = {half}, "
            f"got {_shape(sin)}"
        )
    if inplace and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("inplace must be False for an x that needs a gradient, got True")


def _shape(tables: object) -> object:
    if isinstance(tables, Tensor):
        return tuple(tables.shape)
    return [tuple(t.shape) for t in tables] if isinstance(tables, Sequence) else type(tables).__name__
