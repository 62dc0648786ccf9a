"""rope: rotary position embedding of queries and keys, in the rotate-half layout of DINOv3; globals stay as they are.

Halves a and b of a head's channels become ``a*cos - b*sin`` and ``b*cos + a*sin``. Angles of a plane are separable:
each axis has a section of the channels for its own. They come as `angles.Tables` or `angles.Axial`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...geometry.rope import NORMALIZATIONS, Augmentation, Rope, section_sizes
from ...runtime.backends import pick
from .angles import Axial, Tables, rope_ref
from .rope_autograd import Turning


def rope(
    x: Tensor,  # (N, g + L, heads, hd), any strides; a packed (N, g + L, 3*heads, hd) too
    angles: Tables | Axial,
    num_globals: int,  # g
    turned: int | None = None,
    inplace: bool = False,
    in_table_dtype: bool = False,
    backend: str = "auto",
) -> Tensor:  # like x
    """`rope_ref` on the backend asked for; "triton" and "cpu" make one pass, with derivatives for x alone.

    Args:
        x: queries, keys, or both: heads are heads.
        angles: `Tables`, or the `Axial` settings that they are made from.
        turned: how many heads turn, the first ones; the others stay as they are. None: all.
        inplace: write into x and return it; only where autograd does not need x.
        in_table_dtype: compute in the tables' dtype even if it is narrower than x's, and round globals to it as well,
            as facebookresearch/dinov3 does.

    Raises:
        TypeError: x, a table or what else makes angles is not a floating-point tensor, or of the wrong kind.
        ValueError: shapes or dtypes that do not belong together, `inplace` on a tensor that needs a gradient or whose
            elements share memory, or a backend that is unknown or not usable. On "triton" and "cpu" also angles that
            need a gradient, on "triton" heads of more than 1024 channels and more than 2**30 rows or heads.
    """
    check_rope(x, angles, num_globals, turned, inplace)
    return rope_on(pick(backend, x.device, op="rope"), x, angles, num_globals, turned, inplace, in_table_dtype)


def rope_on(
    chosen: str,  # a backend that can be used
    x: Tensor,  # (N, g + L, heads, hd)
    angles: Tables | Axial,
    num_globals: int,
    turned: int | None = None,
    inplace: bool = False,
    in_table_dtype: bool = False,
) -> Tensor:  # like x
    """`rope` of what is known to belong together."""
    if chosen == "reference":
        return rope_ref(x, angles, num_globals, turned, inplace, in_table_dtype)
    return turning_on(chosen)(x, angles, num_globals, turned, inplace, in_table_dtype)


def turning_on(backend: str) -> Turning:
    """`rope` on "triton" or "cpu"."""
    if backend == "cpu":
        from .rope_cpu import rope_cpu as turning
    else:
        from .rope_triton import rope_triton as turning
    return turning


def check_rope(
    x: Tensor,  # as of `rope`
    angles: Tables | Axial,
    num_globals: int,
    turned: int | None = None,
    inplace: bool = False,
) -> None:
    """Raises TypeError or ValueError for arguments of `rope` that do not belong together."""
    check_angles(x, angles, num_globals)
    if turned is not None and not 0 <= turned <= x.shape[2]:
        raise ValueError(f"turned must be from 0 to the {x.shape[2]} heads of x, or None, got {turned}")
    if not inplace:
        return
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("inplace must be False for an x that needs a gradient, got True")
    if any([stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)]):
        raise ValueError(f"inplace must be False for an x whose elements share memory, got strides {x.stride()}")


def check_angles(
    x: Tensor,  # (N, g + L, heads, hd)
    angles: Tables | Axial,
    num_globals: int,
    name: str = "x",  # that the caller knows x by
) -> None:
    """Raises TypeError or ValueError for angles that are none, or not those of x, or for an x that cannot turn."""
    check_floating(name, x, x)
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"{name} must have shape (N, g + L, heads, hd) with an even hd, got {tuple(x.shape)}")
    if not 0 <= num_globals < x.shape[1]:
        raise ValueError(f"num_globals must be from 0 to less than the {x.shape[1]} rows of {name}, got {num_globals}")
    if isinstance(angles, Axial):
        _check_axial(x, angles, x.shape[1] - num_globals, name)
    elif isinstance(angles, Tables):
        _check_tables(x, *angles, x.shape[1] - num_globals, name)
    else:
        raise TypeError(f"angles must be ops.Tables or ops.Axial, got {type(angles).__name__}")


def _check_tables(x: Tensor, sin: Sequence[Tensor], cos: Sequence[Tensor], length: int, of: str) -> None:
    half = x.shape[3] // 2
    for name, tables in (("sin", sin), ("cos", cos)):
        if isinstance(tables, Tensor) or not isinstance(tables, Sequence) or not 1 <= len(tables) <= 3:
            raise ValueError(f"{name} must be a sequence of one to three tables, got {_shape(tables)}")
        for i, table in enumerate(tables):
            check_floating(f"{name}[{i}]", table, x, of)
            if table.ndim != 2:
                raise ValueError(f"{name}[{i}] must have shape (n, s), got {tuple(table.shape)}")
            if table.dtype != sin[0].dtype:
                raise ValueError(f"{name}[{i}] must have the dtype of sin[0], {sin[0].dtype}, got {table.dtype}")
    if [t.shape for t in sin] != [t.shape for t in cos]:
        raise ValueError(f"cos must have the shapes of sin, {_shape(sin)}, got {_shape(cos)}")
    if math.prod([t.shape[0] for t in sin]) != length or sum([t.shape[1] for t in sin]) != half:
        raise ValueError(
            f"sin must have tables (n, s) whose n multiply to L = {length} and whose s add up to hd/2 = {half}, "
            f"got {_shape(sin)}"
        )


def _check_axial(x: Tensor, axial: Axial, length: int, of: str) -> None:
    rope, grid, augmentation, _ = axial
    head_dim = x.shape[3]
    if not isinstance(rope, Rope):
        raise TypeError(f"angles.rope must be a planecycle_fast.geometry.rope.Rope, got {type(rope).__name__}")
    check_floating("angles.rope.periods", rope.periods, x, of)
    if rope.normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {rope.normalize!r}")
    if len(grid) not in (2, 3) or any([n < 1 for n in grid]) or math.prod(grid) != length:
        raise ValueError(f"angles.grid must have two or three sizes that multiply to L = {length}, got {tuple(grid)}")
    if rope.periods.ndim != 1 or rope.head_dim != head_dim:
        raise ValueError(
            f"angles.rope.periods must have shape (hd/4,) for hd = {head_dim}, got {tuple(rope.periods.shape)}"
        )
    section_sizes(head_dim, len(grid))
    if augmentation is None:
        return
    if not isinstance(augmentation, Augmentation):
        raise TypeError(f"angles.augmentation must be a rope.Augmentation or None, got {type(augmentation).__name__}")
    for name, size in (("shift", len(grid)), ("jitter", len(grid)), ("rescale", 1)):
        drawn = getattr(augmentation, name)
        if drawn is None:
            continue
        check_floating(f"angles.augmentation.{name}", drawn, x, of)
        if tuple(drawn.shape) != (size,) or drawn.dtype != rope.coord_dtype:
            raise ValueError(
                f"angles.augmentation.{name} must have shape ({size},) and dtype {rope.coord_dtype}, "
                f"got {tuple(drawn.shape)}, {drawn.dtype}"
            )


def check_floating(name: str, t: object, x: Tensor, of: str = "x") -> None:
    """Raises TypeError or ValueError unless t is a floating-point tensor on the device of x, known as `of`."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {t.device}")


def _shape(tables: object) -> object:
    if isinstance(tables, Tensor):
        return tuple(tables.shape)
    return [tuple(t.shape) for t in tables] if isinstance(tables, Sequence) else type(tables).__name__
