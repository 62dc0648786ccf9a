"""What the numbers of a DICOM series mean: the same in all of its slices, or told by each for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...optional import one_line
from .dicom_values import GROUPS, described_frames, frames_of, integer, numbers, refusal, text, value_of

if TYPE_CHECKING:
    from pydicom import Dataset

Place = tuple["Dataset", int]  # a file and its frame

# Elements that say what voxels are and how they were made; in two slices of one volume they do not differ.
SAME = (
    *("Modality", "SOPClassUID", "ImageType", "FrameType", "FrameOfReferenceUID"),
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PhotometricInterpretation", "PresentationLUTShape", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("PixelIntensityRelationship", "PixelIntensityRelationshipSign"),
    *("RescaleType", "Units", "DecayCorrection", "SUVType"),
    *("KVP", "ConvolutionKernel", "EchoTime", "EffectiveEchoTime", "EchoNumbers", "InversionTime", "InversionTimes"),
    *("FlipAngle", "DiffusionBValue", "TemporalPositionIdentifier", "TemporalPositionIndex"),
)
ALIKE = 0.01  # of decimal numbers: scanners write 2.46 and 2.4600001
FORBIDDEN = ("ModalityLUTSequence", "DoseGridScaling", "GridFrameOffsetVector")
PRESENTED = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}  # the PresentationLUTShape that goes with it
MEASURED = ("CT", "PT", "NM")  # modalities whose voxels are measurements


def check_same(places: Sequence[Place]) -> None:
    """Raises Refused where an element of SAME, or a rescale, is another one in some slice, or is in some only."""
    files = [place for place in places if place[1] == 0]
    for name in SAME:
        first = _meaning(places[0], name)
        for place in (places if name in GROUPS else files)[1:]:  # frames of a file share what has no group
            if not _alike(other := _meaning(place, name), first):
                got = " and ".join("none" if value is None else _short(value) for value in (first, other))
                raise refusal(place[0], f"must have the same {name} in all slices, got {got}")
    have = [
        value_of(image, name, lambda _: True, frame) is not None
        for image, frame in places
        for name in ("RescaleSlope", "RescaleIntercept")
    ]
    if any(have) and not all(have):
        raise refusal(
            places[have.index(False) // 2][0],
            "must have a RescaleSlope and a RescaleIntercept in all slices, or in none: their units would differ",
        )


def _meaning(place: Place, name: str) -> Any:
    """Text, an integer or a float, or several of them; None without a value."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return str(value).strip(" \0")
        if isinstance(value, int | float):
            return float(value) if isinstance(value, float) else int(value)
        return tuple(map(read, value)) if isinstance(value, Sequence) else str(value)

    return value_of(place[0], name, read, place[1])


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) <= ALIKE * max(abs(value), abs(other))
    return value == other


def _short(value: Any) -> str:
    return one_line("\\".join(map(str, value)) if isinstance(value, tuple) else str(value), 64)


def check_pixels(image: Dataset) -> tuple[int, int, int]:
    """Rows, columns and bits allocated. Raises Refused for pixels that are no plain intensities."""
    samples, colours = integer(image, "SamplesPerPixel", 1), text(image, "PhotometricInterpretation")
    if samples != 1 or colours not in PRESENTED:
        got = f"{samples} samples a pixel of {colours[:32]!r}"
        raise refusal(image, f"must be grey, of MONOCHROME1 or MONOCHROME2, got {got}")
    shape = value_of(image, "PresentationLUTShape", str)
    if shape not in (None, PRESENTED[colours]):
        raise refusal(image, f"must say one thing of what is bright, got {colours} with the LUT {shape[:32]!r}")
    for name in FORBIDDEN:
        if name in image:
            raise refusal(image, f"must have plain intensities on a plain grid, got the element {name}")
    rows, columns, allocated = (integer(image, name) for name in ("Rows", "Columns", "BitsAllocated"))
    if rows < 1 or columns < 1:
        raise refusal(image, f"must not be empty, got {rows} rows and {columns} columns")
    stored, high = integer(image, "BitsStored"), integer(image, "HighBit")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise refusal(image, f"must have pixels of 8, 16 or 32 bits, got {stored} of {allocated}, the highest {high}")
    return rows, columns, allocated


def is_turned(image: Dataset) -> bool:
    """Whether more is darker."""
    return text(image, "PhotometricInterpretation") == "MONOCHROME1"


def units_of(image: Dataset) -> str | None:
    """The units of a file's values, where it says that they are measurements."""
    for name in ("Units", "RescaleType"):
        unit = value_of(image, name, str)
        if unit not in (None, "US"):  # unspecified
            return unit
    modality = value_of(image, "Modality", str)
    return f"those of {modality}" if modality in MEASURED else None


def rescales_of(image: Dataset) -> list[tuple[float, float]]:
    """Slope and intercept of each frame, from stored numbers to the values of a scan.

    Of MONOCHROME1 stored numbers are turned first, the highest that its bits can hold becoming the lowest.
    Raises Refused for a slope of 0.
    """
    found = []
    for frame in range(described_frames(image)):
        slope, intercept = 1.0, 0.0
        if value_of(image, "RescaleSlope", lambda _: True, frame):
            slope, intercept = (numbers(image, n, 1, frame)[0] for n in ("RescaleSlope", "RescaleIntercept"))
        if slope == 0:
            raise refusal(image, "must have a rescale slope other than 0")
        if is_turned(image):
            ends = -1 if integer(image, "PixelRepresentation") else 2 ** integer(image, "BitsStored") - 1  # their sum
            slope, intercept = -slope, intercept + slope * ends
        found.append((slope, intercept))
    return found if len(found) > 1 else found * frames_of(image)
