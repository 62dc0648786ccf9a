"""Turns the queries and keys of a packed qkv where they are, although autograd follows it.

Out of place `rope` would write the values too, or leave them alone in a tensor three times their size. In place is
right for autograd as well, for what a linear layer returned: the layer's gradient needs its input, not its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import check_fixed
from .rope import Axial, Tables


class _Within(torch.autograd.Function):
    """Heads of q, k and v, the first two of them turned; one gradient for all three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, backend: str, arguments: tuple) -> tuple[Tensor, ...]:
        ctx.backend, ctx.arguments = backend, arguments
        own = qkv.detach()  # the same memory and version: whoever kept it for its gradient hears of the change
        _operations(backend)[1](own, *arguments)
        return own.split(heads, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turn, turn_in_place = _operations(ctx.backend)
        back, *rest = ctx.arguments
        grad = torch.cat(grads, 2)
        if torch.is_grad_enabled():  # it is differentiated again
            return turn(grad, not back, *rest), None, None, None
        turn_in_place(grad, not back, *rest)
        return grad, None, None, None


def _operations(backend: str) -> tuple[Any, Any]:
    """Out of place, and in place."""
    if backend == "cpu":
        from .rope_cpu import IN_PLACE, OP
    else:
        from .rope_autograd import IN_PLACE, OP
    return OP, IN_PLACE


def rope_within(
    qkv: Tensor,  # (N, g + L, 3*heads, hd), contiguous, with a gradient; changed
    angles: Tables | Axial,
    num_globals: int,  # g
    in_table_dtype: bool,
    backend: str,  # "triton" or "cpu"
) -> tuple[Tensor, ...]:  # q, k, v (N, g + L, heads, hd), views of qkv
    """`rope` of the queries and keys of what a linear layer has just returned, and nobody else holds.

    Differentiable for qkv, any number of times. Raises ValueError for angles that need a gradient.
    """
    if backend == "cpu":
        from .rope_cpu import arguments_of
    else:
        from .rope_autograd import arguments_of
    heads = qkv.shape[2] // 3
    arguments = arguments_of(qkv, angles, num_globals, 2 * heads, in_table_dtype)
    check_fixed(arguments, backend)
    return _Within.apply(qkv, heads, backend, arguments)
