"""patchify: slices of a volume as rows of pixels, a patch each, with room for globals before those of a slice.

A convolution whose kernel is its stride is one matrix product of these rows: ``linear(rows, weight.flatten(1), bias)``
of a patch embedding (DESIGN: "patch embedding"). The product of the room is where globals are written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.backends import pick
from .pixel_rows import patchify_ref


def patchify(
    volume: Tensor,  # (B, channels, D, height, width), any strides
    patch: Sequence[int],  # (ph, pw) in pixels
    num_globals: int = 0,  # g
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:  # (B*D, g + L, K), L = (height // ph) * (width // pw)
    """`patchify_ref` on the backend asked for: "triton", or torch's operations; "cpu" has none of its own.

    On "triton" one pass over the pixels, and one back, with derivatives in forward and reverse mode, any number of
    times: all of it moves, bit for bit, and is rounded once where dtypes differ.

    Raises:
        TypeError: volume is not a floating-point tensor, or dtype no floating-point dtype.
        ValueError: a volume of another rank, without channels or slices, or smaller than a patch; patch or num_globals
            that are none; a backend that is unknown or not usable; on "triton" more than 2**30 rows of a slice or
            pixels along an axis, or more than 2**31 - 1 programs.
    """
    check_patchify(volume, patch, num_globals, dtype)
    return patchify_on(pick(backend, volume.device, op="patchify"), volume, patch, num_globals, dtype)


def patchify_on(
    chosen: str,  # a backend that can be used
    volume: Tensor,  # (B, channels, D, height, width), any strides
    patch: Sequence[int],  # (ph, pw) in pixels
    num_globals: int,  # g
    dtype: torch.dtype | None,
) -> Tensor:  # (B*D, g + L, K)
    """`patchify` of what is known to belong together."""
    if chosen == "reference":
        return patchify_ref(volume, patch, num_globals, dtype)
    from .patchify_triton import patchify_triton

    return patchify_triton(volume, patch, num_globals, dtype)


def check_patchify(
    volume: Tensor,  # as of `patchify`
    patch: Sequence[int],
    num_globals: int,
    dtype: torch.dtype | None,
) -> None:
    """Raises TypeError or ValueError for arguments of `patchify` that do not belong together."""
    if not isinstance(volume, Tensor) or not volume.is_floating_point():
        got = getattr(volume, "dtype", type(volume).__name__)
        raise TypeError(f"volume must be a floating-point tensor, got {got}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype}")
    if not isinstance(patch, Sequence) or len(patch) != 2 or not all([isinstance(n, int) and n > 0 for n in patch]):
        raise ValueError(f"patch must be two ints (height, width) in pixels, at least 1 each, got {patch!r}")
    if not isinstance(num_globals, int) or num_globals < 0:
        raise ValueError(f"num_globals must be an int, at least 0, got {num_globals!r}")
    if volume.ndim != 5 or any([n < least for n, least in zip(volume.shape[1:], (1, 1, *patch))]):
        raise ValueError(
            f"volume must have shape (B, channels, D, height, width), with a channel, a slice and at least "
            f"{patch[0]} x {patch[1]} pixels, got {tuple(volume.shape)}"
        )
