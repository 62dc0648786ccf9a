"""rope on backend "cpu": csrc/rope.cpp, which takes tables; an operation, its twin in place, and the public call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...runtime.tracing import transforms_active
from ..native_ops import register
from ..registry import check_fixed, linear
from .rope import Axial, Tables


def _adjoint(back: bool, *rest: Any) -> tuple[Any, ...]:
    return not back, *rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    nothing = [[None] * len(a) if isinstance(a, (list, tuple)) and _holds_tensors(a) else None for a in ctx.arguments]
    return _turn(dense(grad), *_adjoint(*ctx.arguments)), *nothing


def _holds_tensors(values: Any) -> bool:
    return all([value is None or isinstance(value, Tensor) for value in values])


def _more_sequences(
    function: Callable[..., Tensor], in_dim: int | None, x: Tensor, *arguments: Any
) -> tuple[Tensor, int]:
    if in_dim is None or any([t.ndim != 2 for t in (*arguments[5], *arguments[6])]):
        raise ValueError("angles must be the same for all of a vmap on backend 'cpu'; use backend='reference'")
    many = x.movedim(in_dim, 0)  # (V, N, g + L, heads, hd)
    return function(dense(many.flatten(0, 1)), *arguments).unflatten(0, many.shape[:2]), 0


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    return _more_sequences(OP, in_dims[0], x, *arguments)


def dense(t: Tensor) -> Tensor:  # (..., hd)
    """Itself where channels are next to each other, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


OP = register(
    "rope", fake=lambda x, *_: x.new_empty(x.shape), setup_context=_setup_context, backward=_backward, vmap=_vmap
)
IN_PLACE = register("rope_", fake=lambda x, *_: None)
_turn = linear(OP, _adjoint, _more_sequences)


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
        return _turn(dense(x), *arguments)
    if transforms_active() or x.stride(-1) != 1:
        return x.copy_(_turn(dense(x), *arguments))
    IN_PLACE(x, *arguments)
    return x
