"""add_norm: residual + LayerScale * branch, and the norm of the sum.

A pre-norm transformer block does this between attention and MLP; `plane_switch` does it between blocks, where
rows change places as well (with one plane it is this operation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.backends import asked_for, pick
from ..tiles import LARGEST_ROW
from .norm import Norm, add_norm_ref, check_stream


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
        from .add_norm_triton import add_rows_triton as add_rows

    return add_rows(x, branch, scale, norm, norm_dtype)  # type: ignore[return-value]  # both, as there is a norm


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
