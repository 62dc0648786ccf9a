"""add_norm: residual + LayerScale * branch, and the norm of the sum.

A pre-norm transformer block does this between attention and MLP; `plane_switch` does it between blocks, where
rows change places as well (with one plane it is this operation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backends import asked_for, pick
from ...runtime.tracing import shape_of
from ..tiles import LARGEST_ROW


class Norm(NamedTuple):
    """A LayerNorm over channels, or an RMSNorm, as operations take it."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,); an RMSNorm has none
    eps: float
    rms: bool = False


def add_norm_ref(
    x: Tensor,  # (N, rows, C), the residual stream
    branch: Tensor | None,  # (N, rows, C), or None: just the norm
    scale: Tensor | None,  # (C,), LayerScale, or None: 1
    norm: Norm,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # the sum and its norm, (N, rows, C) each
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times.

    Rounds where eager models do: the product, the sum, then the norm of the rounded sum.
    """
    x = add_ref(x, branch, scale)
    return x, normalize_ref(x, norm, norm_dtype)


def add_ref(
    x: Tensor,  # (N, rows, C)
    branch: Tensor | None,  # (N, rows, C)
    scale: Tensor | None,  # (C,)
) -> Tensor:  # (N, rows, C), of the dtype that torch promotes to
    """x + scale * branch; x itself without a branch."""
    if branch is None:
        return x
    return x + (branch if scale is None else branch * scale)


def normalize_ref(
    x: Tensor,  # (..., C)
    norm: Norm,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:  # (..., C); of no `norm_dtype` as torch gives it, float32 under autocast
    if norm.rms:
        out = F.rms_norm(x, shape_of(x)[-1:], norm.weight, norm.eps)
    else:
        out = F.layer_norm(x, shape_of(x)[-1:], norm.weight, norm.bias, norm.eps)
    return out if norm_dtype is None else out.to(norm_dtype)


def add_norm(
    x: Tensor,  # (N, rows, C), the residual stream
    branch: Tensor | None,  # (N, rows, C), or None: just the norm
    scale: Tensor | None,  # (C,), LayerScale, or None: 1
    norm: Norm,
    norm_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # the sum and its norm, (N, rows, C) each
    """`add_norm_ref` on the backend asked for; never writes to its inputs.

    Args:
        norm_dtype: of the norm, for what comes next: under autocast a linear layer would cast it anyway.

    Backends "triton" and "cpu" sum in float32 and round once; they have first derivatives in reverse mode only.

    Raises:
        TypeError: an argument is not a floating-point tensor, norm no `Norm`, or norm_dtype no floating-point dtype.
        ValueError: shapes that do not belong together, a backend that is unknown or not usable, or more than 8,192
            channels on backend "triton".
    """
    check_stream(x, branch, scale, norm, norm_dtype)
    if norm is None:
        raise TypeError("norm must be an ops.Norm, got NoneType")
    if x.ndim != 3:
        raise ValueError(f"x must have shape (N, rows, C), got {tuple(x.shape)}")
    return add_norm_on(pick_rows(backend, x), x, branch, scale, norm, norm_dtype)


def add_norm_on(
    chosen: str,  # a backend that can be used
    x: Tensor,  # (N, rows, C)
    branch: Tensor | None,  # (N, rows, C)
    scale: Tensor | None,  # (C,)
    norm: Norm,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (N, rows, C) each
    """`add_norm` of what is known to belong together."""
    if chosen == "reference":
        return add_norm_ref(x, branch, scale, norm, norm_dtype)
    if chosen == "cpu":
        from .add_norm_cpu import add_rows_cpu as add_rows
    else:
        from .add_norm_autograd import add_rows_triton as add_rows

    return add_rows(x, branch, scale, norm, norm_dtype)


def pick_rows(backend: str, x: Tensor) -> str:
    """The backend for x (N, rows, C). Raises ValueError for "triton" by name where its kernels cannot hold a row."""
    return backend_of_rows(pick(backend, x.device, op="add_norm"), asked_for(backend), x.shape[-1])


def backend_of_rows(chosen: str, asked: str, channels: int) -> str:
    """The backend chosen; for rows that Triton's kernels cannot hold the reference, unless "triton" was asked for."""
    if chosen != "triton" or channels <= LARGEST_ROW:
        return chosen
    if asked == "triton":
        raise ValueError(
            f"x has {channels} channels, backend 'triton' holds whole rows of at most {LARGEST_ROW}; use 'auto'"
        )
    return "reference"


def check_stream(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    norm: Norm | None = None,
    norm_dtype: torch.dtype | None = None,
) -> None:
    """Raises TypeError or ValueError for what cannot be added to x or normalise it. (x's own shape is the caller's.)"""
    if norm_dtype is not None and not (isinstance(norm_dtype, torch.dtype) and norm_dtype.is_floating_point):
        raise TypeError(f"norm_dtype must be a floating-point dtype or None, got {norm_dtype!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if branch is not None:
        if not isinstance(branch, Tensor) or not branch.is_floating_point():
            got = getattr(branch, "dtype", type(branch).__name__)
            raise TypeError(f"branch must be a floating-point tensor or None, got {got}")
        if branch.shape != x.shape:
            raise ValueError(f"branch must have x's shape, {tuple(x.shape)}, got {tuple(branch.shape)}")
    if scale is not None and branch is None:
        raise ValueError("scale must be None without a branch to scale, got a tensor")
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f"norm must be an ops.Norm, got {type(norm).__name__}")
    if norm is not None and norm.rms and norm.bias is not None:
        raise ValueError("norm.bias must be None for an RMSNorm, got a tensor")
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    for name, vector in (("scale", scale), ("norm.weight", weight), ("norm.bias", bias)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            got = getattr(vector, "dtype", type(vector).__name__)
            raise TypeError(f"{name} must be a floating-point tensor or None, got {got}")
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(vector.shape)}")
