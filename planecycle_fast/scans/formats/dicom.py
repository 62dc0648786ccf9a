"""One DICOM series as a volume: its order, its place in space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...optional import require
from ..affines import ROUNDING, SLOPE, regridded, rounding
from ..checks import Refused, ScanOptions, check_header, warn
from .dicom_pixels import decoded
from .dicom_series import files_of, header_of
from .dicom_units import Place, check_pixels, check_same, is_turned, rescales_of, units_of
from .dicom_values import described_frames, frames_of, integer, numbers, part_of, refusal, silent_pydicom

if TYPE_CHECKING:
    from pydicom import Dataset


def read_dicom(folder: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The image series in a folder that is picked, sorted along the normal of its slices, rescaled to its units.

    Returns voxels (i, j, k) float32: column, row, slice; and the affine (4, 4) of these to DICOM's own millimetres,
    LPS+. Unevenly spaced slices are interpolated where that is asked for; a tilt stays in the affine.

    Raises Refused, MissingPackageError, OSError.
    """
    require("SimpleITK", "scans")  # of packed pixels, which show only later
    notes = []
    with silent_pydicom():
        images = [header_of(path) for path in files_of(folder, options.series)]
        sizes = [check_pixels(image) for image in images]
        frames = [frames_of(image) for image in images]
        if len(images) > 1 and max(frames) > 1:
            raise Refused(f"must hold slices or one multi-frame file, got {len(images)} files with multi-frame ones")
        depth, (rows, columns, allocated) = sum(frames), sizes[0]
        # Of one file at a time: itself, its pixels as they are unpacked and taken over, and a frame of them rescaled.
        one = rows * columns * (frames[0] * 4 * allocated // 8 + 8 + 8)
        # And of all of them the volume in float32, before and after turning.
        check_header((depth, rows, columns), np.dtype(f"u{allocated // 8}"), 8, max_bytes, one)
        if depth < 2:
            raise Refused("must be a volume of at least 2 slices, got one slice")
        check_same([(image, n) for image in images for n in range(described_frames(image))])  # sizes as well
        places = [(image, n) for image, count in zip(images, frames) for n in range(count)]
        order, affine, positions = _geometry(places)
        uneven = _unevenness(positions, affine)
        if uneven and not options.regrid:
            raise Refused(f"{uneven}; --spacing (regrid=True) interpolates them")
        if len(images) > 1:
            images = [images[n] for n in order]
        elif order[0] > order[-1]:  # frames stay as they are; the affine follows
            order, positions = order[::-1], positions[::-1]
            affine[:3, 3] += (depth - 1) * affine[:3, 2]
            affine[:3, 2] *= -1
        if len(images) == 1 and (np.diff(order) < 0).any():
            raise Refused("must have its frames in the order of their positions")
        if is_turned(images[0]) and (units := units_of(images[0])):
            notes.append(f"is of MONOCHROME1 and was turned, more is brighter: its units are no longer {units}")
        kind = "i" if integer(images[0], "PixelRepresentation") else "u"
        dtype, rescales = np.dtype(f"{kind}{allocated // 8}"), [rescales_of(image) for image in images]
        paths, packed = [Path(image.filename) for image in images], [_is_packed(image) for image in images]
        voxels = decoded(paths, rescales, (columns, rows, frames[0]), dtype, packed, one).transpose(2, 1, 0)
    if uneven:
        voxels, affine = regridded(voxels, affine, max_bytes, positions)
        notes.append(f"{uneven}: interpolated to {voxels.shape[2]} even ones")
    for note in notes:
        warn(f"volume {folder} {note}")
    return voxels, affine


def _is_packed(image: Dataset) -> bool:
    syntax = image.file_meta.get("TransferSyntaxUID")
    return syntax is not None and bool(syntax.is_compressed)


def _geometry(places: list[Place]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slices' order along their normal, the affine (4, 4) of sorted (i, j, k) to LPS+, positions (k, 3) mm."""
    along_row, along_column, spacing = first = _plane(*places[0])
    for image, frame in places[1:]:
        if not np.allclose(np.concatenate(_plane(image, frame)), np.concatenate(first), 1e-3, 1e-3):
            raise refusal(image, "must have the same orientation and pixel spacing in all slices")
    normal = np.cross(along_row, along_column)
    positions = _positions(places, normal)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    gaps = np.diff(positions @ normal)
    if gaps.min() <= 0.01 * gaps.max():
        raise Refused("must have one image at every position, got several images at one position, a time series?")
    affine = np.eye(4)
    affine[:3, 0] = along_row * spacing[1]
    affine[:3, 1] = along_column * spacing[0]
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(places) - 1)
    affine[:3, 3] = positions[0]
    return order, affine, positions


def _unevenness(positions: np.ndarray, affine: np.ndarray) -> str | None:
    """What is uneven about slices at these positions (k, 3) beside those of an affine, if it is more than rounding."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    offsets = (positions - positions[0]) @ normal
    gaps, step = np.diff(offsets), offsets[-1] / (len(offsets) - 1)
    misses = positions - positions[0] - np.arange(len(positions))[:, None] * affine[:3, 2]
    # A missing slice moves another by a quarter of this step or more; rounding and thick slices need less.
    if abs(misses @ normal).max() > min(max(ROUNDING, 0.01 * step), step / 5):
        lengths = f"{gaps.min():.4g} to {gaps.max():.4g} mm"
        return f"must have evenly spaced slices, got {lengths}: slices are missing or unevenly spaced"
    aside = np.linalg.norm(misses - (misses @ normal)[:, None] * normal, axis=1)
    if (aside > rounding(np.linalg.norm(affine[:3, :2], axis=0).min()) + SLOPE * offsets).any():
        return f"must have slices along one line, got some {aside.max():.3g} mm beside it"
    return None


def _plane(image: Dataset, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along a row and along a column, and the millimetres between rows and between columns."""
    row, column = np.array(numbers(image, "ImageOrientationPatient", 6, frame)).reshape(2, 3)
    spacing = np.array(numbers(image, "PixelSpacing", 2, frame))
    if not np.allclose([row @ row, row @ column, column @ column], [1, 0, 1], atol=1e-2):
        got = [row.tolist(), column.tolist()]
        raise refusal(image, f"must have an orientation of two perpendicular unit vectors, got {got}")
    if spacing.min() < 1e-6:
        raise refusal(image, f"must have a positive pixel spacing, got {spacing.tolist()}")
    row /= np.linalg.norm(row)  # what they miss is rounding
    column -= (column @ row) * row
    return row, column / np.linalg.norm(column), spacing


def _positions(places: list[Place], normal: np.ndarray) -> np.ndarray:
    """Positions (slices, 3) of the first pixels, in LPS+ millimetres."""
    image = places[0][0]
    if places[-1][0] is not image or part_of(image, "ImagePositionPatient", 0):
        return np.array([numbers(header, "ImagePositionPatient", 3, frame) for header, frame in places])
    offsets = np.arange(len(places)) * numbers(image, "SpacingBetweenSlices", 1)[0]
    return np.array(numbers(image, "ImagePositionPatient", 3)) + offsets[:, None] * normal
