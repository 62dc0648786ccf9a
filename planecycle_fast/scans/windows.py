"""Intensities that become black and white, and the other settings of a scan that are written as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from .checks import warn

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
    ordered = np.partition(voxels.cpu().numpy(), wanted, axis=None)
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


def as_window(window: Window | str | Sequence[float]) -> Window:
    """A window of any of its forms: itself, text as for `parse_window`, or (LOW, HIGH), two intensities."""
    if isinstance(window, str):
        return parse_window(window)
    if isinstance(window, Window):
        return window
    if not isinstance(window, Sequence) or len(window) != 2 or not all([isinstance(end, Real) for end in window]):
        raise ValueError(f"window must be (LOW, HIGH), text such as '0.5%,99.5%', or a Window, got {window!r}")
    return Window(float(window[0]), float(window[1]))


def as_spacing(spacing: str | float | Sequence[float]) -> tuple[float, float, float]:
    """Millimetres along D, H, W: of three numbers or one for all, as such or as text, "S" or "S,S,S".

    Raises ValueError unless they are positive.
    """
    values = [spacing] if isinstance(spacing, Real) else spacing
    if isinstance(spacing, str):
        try:
            values = [float(part) for part in spacing.split(",")]
        except ValueError:
            values = []
    numbers = isinstance(values, Sequence) and all([isinstance(value, Real) for value in values])
    if not numbers or len(values) not in (1, 3) or not all([0 < value < math.inf for value in values]):
        raise ValueError(f"spacing must be millimetres, one number or three for D, H, W, got {spacing!r}")
    return tuple([float(value) for value in values] * (3 // len(values)))
