"""Turns the queries and keys of a packed qkv where they are, although autograd follows it.

Out of place `rope` would write the values too, or leave them alone in a tensor three times their size. In place is
right for autograd as well, for what a linear layer returned: the layer's gradient needs its input, not its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .angles import Axial, Tables
from .rope import turning_on
from .rope_autograd import Turning, check_fixed


class _Within(torch.autograd.Function):
    """Heads of q, k and v, the first two of them turned; one gradient for all three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, by: Turning, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        ctx.by, ctx.arguments = by, arguments
        own = qkv.detach()  # the same memory and version: whoever kept it for its gradient hears of the change
        by.in_place(own, *arguments)
        return own.split(heads, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, *rest = ctx.arguments
        grad = torch.cat(grads, 2)
        if torch.is_grad_enabled():  # it is differentiated again
            return ctx.by.turn(grad, not back, *rest), None, None, None
        ctx.by.in_place(grad, not back, *rest)
        return grad, None, None, None


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
    by, heads = turning_on(backend), qkv.shape[2] // 3
    arguments = by.arguments_of(qkv, angles, num_globals, 2 * heads, in_table_dtype)
    check_fixed(arguments, backend)
    return _Within.apply(qkv, heads, by, arguments)
