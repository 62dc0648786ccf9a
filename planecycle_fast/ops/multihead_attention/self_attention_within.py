"""Self-attention of a packed qkv whose queries and keys are turned where they are, although autograd follows it.

For more rows than one tile, where turning keys again for each tile of queries is slow: what a linear layer returned is
turned in place, as `rope_within` does it, and backward writes one packed gradient, turned back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import refuse_transforms
from ..rotary.angles import Axial, Tables
from ..rotary.rope import turning_on
from ..rotary.rope_autograd import check_fixed
from .self_attention_autograd import aligned, product_precision, table_arguments
from .self_attention_backward_triton import BACKWARD
from .self_attention_triton import OP


class _SelfAttentionWithin(torch.autograd.Function):
    """Context of heads of q, k and v; one gradient for all three."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, turning: tuple[Any, ...], tables: tuple[Any, ...], scale: float, num_globals: int,
        in_table_dtype: bool,
    ) -> Tensor:  # fmt: skip
        own = qkv.detach()  # the same memory and version: whoever kept it for its gradient hears of the change
        turning_on("triton").in_place(own, *turning)
        grid, sin, cos = tables
        precision = product_precision(qkv.dtype)
        out, lse = OP(own, None, None, scale, num_globals, grid, sin, cos, "", in_table_dtype, True, precision)
        ctx.save_for_backward(qkv, out, lse, *sin, *cos)  # as it is now; not `own`, whose gradient nobody would miss
        ctx.settings = scale, num_globals, grid, in_table_dtype, precision
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, *tables = ctx.saved_tensors
        scale, num_globals, grid, in_table_dtype, precision = ctx.settings
        sin, cos = tables[: len(grid)], tables[len(grid) :]
        turns = (num_globals, grid, sin, cos, "", "qk", in_table_dtype, precision)
        [found] = BACKWARD(aligned(grad), qkv, None, None, out, lse, scale, *turns)
        return found, None, None, None, None, None


def self_attention_within(
    qkv: Tensor,  # (N, g + L, 3*heads, hd), contiguous, with a gradient; changed
    angles: Tables | Axial,  # what queries and keys turn by
    tables: Tables,  # the same as tables, by which their gradients are turned back
    num_globals: int,  # g
    scale: float,  # of scores
    in_table_dtype: bool,  # as of `ops.rope`
) -> Tensor:  # (N, g + L, heads, hd), contiguous
    """`self_attention` of what a linear layer has just returned, and nobody else holds, on Triton's kernels.

    Differentiable for qkv, once. Raises ValueError for angles that need a gradient, NotImplementedError for forward
    mode, torch.func's transforms and whoever differentiates twice.
    """
    refuse_transforms("self_attention")
    turning = turning_on("triton").arguments_of(qkv, angles, num_globals, 2 * (qkv.shape[2] // 3), in_table_dtype)
    by = table_arguments(tables)
    check_fixed((*turning, *by), "triton")
    return _SelfAttentionWithin.apply(qkv, turning, by, scale, num_globals, in_table_dtype)
