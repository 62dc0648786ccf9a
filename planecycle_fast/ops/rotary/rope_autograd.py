"""rope on backend "triton" as torch knows it: an operation and its twin in place, and the public call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...runtime.tracing import transforms_active
from ..registration import register
from ..registry import Cost, check_fixed, linear
from .rope import Axial, Tables
from .rope_triton import _rope, _rope_, keeps_globals


def _adjoint(back: bool, *rest: Any) -> tuple[Any, ...]:
    return not back, *rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    nothing = [[None] * len(a) if _is_tensors(a) else None for a in ctx.arguments]  # as torch wants it for lists
    return _turn(grad, *_adjoint(*ctx.arguments)), *nothing


def _is_tensors(argument: object) -> bool:
    return isinstance(argument, list) and all([isinstance(item, Tensor) for item in argument])  # [None, t] is none


def _more_sequences(
    function: Callable[..., Tensor], in_dim: int | None, x: Tensor, *arguments: Any
) -> tuple[Tensor, int]:
    sin, cos, periods, augmentation = arguments[5:9]
    several = [t.ndim != 2 for t in (*sin, *cos)] + [t.ndim != 1 for t in (*periods, *augmentation) if t is not None]
    if in_dim is None or any(several):
        raise ValueError("angles must be the same for all of a vmap on backend 'triton'; use backend='reference'")
    many = x.movedim(in_dim, 0)  # (V, N, g + L, heads, hd)
    return function(many.flatten(0, 1), *arguments).unflatten(0, many.shape[:2]), 0


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    return _more_sequences(OP, in_dims[0], x, *arguments)


def _cost(x: Tensor, *_: object) -> Cost:
    return Cost(x.nbytes, x.nbytes, launches=1 if x.numel() else 0)


def _cost_in_place(x: Tensor, back: bool, num_globals: int, turned: int, in_table_dtype: bool, *rest: Any) -> Cost:
    rows = x.shape[1] - (num_globals if keeps_globals(x.dtype, in_table_dtype, rest[-1]) else 0)
    moved = x.shape[0] * rows * turned * x.shape[3] * x.element_size()
    return Cost(moved, moved, launches=1 if x.numel() and turned else 0)


OP = register(
    _rope, fake=lambda x, *_: x.new_empty(x.shape), setup_context=_setup_context, backward=_backward, vmap=_vmap,
    cost=_cost,
)  # fmt: skip
IN_PLACE = register(_rope_, fake=lambda x, *_: None, mutates=("x",), cost=_cost_in_place)
_turn = linear(OP, _adjoint, _more_sequences)


def arguments_of(
    x: Tensor, angles: Tables | Axial, num_globals: int, turned: int | None, in_table_dtype: bool
) -> tuple[Any, ...]:
    """What the operations take after x."""
    turned = x.shape[2] if turned is None else turned
    if isinstance(angles, Axial) and angles.rope.narrows:  # kernels know wider periods only
        angles = angles.tables()
    if isinstance(angles, Tables):
        sin, cos = [[t if t.stride() == (t.stride(0), 1) else t.contiguous() for t in ts] for ts in angles]
        if [t.stride() for t in sin] != [t.stride() for t in cos]:
            sin, cos = [[t.contiguous() for t in ts] for ts in (sin, cos)]
        dtype = sin[0].dtype
        rest: tuple[Any, ...] = [t.shape[0] for t in sin], sin, cos, [], [], "", False, False, dtype, dtype
    else:
        rope, augmentation = angles.rope, angles.augmentation
        periods = [p.contiguous() for p in angles.periods or rope.axis_periods(len(angles.grid))]
        drawn = [] if augmentation is None else [augmentation.shift, augmentation.jitter, augmentation.rescale]
        drawn = [t if t is None else t.contiguous() for t in drawn]
        table_dtype = rope.table_dtype or torch.promote_types(rope.coord_dtype, rope.periods.dtype)
        settings = (rope.normalize, rope.periods_are_inverse, rope.promote_coords, rope.coord_dtype, table_dtype)
        rest = list(angles.grid), [], [], periods, drawn, *settings
    return False, num_globals, turned, in_table_dtype, *rest


def rope_triton(
    x: Tensor,  # (N, g + L, heads, hd), any strides
    angles: Tables | Axial,
    num_globals: int,  # g
    turned: int | None,
    inplace: bool,
    in_table_dtype: bool,
) -> Tensor:  # like x, contiguous; x itself in place
    """`rope_ref` in one launch, with derivatives in forward and reverse mode, any number of times, for x alone.

    Raises:
        ValueError: angles that need a gradient; more than 2**30 rows or heads, 1024 channels of a head or 2**31 - 1
            programs.
    """
    arguments = arguments_of(x, angles, num_globals, turned, in_table_dtype)
    check_fixed(arguments, "triton")
    if not inplace:
        return _turn(x, *arguments)
    if transforms_active():  # which see what happens to x only if torch writes it
        return x.copy_(_turn(x, *arguments))
    IN_PLACE(x, *arguments)
    return x
