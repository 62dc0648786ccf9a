"""add_norm: residual + LayerScale * branch, and the norm of the sum.

A pre-norm transformer block does this between attention and MLP; `plane_switch` does it between blocks, where
rows change places as well (with one plane it is this operation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..backends import pick


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
) -> tuple[Tensor, Tensor]:  # the sum and its norm, (N, rows, C) each
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times.

    Rounds where eager models do: the product, the sum, then the norm of the rounded sum.
    """
    x = add_ref(x, branch, scale)
    return x, normalize_ref(x, norm)


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
) -> Tensor:  # (..., C), float32 under autocast
    if norm.rms:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def add_norm(
    x: Tensor,  # (N, rows, C), the residual stream
    branch: Tensor | None,  # (N, rows, C), or None: just the norm
    scale: Tensor | None,  # (C,), LayerScale, or None: 1
    norm: Norm,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # the sum and its norm, (N, rows, C) each
    """`add_norm_ref` on the backend asked for; never writes to its inputs.

    Raises:
        TypeError: an argument is not a floating-point tensor, or norm no `Norm`.
        ValueError: shapes that do not belong together, or a backend that is unknown or not usable.
    """
    check_stream(x, branch, scale, norm)
    if norm is None:
        raise TypeError("norm must be an ops.Norm, got NoneType")
    pick(backend, x.device, op="add_norm")
    return add_norm_ref(x, branch, scale, norm)


def check_stream(x: Tensor, branch: Tensor | None, scale: Tensor | None, norm: Norm | None) -> None:
    """Raises TypeError or ValueError for what cannot be added to x or normalise it. (x's own shape is the caller's.)"""
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
    vectors = {"scale": scale} | ({"norm.weight": norm.weight, "norm.bias": norm.bias} if norm is not None else {})
    for name, vector in vectors.items():
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            got = getattr(vector, "dtype", type(vector).__name__)
            raise TypeError(f"{name} must be a floating-point tensor or None, got {got}")
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(vector.shape)}")
