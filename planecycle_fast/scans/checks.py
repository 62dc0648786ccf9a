"""What may be asked of readers of scans, what each checks before it reads voxels, and how it refuses."""

from __future__ import annotations

import gzip
import logging
import math
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np

from ..optional import MissingPackageError, one_line, reason
from .orientation import check_axes

DAMAGED = "cannot be read, it may be truncated or damaged"
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ScanOptions:
    """How a scan is to be read, where its file leaves a choice or would be refused: `load_scan` says what they do."""

    axes: str | None = None  # the directions in which D, H, W increase; None: SPR for scans that have an orientation
    fill_nan: float | None = None  # what takes the place of NaN voxels; None: they are refused
    index: int | None = None  # of a volume, from 0, in a file that holds several
    array: str | None = None  # of an .npz, by name
    series: str | None = None  # which one of a DICOM folder; None: the only one
    allow_shear: bool = False  # axes that are not at right angles stay as they are, in the affine too
    regrid: bool = False  # sheared and unevenly spaced scans are resampled to a right, even grid

    def __post_init__(self) -> None:
        if self.axes is not None:
            object.__setattr__(self, "axes", check_axes(self.axes))  # in capitals
        if self.fill_nan is not None and not (isinstance(self.fill_nan, Real) and abs(self.fill_nan) <= LARGEST):
            raise ValueError(f"fill_nan must be a finite number within float32, got {self.fill_nan!r}")
        whole = isinstance(self.index, Integral) and not isinstance(self.index, bool)
        if self.index is not None and not (whole and self.index >= 0):
            raise ValueError(f"index must be that of a volume, 0 or more, got {self.index!r}")
        for name in ("array", "series"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} must be text, got {value!r}")


PLAIN = ScanOptions()


class Refused(Exception):
    """A scan that could be read but must not be; the message goes on from the scan's name."""


class ScanWarning(UserWarning):
    """A scan was read, but not everything in it is as one might expect."""


def warn(message: str) -> None:
    """Emits a ScanWarning, one line, at the line outside of this package that asked for the scan."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == __package__.split(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ScanWarning, stacklevel=level)


@contextmanager
def warnings_printed(path: str | Path) -> Iterator[None]:
    """Within the block each ScanWarning is a line on stderr that begins with the scan's name, as errors are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ScanWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: object, **settings: object) -> None:
            if issubclass(category, ScanWarning):
                print(f"planecycle-fast: {named(path, str(message))}", file=sys.stderr)
            else:
                others(message, category, *where, **settings)

        warnings.showwarning = show
        yield


def named(path: str | Path, message: str) -> str:
    """A message in one line that begins with the scan it is about."""
    message = message if message.startswith(f"volume {path} ") else f"volume {path}: {message}"
    return " ".join(message.split())


def check_header(shape: tuple[int, ...], dtype: np.dtype, voxel_bytes: int, max_bytes: int, more: int = 0) -> None:
    """Raises Refused unless a header declares a 3D array of real numbers that can be read in max_bytes.

    Args:
        shape: as declared.
        dtype: of the stored voxels.
        voxel_bytes: memory that reading takes for each voxel, all copies together.
        max_bytes: the limit.
        more: bytes that reading takes besides.
    """
    if dtype.hasobject or dtype.kind not in "biuf":
        raise Refused(f"must hold real numbers, got the dtype {dtype}")
    if len(shape) != 3 or min(shape) < 1:
        raise Refused(f"must be 3D and not empty, got the shape {shape}")
    size = math.prod(int(n) for n in shape) * voxel_bytes + more
    if size > max_bytes:
        raise Refused(f"must need at most {gib(max_bytes)} to be read, got a header that asks for {gib(size)}")


