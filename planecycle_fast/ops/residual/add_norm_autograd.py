"""What torch is told of add_norm, which is plane_switch in full, whichever backend computes it; and how it is called.

Outputs without data, what is kept for backward and what comes of it, and the calls that the public functions make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...geometry.planes import HW, Plane, Sizes
from ...geometry.pooling import Transition
from ..plane_change.plane_switch_shapes import Shapes
from ..registry import refuse_transforms
from .norm import Norm


def outputs(
    x: Tensor,  # (B*P1, g + L1, C)
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    shapes: Shapes,
    norm: str,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operation returns, uninitialised."""
    summed = x.dtype
    for t in (branch, scale):
        summed = summed if t is None else torch.promote_types(summed, t.dtype)
    statistics = torch.float64 if summed == torch.float64 else torch.float32
    rows, nothing = shapes.rows(shapes.new), (0,)
    return (
        x.new_empty(nothing if shapes.is_identity and branch is None else rows, dtype=summed),
        x.new_empty(nothing if norm == "none" else rows, dtype=dtype or summed),
        x.new_empty(rows[:2] if norm == "layer" else nothing, dtype=statistics),
        x.new_empty(nothing if norm == "none" else rows[:2], dtype=statistics),
    )


def gradients(
    y: Tensor,  # (B*P2, g + L2, C)
    shapes: Shapes,
    vectors: int,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operation's backward returns, uninitialised."""
    rows = shapes.rows(shapes.old)
    grad_branch = y.new_empty((0,) if branch_dtype is None else rows, dtype=branch_dtype or x_dtype)
    return y.new_empty(rows, dtype=x_dtype), grad_branch, y.new_empty((vectors, y.shape[2]), dtype=sums_dtype)


def fake(
    x: Tensor,  # (B*P1, g + L1, C)
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    *rest: Any,  # of the operation's arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, old, *where, norm, _, dtype = rest
    return outputs(x, branch, scale, Shapes.of(x, old, old, *where), norm, dtype)


def fake_backward(
    grad: Tensor | None,  # (B*P2, g + L2, C)
    grad_normed: Tensor | None,  # like grad
    y: Tensor,  # like grad
    *rest: Any,  # of the arguments of its backward
) -> tuple[Tensor, Tensor, Tensor]:
    old, new, *where, _, wanted, x_dtype, branch_dtype, sums_dtype = rest[5:]
    return gradients(y, Shapes.of(y, new, old, new, *where), sum(wanted), x_dtype, branch_dtype, sums_dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """As `torch.library.register_autograd` takes it."""
    x, branch, scale, weight, bias, *settings = inputs
    out, _, mean, rstd = output
    ctx.settings, ctx.wanted = settings, [*ctx.needs_input_grad[2:5]]  # gradients of scale, weight, bias
    old, new, _, num_globals = settings[:4]
    ctx.kept = branch is not None or old != new or num_globals > 0
    y = out if ctx.kept else x  # what was normalised
    ctx.save_for_backward(y, mean, rstd, weight, branch if ctx.wanted[0] else None, scale)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, scale, weight, bias)]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def backward_by(operation: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Any, ...]]:
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
        grad_x, of_its_own, sums = operation(
            *grads, y, mean, rstd, weight, branch, scale, old, new, sizes, num_globals, via, pooled, norm, wanted,
            x_dtype, of_branch, sums_dtype,
        )  # fmt: skip
        rows = iter(sums.unbind(0))
        found = [next(rows).to(dtype) if one else None for one, dtype in zip(wanted, vectors)]
        grad_branch = grad_x if of_branch is None else of_its_own
        return grad_x, grad_branch if ctx.needs_input_grad[1] else None, *found, *[None] * 9

    return backward


def calls_of(
    op: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], backend: str, rows_are_wide: bool
) -> tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], Callable[..., Tensor | tuple[Tensor, Tensor]]]:
    """`plane_switch_ref` in full, and the same where rows stay in place, by an operation.

    Both in one pass, contiguous, differentiable once, in reverse mode; they sum in float32 (float64 where anything is),
    round once and normalise what was rounded. They raise NotImplementedError for forward mode, transforms of
    torch.func and double backward.

    Args:
        rows_are_wide: whether rows that stay are those of a volume one token high, else of one that is one wide.
    """

    def boundary(
        x: Tensor,  # (B*P1, g + L1, C), plane order of `old`, any strides
        old: Plane,
        new: Plane,
        sizes: Sizes,  # (D, H, W) in tokens
        num_globals: int,  # g; 0 where M is the identity: globals are rows like others
        transition: Transition,  # M, (P2, P1)
        branch: Tensor | None = None,  # like x
        scale: Tensor | None = None,  # (C,)
        norm: Norm | None = None,
        norm_dtype: torch.dtype | None = None,  # None: of the sum
    ) -> Tensor | tuple[Tensor, Tensor]:  # (B*P2, g + L2, C), contiguous; with a norm: and its norm
        refuse_transforms("add_norm", backend)
        via = transition.num_prev if transition.via is None else transition.via
        kind = "none" if norm is None else "rms" if norm.rms else "layer"
        weight, bias, eps = (None, None, 0.0) if norm is None else norm[:3]
        tensors = [None if t is None else t.contiguous() for t in (x, branch, scale, weight, bias)]
        settings = (old.name, new.name, list(sizes), num_globals, via, transition.mean)
        out, normed, _, _ = op(*tensors, *settings, kind, eps, norm_dtype)
        if branch is None and old == new and num_globals == 0:
            out = x
        return out if norm is None else (out, normed)

    def add_rows(
        x: Tensor,  # (N, rows, C), any strides
        branch: Tensor | None,  # like x
        scale: Tensor | None,  # (C,)
        norm: Norm | None,
        norm_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # (N, rows, C); with a norm: and its norm
        sequences, rows, _ = x.shape
        slices = max(sequences, 1)  # a volume has at least one, of which there may be none
        sizes = (slices, 1, rows) if rows_are_wide else (slices, rows, 1)
        return boundary(x, HW, HW, sizes, 0, Transition(slices, slices), branch, scale, norm, norm_dtype)

    return boundary, add_rows
