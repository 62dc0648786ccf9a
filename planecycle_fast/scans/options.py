"""How a scan is to be read, where its file leaves a choice or would be refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class ScanOptions:
    """Options of `load_scan`, which says what they do."""

    axes: str | None = None  # the directions in which D, H, W increase; None: SPR for scans that have an orientation
    fill_nan: float | None = None  # what takes the place of NaN voxels; None: they are refused
    index: int | None = None  # of a volume, from 0, in a file that holds several
    array: str | None = None  # of an .npz, by name
    series: str | None = None  # which one of a DICOM folder; None: the only one
    allow_shear: bool = False  # axes that are not at right angles stay as they are, in the affine too
    regrid: bool = False  # sheared and unevenly spaced scans are resampled to a right, even grid

    def __post_init__(self) -> None:
        if self.fill_nan is not None and not (isinstance(self.fill_nan, Real) and abs(self.fill_nan) <= LARGEST):
            raise ValueError(f"fill_nan must be a finite number within float32, got {self.fill_nan!r}")
        whole = isinstance(self.index, Integral) and not isinstance(self.index, bool)
        if self.index is not None and not (whole and self.index >= 0):
            raise ValueError(f"index must be that of a volume, 0 or more, got {self.index!r}")
        for name in ("array", "series"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} must be text, got {value!r}")


LARGEST = math.ldexp(2 - 2**-23, 127)  # of float32
PLAIN = ScanOptions()
