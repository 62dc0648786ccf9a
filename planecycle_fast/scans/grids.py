"""Where the cells of one grid lie in another: affines of resized, padded and cropped scans, and values carried back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..inputs import check_one_of
from .affines import SAME
from .checks import gib
from .scan import MAX_BYTES, Scan

MODES = ("linear", "nearest")


def scaled(scale: Sequence[float]) -> np.ndarray:  # (4, 4)
    """Index of a coarse cell to the index, between fine ones, of its centre: `scale` fine cells a coarse one."""
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = [(s - 1) / 2 for s in scale]
    return matrix


def shifted(start: Sequence[int]) -> np.ndarray:  # (4, 4)
    """Index in what begins at `start` of a larger array (negative: before it) to the index in that."""
    matrix = np.eye(4)
    matrix[:3, 3] = start
    return matrix


def to_scan(
    values: Tensor,  # (d, h, w) or (d, h, w, C)
    affine: np.ndarray,  # (4, 4), their index (d, h, w, 1) to mm
    scan: Scan,
    mode: str = "linear",
    fill: float = 0.0,
    max_bytes: int = MAX_BYTES,
) -> Tensor:  # (D, H, W) or (D, H, W, C), on the scan's grid
    """Values back on the grid of a scan: features of patches, a mask of a crop, anything whose affine is known.

        given = pcf.prepare(scan, lifted)
        overlay = pcf.to_scan(lifted(given.pixels).patches[0], given.feature_affine(), scan)

    Each voxel gets the value at its centre, between the centres of cells linearly, or of the nearest cell; beyond the
    outermost centres theirs. Where centres lie on centres, values come back exactly: of a scan that was padded or
    cropped, all that are left of it. Between affines alone, so however many steps led from one to the other.

    Args:
        values: on any device, of any dtype; "linear" takes floating-point ones.
        affine: as `ModelInput.feature_affine` gives that of patches, and `ModelInput.affine` and `Scan.affine` of
            pixels and voxels. Its axes are those of the scan.
        scan: only its affine and the shape of its voxels count.
        mode: "linear"; or "nearest", for masks.
        fill: of voxels that lie in no cell, as what was cropped away.
        max_bytes: refuse a larger result.

    Raises:
        TypeError: values are no tensor, or integers are to be interpolated.
        ValueError: another mode or shape, an affine of which axes are not along the scan's, or beyond max_bytes.
    """
    check_one_of(mode, MODES, "mode")
    if not isinstance(values, Tensor) or (mode == "linear" and not values.is_floating_point()):
        raise TypeError(
            f"values must be a floating-point tensor (of any dtype with mode='nearest'), got "
            f"{values.dtype if isinstance(values, Tensor) else type(values).__name__}"
        )
    if values.ndim not in (3, 4) or values.numel() == 0:
        raise ValueError(f"values must have shape (d, h, w) or (d, h, w, C), got {tuple(values.shape)}")
    shape = tuple(scan.voxels.shape)
    needed = math.prod(shape) * math.prod(values.shape[3:]) * values.element_size()
    if needed > max_bytes:
        raise ValueError(
            f"values on the scan's grid must need at most {gib(max_bytes)}, got {gib(needed)}; take fewer of their "
            f"{values.shape[-1]} channels, or principal components"
        )
    for axis, places in enumerate(_places(np.asarray(affine, np.float64), scan.affine, shape)):
        values = _along(values, axis, places, mode, fill)
    return values


def _places(affine: np.ndarray, of_scan: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """For each axis the places of the scan's voxels, in indices of the values."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
        raise ValueError(f"affine must be an invertible (4, 4) matrix, got {affine.tolist()}")
    turn = np.linalg.inv(affine) @ of_scan  # index of a voxel to that of a value
    aside = abs(turn[:3, :3] - np.diag(np.diag(turn[:3, :3]))) * [max(1, n - 1) for n in shape]
    if aside.max() > SAME:
        raise ValueError(
            f"affine must have its axes along the scan's, got axes that miss by up to {aside.max():.3g} cells"
        )
    places = [turn[axis, axis] * np.arange(n) + turn[axis, 3] for axis, n in enumerate(shape)]
    return [np.where(abs(at - np.rint(at)) < SAME / 10, np.rint(at), at) for at in places]  # affines are rounded


def _along(
    values: Tensor,  # (d, h, w, ...)
    axis: int,
    places: np.ndarray,  # (n,), indices along this axis, with fractions
    mode: str,
    fill: float,
) -> Tensor:  # the same with n along this axis
    last = values.shape[axis] - 1
    within = np.clip(places, 0, last)
    lower = np.floor(within + 0.5) if mode == "nearest" else np.floor(within)

    def index(at: np.ndarray) -> Tensor:
        return torch.from_numpy(np.minimum(at, last).astype(np.int64)).to(values.device)

    def aligned(numbers: Tensor) -> Tensor:
        return numbers.to(values.device).view([-1 if a == axis else 1 for a in range(values.ndim)])

    out = values.index_select(axis, index(lower))
    if mode == "linear" and (within != lower).any():
        share = aligned(torch.from_numpy(within - lower).to(values.dtype))
        out = out.lerp(values.index_select(axis, index(lower + 1)), share)
    outside = (places < -0.5) | (places >= last + 0.5)
    return out.masked_fill(aligned(torch.from_numpy(outside)), fill) if outside.any() else out
