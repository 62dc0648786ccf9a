"""Values of DICOM headers, which a damaged file may hold anything in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...optional import one_line
from ..checks import Refused, silent

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
    "RescaleType": "PixelValueTransformationSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "KVP": "CTXRayDetailsSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "InversionTimes": "MRModifierSequence",
    "FlipAngle": "MRTimingAndRelatedParametersSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "FrameType": ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence"),
}


def refusal(image: Dataset, what: str) -> Refused:
    """A complaint about one file."""
    return Refused(f"{what} (file {Path(image.filename).name})")


def value_of(image: Dataset, name: str, read: Callable[[Any], Any], frame: int = 0) -> Any:
    """read(value) of an element: a frame's own, that of all frames, or the file's; None where there is no value."""
    try:
        for holder in (part_of(image, name, frame), part_of(image, name), image):
            if holder is not None and name in holder:
                value = holder.get(name)
                return None if value is None or value == "" else read(value)
        return None
    except Exception as error:
        raise refusal(image, f"must have a readable {name}: {one_line(str(error), 80)}") from error


def text(image: Dataset, name: str) -> str:
    """Raises Refused without it."""
    value = value_of(image, name, str)
    if value is None:
        raise refusal(image, f"must have the element {name}")
    return value.strip(" \0")


def integer(image: Dataset, name: str, default: int | None = None) -> int:
    """Raises Refused without it, where it has no default."""
    value = value_of(image, name, int)
    if value is None and default is None:
        raise refusal(image, f"must have the element {name}")
    return default if value is None else value


def numbers(image: Dataset, name: str, count: int, frame: int = 0) -> list[float]:
    """Decimal numbers of a frame. Raises Refused without them, or for another count."""
    read = value_of(image, name, lambda v: [float(n) for n in (v if isinstance(v, Sequence | tuple) else [v])], frame)
    if read is None:
        raise refusal(image, f"must have the element {name}")
    # 1e9 mm are no scan, and their squares still are numbers.
    if len(read) != count or not all(abs(n) < 1e9 for n in read):
        raise refusal(image, f"must have {count} finite numbers as the element {name}, got {str(read)[:80]}")
    return read


def frames_of(image: Dataset) -> int:
    """Raises Refused where some of them are not described."""
    frames = integer(image, "NumberOfFrames", 1)
    described = len(image.get("PerFrameFunctionalGroupsSequence") or ())
    if frames < 1 or described not in (0, frames):
        raise refusal(image, f"must describe each of its frames, got {frames} frames and {described} descriptions")
    return frames


def described_frames(image: Dataset) -> int:
    """How many frames may differ from each other: 1 where nothing is said of each, whatever their number."""
    return len(image.get("PerFrameFunctionalGroupsSequence") or (0,))


def part_of(image: Dataset, name: str, frame: int | None = None) -> Dataset | None:
    """The part of a multi-frame file that holds an element of this frame alone, or without one of all frames."""
    items = image.get("SharedFunctionalGroupsSequence" if frame is None else "PerFrameFunctionalGroupsSequence") or ()
    at, kinds = frame or 0, GROUPS.get(name, ())
    for item in items[at : at + 1]:
        for kind in (kinds,) if isinstance(kinds, str) else kinds:
            if (group := item.get(kind)) and name in group[0]:
                return group[0]
    return None


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """pydicom says what it thinks of odd values, as warnings and in its log; what matters is refused here."""
    with silent(logging.getLogger("pydicom")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
