"""add_norm in reverse mode, for every backend: what is kept for backward, and what comes of its operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """As `torch.library.register_autograd` takes it."""
    x, branch, scale, weight, bias, *settings = inputs
    out, _, mean, rstd = output
    needs_scale, needs_weight, needs_bias = [needed for needed in ctx.needs_input_grad[2:5]]
    old, new, _, num_globals = settings[:4]
    ctx.kept = branch is not None or old != new or num_globals > 0
    y = out if ctx.kept else x  # what was normalised
    ctx.save_for_backward(y, mean, rstd, weight, branch if needs_scale else None, scale)
    ctx.settings, ctx.wanted = settings, [needs_scale, needs_weight, needs_bias]
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, scale, weight, bias)]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def backward_by(operation: Callable[..., tuple[Tensor, Tensor | None, Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """The same, of a backend's ``add_norm_backward``."""

    def backward(ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, *_: None) -> tuple[Any, ...]:
        y, mean, rstd, weight, branch, scale = ctx.saved_tensors
        old, new, sizes, num_globals, via, pooled, norm, _, _ = ctx.settings
        x_dtype, branch_dtype, *vectors = ctx.dtypes
        if not ctx.kept:  # there is no sum but x
            grad = None
        if norm == "none" or grad_normed is None:
            norm, grad_normed = "none", None
        if grad is None and grad_normed is None:
            return (None,) * 14
        wanted = [ctx.wanted[0], *[needed and norm != "none" for needed in ctx.wanted[1:]]]
        alike = scale is None and branch_dtype == x_dtype  # one gradient is both
        of_branch = branch_dtype if ctx.needs_input_grad[1] and not alike else None
        sums_dtype = torch.float32
        for dtype in vectors:
            sums_dtype = sums_dtype if dtype is None else torch.promote_types(sums_dtype, dtype)
        grads = [None if g is None else g.contiguous() for g in (grad, grad_normed)]
        grad_x, grad_branch, sums = operation(
            *grads, y, mean, rstd, weight, branch, scale, old, new, sizes, num_globals, via, pooled, norm, wanted,
            x_dtype, of_branch, sums_dtype,
        )  # fmt: skip
        rows = iter(sums)
        found = [next(rows).to(dtype) if one else None for one, dtype in zip(wanted, vectors)]
        if of_branch is None:
            grad_branch = grad_x if ctx.needs_input_grad[1] else None
        return grad_x, grad_branch, *found, *[None] * 9

    return backward
