"""From a scan to a model's volume, keeping track of where each voxel and each feature lies."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_checks import warn
from .volumes import IMAGENET_MEAN, IMAGENET_STD, MAX_BYTES, Scan, in_channels, resample

FITS = ("pad", "resize")
LEAST_INSIDE = 0.01  # of the voxels, between the ends of a window
LEAST_CONTRAST = 0.005  # deviation of the image: most of it within 1% of black to white
_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_WINDOW = re.compile(rf"{_NUMBER}(%?)\s*,{_NUMBER}(%?)\s*")


@dataclass(frozen=True)
class Window:
    """The intensities that become black and white: of the scan's unit, or percentiles of its voxels."""

    low: float
    high: float
    percent: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"window must have LOW below HIGH, got '{self}'")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"window must have finite ends, a finite width apart, got '{self}'")
        if self.percent and not 0 <= self.low < self.high <= 100:
            raise ValueError(f"window must have LOW below HIGH between 0% and 100%, got '{self}'")

    def __str__(self) -> str:
        unit = "%" if self.percent else ""
        return ",".join(f"{end!r}".removesuffix(".0") + unit for end in (self.low, self.high))

    def apply(
        self,
        voxels: Tensor,  # (D, H, W)
    ) -> Tensor:  # (D, H, W) in [0, 1]
        """Voxels with `low` mapped to 0 and `high` to 1, and cut off there; computed in float64.

        Where percentiles are equal, as in a mask that is almost empty, the extremes take their place.
        A ScanWarning says so, and where a window leaves under 1% of the voxels between its ends, or hardly any
        contrast: a deviation under 0.005 of [0, 1], as of intensities in other units than the window's.

        Raises ValueError for voxels that are not finite, or all one, or all beyond one end of the window.
        """
        least, most = float(voxels.min()), float(voxels.max())
        if not math.isfinite(most - least):
            raise ValueError(f"voxels must be finite, got {least:g} to {most:g}")
        low, high = _percentiles(voxels, self.low, self.high) if self.percent else (self.low, self.high)
        collapsed = high <= low
        if collapsed:
            low, high = least, most
        if not (least < high and most > low):
            raise ValueError(f"window must overlap the scan's intensities, {least:g} to {most:g}, got {self}")
        image, inside = torch.empty_like(voxels), 0
        for cut, narrow in zip(image, voxels):  # slice by slice, for float64 takes twice the memory
            wide = narrow.double()
            inside += int(((wide >= low) & (wide <= high)).sum())
            cut.copy_(((wide - low) / (high - low)).clamp_(0, 1))
        inside /= voxels.numel()
        if collapsed:
            warn(f"window {self} has no width in this scan: its extremes, {least:g} and {most:g}, are black and white")
        elif inside < LEAST_INSIDE or float(image.std(correction=0)) < LEAST_CONTRAST:
            what = "makes the scan nearly one grey"
            if inside < LEAST_INSIDE:
                what = f"leaves {100 * inside:.2g}% of the voxels between its ends"
            first, last = _percentiles(voxels, 1, 99)
            warn(
                f"window {self} {what}: the scan's values are {least:.4g} to {most:.4g}, "
                f"98% of them {first:.4g} to {last:.4g}"
            )
        return image


def _percentiles(
    voxels: Tensor,  # any shape
    *percents: float,
) -> list[float]:
    """As numpy's, between two voxels linearly; but in float64, in which no difference of float32 is infinite."""
    places = [percent / 100 * (voxels.numel() - 1) for percent in percents]
    wanted = sorted({whole for place in places for whole in (math.floor(place), math.ceil(place))})
    ordered = np.partition(voxels.numpy(), wanted, axis=None)
    ends = [(float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])) for place in places]
    return [low + (high - low) * (place % 1) for (low, high), place in zip(ends, places)]


PERCENTILES = Window(0.5, 99.5, percent=True)  # the usual choice where nothing is known of the scanner


