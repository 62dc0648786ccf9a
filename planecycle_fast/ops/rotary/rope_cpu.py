"""rope on backend "cpu": csrc/rope.cpp, which takes tables; an operation, its twin in place, and the public call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...runtime.tracing import transforms_active
from ..native_ops import register
from ..registry import linear
from .angles import Axial, Tables
from .rope_autograd import adjoint, check_fixed, vmap_by


def dense(t: Tensor) -> Tensor:  # (..., hd)
    """Itself where channels are next to each other, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


OP, _turn = linear(register, "rope", adjoint, vmap_by("cpu"), taken=dense, fake=lambda x, *_: x.new_empty(x.shape))
IN_PLACE = register("rope_", fake=lambda x, *_: None)


def arguments_of(
    x: Tensor, angles: Tables | Axial, num_globals: int, turned: int | None, in_table_dtype: bool
) -> tuple[Any, ...]:
    """What the operations take after x. Tables are made here of what they can be made of."""
    sin, cos = angles.tables() if isinstance(angles, Axial) else angles
    dtype = sin[0].dtype
    rest: tuple[Any, ...] = [t.shape[0] for t in sin], list(sin), list(cos), [], [], "", False, False, dtype, dtype
    return False, num_globals, x.shape[2] if turned is None else turned, in_table_dtype, *rest


def rope_cpu(
    x: Tensor,  # (N, g + L, heads, hd); copied first unless channels are next to each other
    angles: Tables | Axial,
    num_globals: int,  # g
    turned: int | None,
    inplace: bool,
    in_table_dtype: bool,
) -> Tensor:  # like x, contiguous; x itself in place
    """`rope_ref` in one pass, with derivatives in forward and reverse mode, any number of times, for x alone.

    Raises ValueError for angles that need a gradient.
    """
    arguments = arguments_of(x, angles, num_globals, turned, in_table_dtype)
    check_fixed(arguments, "cpu")
    if not inplace:
        return _turn(x, *arguments)
    if transforms_active() or x.stride(-1) != 1:
        return x.copy_(_turn(x, *arguments))
    IN_PLACE(x, *arguments)
    return x
