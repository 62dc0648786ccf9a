"""How a scan is to be read, where its file leaves a choice or would be refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanOptions:
    """Options of `load_scan`, which says what they do."""

    axes: str | None = None  # the directions in which D, H, W increase; None: SPR for scans that have an orientation
    series: str | None = None  # which one of a DICOM folder; None: the only one
    allow_shear: bool = False  # axes that are not at right angles stay as they are, in the affine too
    regrid: bool = False  # sheared and unevenly spaced scans are resampled to a right, even grid


PLAIN = ScanOptions()
