"""Rows of pixels, a patch each: how long they are, and what `patchify` computes, by torch's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.tracing import may_fill


def row_length(pixels: int, dtype: torch.dtype) -> int:
    """The length of a row of so many pixels: a multiple of 16 bytes, as matrix products of 16 bits want it."""
    return -(-pixels // (16 // dtype.itemsize)) * (16 // dtype.itemsize)


def patchify_ref(
    volume: Tensor,  # (B, channels, D, height, width), any strides
    patch: Sequence[int],  # (ph, pw) in pixels
    num_globals: int = 0,  # g
    dtype: torch.dtype | None = None,
) -> Tensor:  # (B*D, g + L, K), L = (height // ph) * (width // pw)
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times.

    A row has the pixels of a patch in the order of ``conv.weight.flatten(1)``, (channels, ph, pw), then zeros up to
    `row_length`; rows of globals are zeros, so that nothing of theirs shows in gradients of weights. Pixels at the
    lower and right border that fill no patch are left out, as a convolution does. `dtype` is the rows', by default the
    volume's.
    """
    (batch, channels, depth, height, width), (ph, pw), g = volume.shape, patch, num_globals
    h, w, pixels, dtype = height // ph, width // pw, channels * ph * pw, dtype or volume.dtype
    found = volume[..., : h * ph, : w * pw].unflatten(4, (w, pw)).unflatten(3, (h, ph))
    found = found.permute(0, 2, 3, 5, 1, 4, 6)  # (B, D, h, w, channels, ph, pw)
    length = row_length(pixels, dtype)
    if not may_fill():
        return F.pad(found.reshape(batch * depth, h * w, pixels).to(dtype), (0, length - pixels, g, 0))
    rows = volume.new_empty(batch * depth, g + h * w, length, dtype=dtype)
    rows[:, :g], rows[:, g:, pixels:] = 0, 0
    rows.view(batch, depth, g + h * w, length)[:, :, g:, :pixels].unflatten(3, (channels, ph, pw)).unflatten(
        2, (h, w)
    ).copy_(found)
    return rows