def one_volume(
    shape: tuple[int, ...], axis: int, options: ScanOptions, more: str = ""
) -> tuple[tuple[int, ...], int | None]:
    """The volume that was asked for, in a file of one or several.

    Args:
        shape: as declared: 4D where there are several.
        axis: along which they lie.
        options: what was asked for.
        more: what to say where nothing was.

    Returns the volume's own shape, and its index; None in a file of one. Raises Refused where there is no such volume.
    """
    several = len(shape) == 4
    count = shape[axis] if several else 1
    if options.index is not None and options.index >= count:
        raise Refused(f"must hold a volume of index {options.index}, got {count} volume{'s' * (count != 1)}")
    if not several:
        return shape, None
    if options.index is None:
        raise Refused(
            f"must be 3D and not empty, got the shape {shape}, {count} volume{'s' * (count != 1)}: "
            f"index (--index) picks one, from 0{more}"
        )
    return shape[:axis] + shape[axis + 1 :], options.index


def sibling(path: Path, name: str) -> Path:
    """A header's data file. Raises Refused unless it is one in the same folder, by its bare name."""
    if not name or name in (".", "..") or re.search(r'[/\\:*?"<>|\0]', name) or name.split()[0] == "LIST":
        raise Refused(f"must name one data file in its own folder, got {one_line(name, 100)!r}")
    if not path.with_name(name).is_file():
        raise Refused(f"must have its data file beside it, got no file {one_line(name, 100)!r}")
    return path.with_name(name)


def check_size(path: Path, begin: int, size: int) -> None:
    """Refuses plain data, from byte `begin`, that are more or less than `size` bytes: readers see only the latter."""
    if (there := path.stat().st_size - begin) != size:
        raise Refused(f"{DAMAGED}: it must hold {size} bytes of voxels, got {there}")


def unpacked(path: Path, begin: int, size: int) -> memoryview:
    """What a stream of zlib or gzip packs, from byte `begin`. Refuses other than `size` bytes, and a wrong checksum."""
    unpacking, data, filled = zlib.decompressobj(47), bytearray(size), 0
    with path.open("rb") as file:
        file.seek(begin)
        while filled <= size and not unpacking.eof:
            packed = unpacking.unconsumed_tail or file.read(2**20)
            if not packed:
                raise Refused(f"{DAMAGED}: its voxels end too early")
            some = unpacking.decompress(packed, 2**20)
            data[filled : filled + len(some)] = some
            filled += len(some)
    if filled != size:
        raise Refused(f"{DAMAGED}: it must unpack to {size} bytes")
    return memoryview(data)


def gib(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.3g} GiB"


def check_gzip(path: Path, begin: int, size: int, more: int = 0) -> None:
    """Refuses what its reader would not see: packed data, from byte `begin`, of another size or checksum.

    `more` bytes may follow the `size` ones.
    """
    with path.open("rb") as file:
        file.seek(begin)
        with gzip.GzipFile(fileobj=file) as unpacked:
            left = size
            while left >= -more and (chunk := unpacked.read(2**20)):
                left -= len(chunk)
    if not -more <= left <= 0:
        raise Refused(f"{DAMAGED}: it must unpack to {size} bytes")


@contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    """Within the block it says nothing."""
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Within the block what libraries raise, which of a damaged file can be anything, is Refused; OSError stays."""
    try:
        yield
    except (OSError, Refused):
        raise
    except Exception as error:
        raise Refused(f"{DAMAGED}: {reason(error)} (file {path.name})") from error


@contextmanager
def complaints(path: str | Path) -> Iterator[None]:
    """What goes wrong in reading a scan becomes a ValueError of one line that begins with its name."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of casts to float32, whose results are looked at
            yield
    except MissingPackageError:
        raise
    except Exception as error:  # a damaged file can raise anything in the libraries that read it
        raise ValueError(f"volume {path} {one_line(_complaint(Path(path), error))}") from error


def _complaint(path: Path, error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # the system's, not a library's
        where = f" (file {Path(error.filename).name})" if error.filename and Path(error.filename) != path else ""
        return f"cannot be read: {error.strerror}{where}"
    return f"{DAMAGED}: {reason(error)}"
