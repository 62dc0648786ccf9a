"""add_norm on backend "cpu", and plane_switch in full: csrc/add_norm.cpp and csrc/add_norm_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...geometry.planes import HW, PLANES, Plane, Sizes
from ...geometry.pooling import Transition
from ..native_ops import register
from ..registry import refuse_second, refuse_transforms
from .add_norm import Norm
from .add_norm_reverse import backward_by, setup_context
from .add_norm_shapes import Shapes, promoted


def _fake(
    x: Tensor,  # (B*P1, g + L1, C)
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    old: str,
    new: str,
    sizes: list[int],
    num_globals: int,
    via: int,
    mean: bool,
    norm: str,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes, summed = Shapes.of(x, old, old, new, sizes, num_globals, via, mean), promoted(x, branch, scale)
    rows, nothing = shapes.rows(shapes.new), (0,)
    statistics = torch.float64 if summed == torch.float64 else torch.float32
    return (
        x.new_empty(nothing if shapes.is_identity and branch is None else rows, dtype=summed),
        x.new_empty(nothing if norm == "none" else rows, dtype=dtype or summed),
        x.new_empty(rows[:2] if norm == "layer" else nothing, dtype=statistics),
        x.new_empty(nothing if norm == "none" else rows[:2], dtype=statistics),
    )


def _backward_fake(
    grad: Tensor | None,  # (B*P2, g + L2, C)
    grad_normed: Tensor | None,  # like grad
    y: Tensor,  # like grad
    mean: Tensor,  # (B*P2, g + L2)
    rstd: Tensor,  # like mean
    weight: Tensor | None,  # (C,)
    branch: Tensor | None,  # (B*P1, g + L1, C)
    scale: Tensor | None,  # (C,)
    old: str,
    new: str,
    sizes: list[int],
    num_globals: int,
    via: int,
    mean_pooled: bool,
    norm: str,
    wanted: list[bool],
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Shapes.of(y, new, old, new, sizes, num_globals, via, mean_pooled).rows
    of_branch = y.new_empty((0,) if branch_dtype is None else rows(PLANES[old]), dtype=branch_dtype or x_dtype)
    sums = y.new_empty((sum(wanted), y.shape[2]), dtype=sums_dtype)
    return y.new_empty(rows(PLANES[old]), dtype=x_dtype), of_branch, sums


def _refuse(ctx: Any, *grads: Tensor) -> None:
    refuse_second("add_norm_backward", "cpu")


BACKWARD = register(
    "add_norm_backward", fake=_backward_fake, setup_context=lambda ctx, inputs, output: None, backward=_refuse
)
OP = register("add_norm", fake=_fake, setup_context=setup_context, backward=backward_by(BACKWARD))
IN_PLACE = register("add_norm_", fake=lambda x, branch, scale, weight, bias, norm, eps, normed: None)


def add_norm_cpu(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; like the branch copied first unless contiguous
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
    """`plane_switch_ref` in full, in one pass; differentiable once, in reverse mode.

    Sums in float32 (float64 where anything is), rounds once and normalises what was rounded.

    Raises NotImplementedError for forward mode, transforms of torch.func and double backward.
    """
    refuse_transforms("add_norm", "cpu")
    via = transition.num_prev if transition.via is None else transition.via
    kind, (weight, bias, eps) = "none", (None, None, 0.0)
    if norm is not None:
        kind, (weight, bias, eps) = "rms" if norm.rms else "layer", norm[:3]
    tensors = [None if t is None else t.contiguous() for t in (x, branch, scale, weight, bias)]
    settings = (old.name, new.name, list(sizes), num_globals, via, transition.mean)
    out, normed, _, _ = OP(*tensors, *settings, kind, eps, norm_dtype)
    if branch is None and old == new and num_globals == 0:
        out = x
    return out if norm is None else (out, normed)


def add_rows_cpu(
    x: Tensor,  # (N, rows, C), any strides
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    norm: Norm | None,
    norm_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, rows, C); with a norm: and its norm
    """`add_norm_cpu` where rows stay in place: of a volume N deep and `rows` high."""
    sequences, rows, _ = x.shape
    slices = max(sequences, 1)
    same = Transition(slices, slices)
    return add_norm_cpu(x, HW, HW, (slices, 1, rows), 0, same, branch, scale, norm, norm_dtype)


def add_norm_in_place(
    x: Tensor,  # (N, rows, C), contiguous; becomes the sum
    branch: Tensor,  # like x
    scale: Tensor | None,  # (C,)
    norm: Norm,
    normed: Tensor,  # like x, of any dtype; becomes the norm
) -> None:
    """`add_rows_cpu` into memory that is there, for inference.

    Raises ValueError where the sum's dtype is not x's.
    """
    kind = "rms" if norm.rms else "layer"
    IN_PLACE(x, branch.contiguous(), scale, norm.weight, norm.bias, kind, norm.eps, normed)