def parse_window(text: str) -> Window:
    """A window of "LOW,HIGH", intensities ("-160,240"), or of "LOW%,HIGH%", percentiles ("0.5%,99.5%").

    Raises ValueError for anything else, for LOW that is not below HIGH, and percentiles beyond 0 and 100.
    """
    match = _WINDOW.fullmatch(text)
    if match is None or match[2] != match[4]:
        raise ValueError(f"window must be LOW,HIGH such as -160,240 or percentiles such as 0.5%,99.5%, got {text!r}")
    return Window(float(match[1]), float(match[3]), percent=bool(match[2]))


def parse_spacing(text: str) -> tuple[float, float, float]:
    """Millimetres along D, H, W of "S" or "S,S,S". Raises ValueError unless they are positive numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(0 < value < math.inf for value in values):
        raise ValueError(f"spacing must be millimetres, one number or three for D, H, W, got {text!r}")
    return tuple(values * 3 if len(values) == 1 else values)


@dataclass(frozen=True, eq=False)
class ModelInput:
    """A model's volume, and what it shows."""

    pixels: Tensor  # (1, channels, D, height, width) float32, mean removed, deviation divided out
    image: Tensor  # (D, height, width) in [0, 1], the same before that
    affine: np.ndarray  # (4, 4) float64, index (d, h, w, 1) of a pixel's centre to mm, like the scan's
    padding: tuple[int, int]  # pixels added at the end of height and width

    def feature_affine(self, patch_size: tuple[int, int]) -> np.ndarray:  # (4, 4)
        """Index (d, h, w, 1) of a patch to the millimetres of its centre."""
        return self.affine @ _grid((1, *patch_size))


def prepare(
    scan: Scan,
    patch_size: tuple[int, int],  # pixels
    window: Window,
    spacing: tuple[float, float, float] | None = None,  # mm along D, H, W
    fit: str = "pad",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    max_bytes: int = MAX_BYTES,
) -> ModelInput:
    """A scan's one channel as equal ones of the model, of a size that is a multiple of the patch.

    Args:
        scan: voxels (D, H, W), any intensities.
        patch_size: of the model; slices are patchified, depth is not.
        window: intensities that become black and white.
        spacing: resample to this, over the same extent, as nearly as whole voxels allow; None keeps the scan's.
        fit: what makes height and width a multiple of the patch: "pad" at their end, with black, or
            "resize" to the nearest multiple.
        mean, std: of the model's training images in [0, 1], per channel; they tell how many channels the model has.
        max_bytes: refuse to make a larger volume.

    Raises ValueError for an unknown fit, a volume beyond max_bytes, or a window beside the scan's intensities.
    """
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    shape = list(scan.voxels.shape)
    if spacing is not None:
        shape = [max(1, round(min(n * old / new, 1e18))) for n, old, new in zip(shape, scan.spacing, spacing)]
    padding = (0, 0)
    if fit == "resize":
        shape[1:] = [max(1, round(n / p)) * p for n, p in zip(shape[1:], patch_size)]
    else:
        padding = tuple([-n % p for n, p in zip(shape[1:], patch_size)])
    padded = (shape[0], *[n + more for n, more in zip(shape[1:], padding)])
    if len(mean) * 4 * math.prod(padded) > max_bytes:
        size = " x ".join(map(str, padded))
        raise ValueError(
            f"scan must make a volume of at most {max_bytes / 2**30:.3g} GiB for the model, got {size} pixels; "
            "a larger spacing makes it smaller"
        )
    scale = [old / new for old, new in zip(scan.voxels.shape, shape)]
    image = window.apply(scan.voxels)
    if shape != list(image.shape):
        image = resample(image, tuple(shape))
    image = F.pad(image, (0, padding[1], 0, padding[0]))
    return ModelInput(in_channels(image, mean, std), image, scan.affine @ _grid(scale), padding)


def _grid(scale: tuple[float, float, float] | list[float]) -> np.ndarray:  # (4, 4)
    """Index of a coarse cell to the index, between fine ones, of its centre: `scale` fine cells a coarse one."""
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = [(s - 1) / 2 for s in scale]
    return matrix
