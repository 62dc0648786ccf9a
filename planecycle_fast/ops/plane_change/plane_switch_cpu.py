"""plane_switch on backend "cpu": csrc/plane_switch.cpp with all its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...geometry.planes import PLANES, Plane, Sizes
from ...geometry.pooling import Transition
from ..native_ops import register
from ..registry import linear


def _fake(x: Tensor, old: str, new: str, sizes: list[int], num_globals: int, *_: object) -> Tensor:
    before, after = PLANES[old], PLANES[new]
    sequences = x.shape[0] // before.slices(sizes) * after.slices(sizes)
    return x.new_empty(sequences, num_globals + after.length(sizes), x.shape[2])


def _adjoint(
    old: str, new: str, sizes: list[int], num_globals: int, via: int, mean: bool, transposed: bool
) -> tuple[Any, ...]:
    return new, old, sizes, num_globals, via, mean, not transposed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _switch(grad.contiguous(), *_adjoint(*ctx.arguments)), *[None] * 7


def _more_volumes(function: Callable[..., Tensor], in_dim: int, x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    many = x.movedim(in_dim, 0)  # (V, B*P1, g + L1, C)
    out = function(many.flatten(0, 1).contiguous(), *arguments)
    return out.unflatten(0, (len(many), out.shape[0] // max(len(many), 1))), 0


def _vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    return _more_volumes(OP, in_dims[0], x, *arguments)


OP = register("plane_switch", fake=_fake, setup_context=_setup_context, backward=_backward, vmap=_vmap)
_switch = linear(OP, _adjoint, _more_volumes)


def plane_switch_cpu(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; copied first unless contiguous
    old: Plane,
    new: Plane,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`, contiguous
    """`plane_switch_ref` in one pass, with derivatives in forward and reverse mode, any number of times.

    Patches are bit for bit those of the reference; globals are summed in float64.
    """
    via = transition.num_prev if transition.via is None else transition.via
    return _switch(x.contiguous(), old.name, new.name, list(sizes), num_globals, via, transition.mean, False)
