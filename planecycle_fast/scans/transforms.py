"""Steps from a scan to a model's volume: functions of a scan or an array, each of which keeps its affine.

    from planecycle_fast import transforms
    scan = transforms.resample(transforms.window(pcf.load_scan("ct.nii.gz"), (-160, 240)), 1.5)
    volume = transforms.channels(transforms.pad(scan, multiple=(1, 16, 16)))

`prepare` does all of it for a model; `to_scan` brings masks and features back, by the affines.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import check_one_of
from .grids import MODES, scaled, shifted
from .orientation import check_axes, spans_space
from .scan import IMAGENET_MEAN, IMAGENET_STD, Scan, in_channels
from .scan import resample as resampled
from .windows import PERCENTILES, Window, as_spacing, as_window

WHERE = ("centre", "end")
Array = Any  # a numpy array or tensor
Lengths = int | Sequence[int]  # along D, H, W


def as_scan(
    scan: Scan | Array,  # (D, H, W)
    affine: Array | None = None,  # (4, 4)
    spacing: float | Sequence[float] | None = None,
    axes: str | None = None,
) -> Scan:
    """A numpy array or tensor of any real dtype, (D, H, W), as a Scan: float32, on its device. A Scan is itself.

    Args:
        scan: MONAI's MetaTensor, whose axes are not in this order, goes through `monai_transforms`.
        affine: its index (d, h, w, 1) to millimetres, RAS+.
        spacing: in place of an affine, millimetres along D, H, W, or one number for all; default 1.
        axes: in which directions D, H, W increase, such as "SPR", where the affine tells.

    Raises:
        TypeError: neither a Scan nor an array of real numbers, or a tensor that needs a gradient.
        ValueError: not 3D, empty, or an affine whose axes do not span space.
    """
    if isinstance(scan, Scan):
        if affine is not None or spacing is not None or axes is not None:
            raise ValueError("affine, spacing and axes must be of an array; a Scan has its own")
        return scan
    if isinstance(scan, Tensor) and type(scan).__name__ == "MetaTensor":
        raise TypeError("scan must be a Scan, an array or a plain tensor (D, H, W), got a MetaTensor: monai_transforms")
    if isinstance(scan, np.ndarray) and scan.dtype.kind in "biuf":
        voxels = torch.from_numpy(scan.astype(np.float32))  # a copy, of native byte order
    elif isinstance(scan, Tensor) and not scan.is_complex() and not scan.requires_grad:
        voxels = scan.float()
    else:
        what = getattr(scan, "dtype", type(scan).__name__)
        more = " that needs a gradient; detach it" if getattr(scan, "requires_grad", False) else ""
        raise TypeError(f"scan must be a Scan, or an array or tensor of real numbers, got {what}{more}")
    if voxels.ndim != 3 or voxels.numel() == 0:
        raise ValueError(f"scan must have shape (D, H, W) and not be empty, got {tuple(voxels.shape)}")
    if affine is None:
        affine = np.diag([*as_spacing(1.0 if spacing is None else spacing), 1.0])
    elif spacing is not None:
        raise ValueError("affine and spacing must not both be given: an affine holds the spacing")
    affine = np.array(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not spans_space(affine):
        raise ValueError(f"affine must be (4, 4) with axes that span space, got {affine.tolist()}")
    return Scan(voxels, affine, None if axes is None else check_axes(axes))


def window(
    scan: Scan | Array,  # (D, H, W)
    window: Window | str | Sequence[float] = PERCENTILES,
) -> Scan:
    """Intensities cut to a window, which becomes [0, 1]: (-160, 240), "-160,240", percentiles "0.5%,99.5%".

    Warns, and raises ValueError, as `Window.apply` says.
    """
    scan = as_scan(scan)
    return Scan(as_window(window).apply(scan.voxels), scan.affine, scan.axes)


def size_at(scan: Scan, spacing: tuple[float, float, float]) -> list[int]:
    """Voxels along D, H, W of the same extent at a spacing in mm, as nearly as whole ones allow."""
    return [max(1, round(min(n * old / new, 1e18))) for n, old, new in zip(scan.voxels.shape, scan.spacing, spacing)]


def resample(
    scan: Scan | Array,  # (D, H, W)
    spacing: str | float | Sequence[float],
    mode: str = "linear",
) -> Scan:
    """The same extent in voxels of this spacing, mm along D, H, W or one for all, as nearly as whole voxels allow."""
    scan = as_scan(scan)
    return resize(scan, size_at(scan, as_spacing(spacing)), mode)


def resize(
    scan: Scan | Array,  # (D, H, W)
    size: Lengths,
    mode: str = "linear",
) -> Scan:
    """The same extent in this many voxels along D, H, W.

    "linear" smooths an axis that shrinks by as much as it shrinks; "nearest", for masks, takes the nearest voxel.
    """
    check_one_of(mode, MODES, "mode")
    scan, size = as_scan(scan), _sizes(size, "size")
    if size == list(scan.voxels.shape):
        return scan
    if mode == "linear":
        voxels = resampled(scan.voxels, tuple(size))
    else:
        voxels = F.interpolate(scan.voxels[None, None], tuple(size), mode="nearest-exact")[0, 0]
    return Scan(voxels, scan.affine @ scaled([old / new for old, new in zip(scan.voxels.shape, size)]), scan.axes)


def pad(
    scan: Scan | Array,  # (D, H, W)
    size: Lengths | None = None,
    multiple: Lengths | None = None,
    where: str = "centre",
    value: float | None = None,
) -> Scan:
    """Voxels added to at least this size, or to the next multiple, of D, H, W or the same of all.

    Args:
        scan: axes that are as long already stay as they are.
        size, multiple: one of the two.
        where: on both sides, an odd voxel at the end; or "end".
        value: of these voxels; None: the scan's lowest.
    """
    scan = as_scan(scan)
    more = [max(0, want - n) for want, n in zip(_wanted(scan, size, multiple, up=True), scan.voxels.shape)]
    before = [n // 2 if _centred(where) else 0 for n in more]
    if not any(more):
        return scan
    value = float(scan.voxels.min()) if value is None else value
    sides = [side for first, n in zip(before[::-1], more[::-1]) for side in (first, n - first)]  # W, H, D
    return Scan(F.pad(scan.voxels, sides, value=value), scan.affine @ shifted([-n for n in before]), scan.axes)


def crop(
    scan: Scan | Array,  # (D, H, W)
    size: Lengths | None = None,
    multiple: Lengths | None = None,
    where: str | Sequence[int] = "centre",
) -> Scan:
    """Voxels removed down to at most this size, or to the multiple below, of D, H, W or the same of all.

    Args:
        scan: axes that are no longer than that stay as they are.
        size, multiple: one of the two.
        where: from both sides, an odd voxel at the end; or at the "end"; or (d, h, w), the first voxel that stays, of a
            size that lies within the scan from there.

    Raises ValueError where no multiple is within the scan, or it ends too early.
    """
    scan, start = as_scan(scan), None
    want = [min(n, old) for n, old in zip(_wanted(scan, size, multiple, up=False), scan.voxels.shape)]
    if isinstance(where, str):
        start = [(old - n) // 2 if _centred(where) else 0 for n, old in zip(want, scan.voxels.shape)]
    else:
        start, want = _sizes(where, "where", least=0), _wanted(scan, size, multiple, up=False)
        if any([first + n > old for first, n, old in zip(start, want, scan.voxels.shape)]):
            raise ValueError(f"where and size must lie within {tuple(scan.voxels.shape)}, got {start} and {want}")
    part = scan.voxels[tuple([slice(first, first + n) for first, n in zip(start, want)])]
    return Scan(part, scan.affine @ shifted(start), scan.axes)


def pad_or_crop(
    scan: Scan | Array,  # (D, H, W)
    size: Lengths,
    value: float | None = None,
) -> Scan:
    """Exactly this size along D, H, W, about the centre: for batches of scans that differ."""
    return crop(pad(scan, size, value=value), size)


def channels(
    scan: Scan | Array,  # (D, H, W) in [0, 1], as of `window`
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:  # (1, C, D, H, W)
    """The one channel as C equal ones, less `mean` and divided by `std` of each: a model's volume.

    Raises ValueError as `scan.in_channels`.
    """
    return in_channels(as_scan(scan).voxels, tuple(mean), tuple(std))


def _sizes(given: Lengths, name: str, least: int = 1) -> list[int]:
    values = [given] * 3 if isinstance(given, Integral) else given
    whole = isinstance(values, Sequence) and all([isinstance(n, Integral) and n >= least for n in values])
    if isinstance(given, bool) or not whole or len(values) != 3:
        raise ValueError(f"{name} must be one whole number of at least {least}, or three for D, H, W, got {given!r}")
    return [int(n) for n in values]


def _wanted(scan: Scan, size: Lengths | None, multiple: Lengths | None, up: bool) -> list[int]:
    if (size is None) == (multiple is None):
        raise ValueError(f"one of size and multiple must be given, got {size!r} and {multiple!r}")
    if size is not None:
        return _sizes(size, "size")
    of = _sizes(multiple, "multiple")
    wanted = [(-(-n // m) if up else n // m) * m for n, m in zip(scan.voxels.shape, of)]
    if not all(wanted):
        raise ValueError(f"multiple must be no larger than the scan, {tuple(scan.voxels.shape)}, got {of}")
    return wanted


def _centred(where: str) -> bool:
    check_one_of(where, WHERE, "where")
    return where == "centre"
