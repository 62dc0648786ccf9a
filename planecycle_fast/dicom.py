"""One DICOM series as a volume: what its headers must say, its order, its place in space."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dicom_pixels import decoded
from .optional import require
from .scan_checks import DAMAGED, Refused, check_header, one_line, reason
from .scan_options import ScanOptions

if TYPE_CHECKING:
    from pydicom import Dataset

# Where multi-frame files keep, for each frame or for all of them, what others have at their root.
GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
RESCALE = (("RescaleSlope", 1, (1.0,)), ("RescaleIntercept", 1, (0.0,)))  # name, numbers, default
SUFFIXES = (".dcm", ".dicom", ".ima")
DEFLATED = "1.2.840.10008.1.2.1.99"
ROUNDING = 0.1  # mm, to which some scanners write positions


def read_dicom(folder: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The one image series in a folder, sorted along the normal of its slices, rescaled to its units.

    Returns voxels (k, j, i) float32: slice, row, column; and the affine (4, 4) of (i, j, k) to DICOM's own
    millimetres, LPS+.

    Raises Refused, MissingPackageError, OSError.
    """
    require("SimpleITK", "scans")  # of packed pixels, which show only later
    with _silent_pydicom():
        images = _images(folder)
        rows, columns, allocated = _same_pixels(images)
        frames = [_frames(image) for image in images]
        if len(images) > 1 and max(frames) > 1:
            raise Refused(f"must hold slices or one multi-frame file, got {len(images)} files with multi-frame ones")
        depth = len(images) if len(images) > 1 else frames[0]
        # Of one file at a time: itself, its pixels, and those rescaled in up to float64 and in float32.
        one = rows * columns * frames[0] * (3 * allocated // 8 + 8 + 8)
        # And of all of them the volume in float32, before and after turning.
        check_header((depth, rows, columns), np.dtype(f"u{allocated // 8}"), 8, max_bytes, one)
        if depth < 2:
            raise Refused("must be a volume of at least 2 slices, got one slice")
        places = [(image, 0) for image in images] if len(images) > 1 else [(images[0], n) for n in range(depth)]
        order, affine = _geometry(places)
        if len(images) > 1:
            images = [images[n] for n in order]
        elif order[0] > order[-1]:  # frames stay as they are; the affine follows
            order = order[::-1]
            affine[:3, 3] += (depth - 1) * affine[:3, 2]
            affine[:3, 2] *= -1
        if len(images) == 1 and (np.diff(order) < 0).any():
            raise Refused("must have its frames in the order of their positions")
        paths = [Path(image.filename) for image in images]
        rescale = [tuple(_numbers(image, *how)[0] for how in RESCALE) for image in images]
        return decoded(paths, rescale, (columns, rows, frames[0]), any(map(_is_packed, images)), one), affine


def _images(folder: Path) -> list[Dataset]:
    """The headers of all images of a folder that holds one series."""
    pydicom = require("pydicom", "scans")
    headers, others = [], []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise Refused(f"must hold its files, got a link to a file that is not there, {path.name}")
        if path.name.startswith(".") or not path.is_file():
            continue
        with path.open("rb") as file:  # what the system refuses, it says best itself
            begins = file.read(132)[128:] == b"DICM"
        if not begins:
            others.append(path)
            continue
        try:
            if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:  # of any size
                raise Refused(f"must not be deflated as a whole (file {path.name})")
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except (OSError, Refused):
            raise
        except Exception as error:  # a damaged file can raise anything
            raise Refused(f"{DAMAGED}: {reason(error)} (file {path.name})") from error
        kind = header.file_meta.get("MediaStorageSOPClassUID")
        if "Rows" in header or kind is None or "Image Storage" in kind.name:  # not a report, nor a DICOMDIR
            headers.append(header)
    named = {_pattern(Path(header.filename)) for header in headers}
    for path in others:  # a damaged slice at an end of the series would leave no gap
        if path.suffix.lower() in SUFFIXES or _pattern(path) in named:
            raise Refused(f"cannot be read, it may be damaged: {path.name} is not a DICOM file with its prefix")
    if not headers:
        raise Refused(
            "must hold a DICOM series, got a folder without DICOM images "
            "(files need the DICM prefix; folders in it are not searched)"
        )
    series = Counter(_text(header, "SeriesInstanceUID") for header in headers)
    if len(series) > 1:
        some = ", ".join(f"...{uid[-16:]} ({count} images)" for uid, count in series.most_common(8))
        raise Refused(f"must hold exactly one image series, got {len(series)}: {some}")
    return headers


def _pattern(path: Path) -> str:
    """A file's name with all numbers alike: slices of a series usually share it."""
    return re.sub(r"\d+", "0", path.name.lower())


def _same_pixels(images: list[Dataset]) -> tuple[int, int, int]:
    """Rows, columns and bits allocated, the same for all images."""
    first = _pixels(images[0])
    for image in images[1:]:
        if _pixels(image) != first:
            raise _refuse(image, f"must have the same size and type of pixels in all images, got {first} and others")
    return first[:3]


def _pixels(image: Dataset) -> tuple[int, int, int, bool]:
    """Rows, columns, bits allocated, whether they are signed."""
    samples, colours = _integer(image, "SamplesPerPixel", 1), _text(image, "PhotometricInterpretation")
    if samples != 1 or colours != "MONOCHROME2":  # in MONOCHROME1 more is darker, and readers disagree on what to do
        raise _refuse(image, f"must be grey, of MONOCHROME2, got {samples} samples a pixel of {colours[:32]!r}")
    for name in ("ModalityLUTSequence", "DoseGridScaling", "GridFrameOffsetVector"):
        if name in image:
            raise _refuse(image, f"must have plain intensities on a plain grid, got the element {name}")
    rows, columns, allocated = (_integer(image, name) for name in ("Rows", "Columns", "BitsAllocated"))
    stored = _integer(image, "BitsStored")
    if rows < 1 or columns < 1:
        raise _refuse(image, f"must not be empty, got {rows} rows and {columns} columns")
    high = _integer(image, "HighBit")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise _refuse(image, f"must have pixels of 8, 16 or 32 bits, got {stored} of {allocated}, the highest {high}")
    for name, _, default in RESCALE:
        values = {_numbers(image, name, 1, default, n)[0] for n in range(_frames(image))}
        if len(values) > 1 or (name == "RescaleSlope" and 0 in values):
            raise _refuse(image, "must have one rescale slope, not 0, and one intercept in all its frames")
    return rows, columns, allocated, bool(_integer(image, "PixelRepresentation"))


def _is_packed(image: Dataset) -> bool:
    syntax = image.file_meta.get("TransferSyntaxUID")
    return syntax is not None and bool(syntax.is_compressed)


def _frames(image: Dataset) -> int:
    frames = _integer(image, "NumberOfFrames", 1)
    described = len(image.get("PerFrameFunctionalGroupsSequence") or ())
    if frames < 1 or described not in (0, frames):
        raise _refuse(image, f"must describe each of its frames, got {frames} frames and {described} descriptions")
    return frames


def _geometry(places: list[tuple[Dataset, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The slices' order along their normal, and the affine (4, 4) of sorted (i, j, k) to LPS+, from (file, frame)."""
    along_row, along_column, spacing = _plane(*places[0])
    for image, frame in places[1:]:
        if not np.allclose(np.concatenate(_plane(image, frame)), np.concatenate(_plane(*places[0])), 1e-3, 1e-3):
            raise _refuse(image, "must have the same orientation and pixel spacing in all slices")
    normal = np.cross(along_row, along_column)
    normal /= np.linalg.norm(normal)
    positions = _positions(places, normal)  # (slices, 3) mm
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    offsets = (positions - positions[0]) @ normal
    gaps = np.diff(offsets)
    if gaps.min() <= 0.01 * gaps.max():
        raise Refused("must have one image at every position, got several images at one position, a time series?")
    step = offsets[-1] / (len(places) - 1)
    # A missing slice moves another by a quarter of this step or more; rounding and thick slices need less.
    allowed = min(max(ROUNDING, 0.01 * step), step / 5)
    if abs(offsets - step * np.arange(len(places))).max() > allowed:
        raise Refused(
            f"must have evenly spaced slices, got {gaps.min():.4g} to {gaps.max():.4g} mm: "
            "slices are missing or unevenly spaced"
        )
    # A tenth of a degree is rounding of the orientation; tilted gantries stand at half a degree or more.
    aside = np.linalg.norm(positions - positions[0] - offsets[:, None] * normal, axis=1)
    if (aside > ROUNDING + 2e-3 * offsets).any():
        degrees = np.degrees(np.arctan2(aside[-1], offsets[-1]))
        raise Refused(f"must have slices stacked along their normal, got a gantry tilt of {degrees:.3g} degrees")
    affine = np.eye(4)
    affine[:3, 0] = along_row * spacing[1]
    affine[:3, 1] = along_column * spacing[0]
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(places) - 1)
    affine[:3, 3] = positions[0]
    return order, affine


def _plane(image: Dataset, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along a row and along a column, and the millimetres between rows and between columns."""
    directions = np.array(_numbers(image, "ImageOrientationPatient", 6, frame=frame)).reshape(2, 3)
    spacing = np.array(_numbers(image, "PixelSpacing", 2, frame=frame))
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-2):
        raise _refuse(image, f"must have an orientation of two perpendicular unit vectors, got {directions.tolist()}")
    if spacing.min() < 1e-6:
        raise _refuse(image, f"must have a positive pixel spacing, got {spacing.tolist()}")
    return directions[0], directions[1], spacing


def _positions(places: list[tuple[Dataset, int]], normal: np.ndarray) -> np.ndarray:
    """Positions (slices, 3) of the first pixels, in LPS+ millimetres."""
    image = places[0][0]
    if places[-1][0] is not image or _own(image, "ImagePositionPatient", 0):
        return np.array([_numbers(header, "ImagePositionPatient", 3, frame=frame) for header, frame in places])
    offsets = np.arange(len(places)) * _numbers(image, "SpacingBetweenSlices", 1)[0]
    return np.array(_numbers(image, "ImagePositionPatient", 3)) + offsets[:, None] * normal


# Values of headers, which a damaged file may hold anything in


def _refuse(image: Dataset, what: str) -> Refused:
    return Refused(f"{what} (file {Path(image.filename).name})")


def _value(image: Dataset, name: str, read: Callable[[Any], Any], holder: Dataset | None = None) -> Any:
    """read(value) of an element, None without it or without a value."""
    try:
        value = (image if holder is None else holder).get(name)
        return None if value is None or value == "" else read(value)
    except Exception as error:
        raise _refuse(image, f"must have a readable {name}: {one_line(str(error), 80)}") from error


def _text(image: Dataset, name: str) -> str:
    value = _value(image, name, str)
    if value is None:
        raise _refuse(image, f"must have the element {name}")
    return value.strip(" \0")


def _integer(image: Dataset, name: str, default: int | None = None) -> int:
    value = _value(image, name, int)
    if value is None and default is None:
        raise _refuse(image, f"must have the element {name}")
    return default if value is None else value


def _own(image: Dataset, name: str, frame: int) -> Dataset | None:
    """The part of a multi-frame file that holds an element of this frame alone."""
    frames = image.get("PerFrameFunctionalGroupsSequence") or ()
    groups = frames[frame].get(GROUPS[name]) if frame < len(frames) and name in GROUPS else None
    return groups[0] if groups and name in groups[0] else None


def _numbers(
    image: Dataset, name: str, count: int, default: Sequence[float] | None = None, frame: int = 0
) -> list[float]:
    """Decimal numbers of a frame: its own, those of all frames, or those of the file."""
    holder = _own(image, name, frame)
    shared = image.get("SharedFunctionalGroupsSequence")
    if holder is None and shared and name in GROUPS and (groups := shared[0].get(GROUPS[name])):
        holder = groups[0] if name in groups[0] else None
    found = _value(image, name, lambda v: [float(n) for n in (v if isinstance(v, Sequence | tuple) else [v])], holder)
    if found is None:
        if default is None:
            raise _refuse(image, f"must have the element {name}")
        return list(default)
    # 1e9 mm are no scan, and their squares still are numbers.
    if len(found) != count or not all(abs(n) < 1e9 for n in found):
        raise _refuse(image, f"must have {count} finite numbers as the element {name}, got {str(found)[:80]}")
    return found


@contextmanager
def _silent_pydicom() -> Iterator[None]:
    """pydicom says what it thinks of odd values, as warnings and in its log; what matters is refused here."""
    logger = logging.getLogger("pydicom")
    was, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was
