"""The DICOM series of a folder: found, listed, and one of them picked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...optional import one_line, require
from ..checks import Refused, complaints, damaged
from .dicom_values import integer, silent_pydicom, text, value_of

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom", ".ima")
DEFLATED = "1.2.840.10008.1.2.1.99"
SHOWN = 4  # series in one line
UID_END = 8  # characters that lists show of a UID; a shorter number is a series', not the end of another one's UID
TAGS = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "Rows", "Columns", "NumberOfFrames"]


@dataclass(frozen=True)
class Series:
    """What a list of series says of one.

    Attributes:
        number: SeriesNumber, None without one; of several series it may be the same.
        uid, description, modality: as in its headers, "" without one.
        images: frames, in all its files.
        size: rows and columns of the first one.
        paths: its files.
    """

    number: int | None
    uid: str
    description: str
    modality: str
    images: int
    size: tuple[int, int]
    paths: tuple[Path, ...] = field(repr=False)

    def __str__(self) -> str:
        rows, columns = self.size
        named = f" {one_line(self.description, 32)!r}" if self.description else ""
        number = "no number" if self.number is None else self.number
        return f"{number}: {self.modality or 'no modality'}{named}, {self.images} images of {rows} x {columns}"


def list_series(folder: str | Path) -> list[Series]:
    """The image series in a folder and its folders, by number.

    Raises ValueError for a path that is no readable folder or holds no series, MissingPackageError without pydicom.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"volume {folder} must be a folder of DICOM files, got none there")
    with complaints(folder):
        return _found(folder)[0]


def files_of(folder: Path, wanted: str | None = None) -> tuple[Path, ...]:
    """The files of the series that is picked, or of the only one.

    Raises Refused where that is not one series, or something may be missing of it; OSError.
    """
    series, problems = _found(folder)
    if wanted is None and problems:  # which may be of the series that is there
        raise next(iter(problems.values()))
    picked = _picked(series, wanted)
    folders = {path.parent for path in picked.paths}
    for path, problem in problems.items():
        if path.parent in folders:
            raise problem
    return picked.paths


def _picked(series: list[Series], wanted: str | None) -> Series:
    if wanted is None:
        if len(series) == 1:
            return series[0]
        raise Refused(f"must hold exactly one image series, or have one picked (--series), got {_listed(series)}")
    wanted = wanted.strip()
    end = bool(wanted) and (len(wanted) >= UID_END or not wanted.isdecimal())
    for found in (
        [each for each in series if each.number is not None and str(each.number) == wanted],
        [each for each in series if each.uid == wanted],
        [each for each in series if each.description == wanted],
        [each for each in series if end and each.uid.endswith(wanted)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise Refused(f"must have one series {wanted!r}, got {_listed(found)}")
    raise Refused(f"must have a series {one_line(wanted, 64)!r}, got {_listed(series)}")


def _listed(series: list[Series]) -> str:
    more = f"; and {len(series) - SHOWN} more, see planecycle-fast series" if len(series) > SHOWN else ""
    return f"{len(series)}: {'; '.join(f'{each} (...{each.uid[-UID_END:]})' for each in series[:SHOWN])}{more}"


def _found(folder: Path) -> tuple[list[Series], dict[Path, Refused]]:
    """All series with images, and files of which something of a series may be missing, each with what it is.

    Raises Refused where there are no series.
    """
    with silent_pydicom():
        series, problems = _sorted_out(_files(folder, set()))
    if not series:
        nothing = "must hold a DICOM series, got a folder without DICOM images (files need the DICM prefix)"
        raise next(iter(problems.values()), Refused(nothing))
    return series, problems


def _sorted_out(files: Iterable[Path]) -> tuple[list[Series], dict[Path, Refused]]:
    """What `_found` says, the series by number."""
    groups: dict[str, list[Series]] = {}  # of one file each
    others, named, problems = [], set(), {}
    for path in files:
        if path.is_symlink() and not path.exists():
            problems[path] = Refused(f"must hold its files, got a link to a file that is not there, {path.name}")
            continue
        if not path.is_file():
            continue
        with path.open("rb") as file:  # what the system refuses, it says best itself
            begins = file.read(132)[128:] == b"DICM"
        if not begins:
            others.append(path)
            continue
        try:
            if found := _image(path):
                groups.setdefault(found.uid, []).append(found)
                named.add(_pattern(path))
        except Refused as problem:
            problems[path] = problem
    for path in others:  # a damaged slice at an end of the series would leave no gap
        if path.suffix.lower() in SUFFIXES or _pattern(path) in named:
            problems[path] = Refused(
                f"cannot be read, it may be damaged: {path.name} is not a DICOM file with its prefix"
            )
    series = [
        replace(parts[0], images=sum([each.images for each in parts]), paths=tuple([each.paths[0] for each in parts]))
        for parts in groups.values()
    ]
    return sorted(series, key=lambda each: (each.number is None, each.number or 0)), problems


def _image(path: Path) -> Series | None:
    """What a series would be of this file alone; None of a report, or a DICOMDIR. Raises OSError, Refused."""
    header = header_of(path, specific_tags=TAGS)
    with damaged(path):
        kind = header.file_meta.get("MediaStorageSOPClassUID")
        if "Rows" not in header and kind is not None and "Image Storage" not in kind.name:
            return None
        words = [(value_of(header, name, str) or "").strip(" \0") for name in ("SeriesDescription", "Modality")]
        size = integer(header, "Rows", 0), integer(header, "Columns", 0)
        frames = max(1, integer(header, "NumberOfFrames", 1))
        return Series(_number(header), text(header, "SeriesInstanceUID"), *words, frames, size, (path,))


def _number(header: Dataset) -> int | None:
    try:
        return value_of(header, "SeriesNumber", int)
    except Refused:  # it is for lists only
        return None


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files of a folder and its folders, but for hidden ones; by links as well, each folder once."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:
            yield from _files(path, seen)


def header_of(path: Path, **settings: Any) -> Dataset:
    """A header, as far as the pixels. Raises OSError, Refused."""
    pydicom = require("pydicom", "scans")
    with damaged(path):
        if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:  # of any size
            raise Refused(f"must not be deflated as a whole (file {path.name})")
        return pydicom.dcmread(path, stop_before_pixels=True, **settings)


def _pattern(path: Path) -> tuple[Path, str]:
    """A file's name with all numbers alike: slices of a series usually share it, in one folder."""
    return path.parent, re.sub(r"\d+", "0", path.name.lower())
