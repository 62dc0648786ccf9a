"""add_norm on backend "triton" as torch knows it: two registered operations, what each moves, and the public call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...geometry.planes import HW, Plane, Sizes
from ...geometry.pooling import Transition
from ..registration import register, register_backward
from ..registry import Cost, refuse_transforms
from .add_norm import Norm
from .add_norm_backward_triton import _add_norm_backward, gradients
from .add_norm_reverse import backward_by, setup_context
from .add_norm_shapes import Shapes
from .add_norm_triton import _add_norm, outputs


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
    return outputs(x, branch, scale, Shapes.of(x, old, old, new, sizes, num_globals, via, mean), norm, dtype)


def _cost(x: Tensor, branch: Tensor | None, scale: Tensor | None, *rest: Any) -> Cost:
    _, _, old, new, sizes, num_globals, via, mean, norm, _, dtype = rest
    shapes = Shapes.of(x, old, old, new, sizes, num_globals, via, mean)
    read = shapes.moved(shapes.old, None if shapes.pool == "mean" else shapes.bands if num_globals else 0)
    size = sum([t.element_size() for t in (x, branch) if t is not None])
    branch, scale = [t if t is None else t.to("meta") for t in (branch, scale)]
    made = outputs(x.to("meta"), branch, scale, shapes, norm, dtype)
    written = sum([t.numel() * t.element_size() for t in made[:2]])
    return Cost(read * x.shape[2] * size, written, launches=1 if x.numel() else 0)


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
    shapes = Shapes.of(y, new, old, new, sizes, num_globals, via, mean_pooled)
    return gradients(y, shapes, sum(wanted), x_dtype, branch_dtype, sums_dtype)


def _backward_cost(grad: Tensor | None, grad_normed: Tensor | None, y: Tensor, *rest: Any) -> Cost:
    _, _, _, branch, _, old, new, sizes, num_globals, via, pooled, norm, wanted, *dtypes = rest
    shapes = Shapes.of(y, new, old, new, sizes, num_globals, via, pooled)
    bands = None if shapes.pool == "mean" else shapes.bands if num_globals else 0
    sizes_of = [t.element_size() for t in (grad, grad_normed) if t is not None]
    read = shapes.moved(shapes.new, bands) * sum(sizes_of)
    if norm != "none":  # of the rows that PCm made alike one is read
        read += shapes.moved(shapes.new, 1 if bands is None else bands) * y.element_size()
    if wanted[0]:
        read += shapes.moved(shapes.old) * branch.element_size()
    written = shapes.moved(shapes.old) * sum([dtype.itemsize for dtype in dtypes[:2] if dtype is not None])
    launches = (1 if y.numel() else 0) + (1 if any(wanted) and y.shape[2] else 0)
    return Cost(read * y.shape[2], written * y.shape[2], launches)


BACKWARD = register_backward(_add_norm_backward, fake=_backward_fake, cost=_backward_cost)
OP = register(_add_norm, fake=_fake, setup_context=setup_context, backward=backward_by(BACKWARD), cost=_cost)


def add_norm_triton(
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
    """`plane_switch_ref` in full, in one launch; differentiable once, in reverse mode, in two.

    Raises:
        ValueError: a volume as `plane_switch_triton` refuses.
        NotImplementedError: forward mode, transforms of torch.func, double backward.
    """
    refuse_transforms("add_norm")
    wide = [t for t in (branch, scale) if t is not None and t.dtype == torch.float64]
    x = x.double() if wide else x  # kernels sum in float64 where x is
    via = transition.num_prev if transition.via is None else transition.via
    kind = "none" if norm is None else "rms" if norm.rms else "layer"
    weight, bias, eps = (None, None, 0.0) if norm is None else norm[:3]
    tensors = [None if t is None else t.contiguous() for t in (x, branch, scale, weight, bias)]
    settings = (old.name, new.name, list(sizes), num_globals, via, transition.mean)
    out, normed, _, _ = OP(*tensors, *settings, kind, eps, norm_dtype)
    if branch is None and old == new and num_globals == 0:
        out = x
    return out if norm is None else (out, normed)


def add_rows_triton(
    x: Tensor,  # (N, rows, C), any strides
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    norm: Norm | None,
    norm_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (N, rows, C); with a norm: and its norm
    """`add_norm_triton` where rows stay in place: of a volume N deep and `rows` high."""
    sequences, rows, _ = x.shape
    slices = max(sequences, 1)  # a volume has at least one, of which there may be none
    same = Transition(slices, slices)
    return add_norm_triton(x, HW, HW, (slices, rows, 1), 0, same, branch, scale, norm, norm_dtype)
