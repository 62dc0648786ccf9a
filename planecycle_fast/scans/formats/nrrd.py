"""NRRD, in one file or as header and data file: what SimpleITK would read wrongly is refused by the header's text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from ...optional import require
from ..checks import DAMAGED, Refused, ScanOptions, check_gzip, check_header, check_size, one_volume, sibling
from ..orientation import LPS_TO_RAS

SPACES = ("left-posterior-superior", "left-anterior-superior", "right-anterior-superior", "lps", "las", "ras")
DATA_FILE = ("data file", "datafile")
SKIPS = ("line skip", "lineskip", "byte skip", "byteskip")
SEVERAL = ("list", "time", "none", "???", "")  # kinds of an axis along which volumes lie
HEADER_BYTES = 2**20
DTYPES = {f"{bits}-bit signed integer": f"i{bits // 8}" for bits in (8, 16, 32, 64)}  # by SimpleITK's names
DTYPES |= {f"{bits}-bit unsigned integer": f"u{bits // 8}" for bits in (8, 16, 32, 64)}
DTYPES |= {"32-bit float": "f4", "64-bit float": "f8"}


def read_nrrd(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32, affine (4, 4) to RAS+."""
    fields, begin = _fields(path)
    axis = _check(fields)
    sizes = tuple(int(size) for size in re.findall(r"\d+", fields.get("sizes", "")))
    if axis is not None:  # SimpleITK reads all volumes, as what each voxel holds
        if len(sizes) != 4:
            raise Refused(f"must have as many sizes as dimensions, got {len(sizes)} of 4")
        one_volume(sizes, axis, options)
    data, packed = data_file(path), fields.get("encoding") in ("gzip", "gz")
    if data is not None and not packed and fields.get("encoding") != "raw":
        raise Refused(f"must have a data file that is raw or packed by gzip, got {fields.get('encoding')!r}")
    with _quiet_itk() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO")  # else any other reader that likes the file's first bytes may take it
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        count = reader.GetNumberOfComponents()
        if axis is None and count != 1:
            raise Refused(f"must hold one number a voxel, got {count}")
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID()).removeprefix("vector of ")
        if kind not in DTYPES:
            raise Refused(f"must hold real numbers, got {kind}")
        dtype = np.dtype(DTYPES[kind])
        size = math.prod(reader.GetSize()) * dtype.itemsize * count
        # SimpleITK's image, twice where it turns several volumes, and float32 copies before and after turning.
        more = 0 if axis is None else 2 * size
        check_header(reader.GetSize(), dtype, dtype.itemsize + 8, max_bytes, more)
        if axis is None:
            one_volume(reader.GetSize(), 0, options)
        if packed:
            check_gzip(data or path, 0 if data else begin, size)
        elif data is not None:
            check_size(data, 0, size)
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
        image = reader.Execute()
        voxels = sitk.GetArrayViewFromImage(image)  # (k, j, i) or (k, j, i, volumes); the view dies with its image
        voxels = voxels.reshape(*voxels.shape[:3], count)[..., options.index or 0].astype(np.float32)
    return voxels.transpose(2, 1, 0), LPS_TO_RAS @ affine


@contextmanager
def _quiet_itk() -> Iterator[ModuleType]:
    """SimpleITK, whose C++ warnings do not reach stderr. Raises MissingPackageError."""
    sitk = require("SimpleITK", "scans")
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def data_file(path: Path) -> Path | None:
    """The file that holds the voxels of a header in a file of its own; None where it holds them. Raises Refused."""
    fields, _ = _fields(path)
    names = [fields[name] for name in DATA_FILE if name in fields]
    return sibling(path, names[0]) if names else None


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """What a header says, in lower case but for names of files, and where it ends."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(b"NRRD"):
        raise Refused("must be an NRRD file, got one that does not begin with NRRD")
    end = re.search(rb"\r?\n\r?\n", head)
    text = (head if end is None else head[: end.start()]).decode(errors="surrogateescape")
    found = re.findall(r"^([^#:\r\n]+):(?!=) *(.*?)[ \t\r]*$", text, re.MULTILINE)
    fields = {name.lower(): value if name.lower() in DATA_FILE else value.lower() for name, value in found}
    if len(fields) != len(found):
        raise Refused(f"{DAMAGED}: its header says something twice")
    if end is None and (len(head) == HEADER_BYTES or not any(name in fields for name in DATA_FILE)):
        raise Refused(f"{DAMAGED}: its header does not end")
    return fields, len(head) if end is None else end.end()


def _check(fields: dict[str, str]) -> int | None:
    """Refuses another file's voxels, unknown axes, colours, NaN. Returns the axis along which volumes lie, if any."""
    for name in SKIPS:
        if name in fields:
            raise Refused(f"must hold its voxels right behind its header, got the field {name!r}")
    axis, dimension = None, fields.get("dimension")
    if dimension == "4":
        directions = re.findall(r"\(.*?\)|none", fields.get("space directions", ""))
        kinds = re.findall(r"\S+", fields.get("kinds", ""))
        axis = directions.index("none") if directions.count("none") == 1 and len(directions) == 4 else None
        kind = kinds[axis] if axis is not None and len(kinds) == 4 else ""
        if kind not in SEVERAL:
            raise Refused(f"must hold one number a voxel, got an axis of the kind {kind!r}")
    if dimension != "3" and axis is None:
        raise Refused(f"must be 3D and not empty, got the dimension {dimension!r}")
    if fields.get("space") not in SPACES or "space directions" not in fields:
        raise Refused(f"must say its space ({', '.join(SPACES[:3])}) and directions, got {fields.get('space')!r}")
    if "space origin" not in fields:
        raise Refused("must say its space origin, without which it has no place in millimetres")
    if set(re.findall(r'"(.*?)"', fields.get("space units", ""))) - {"mm"}:
        raise Refused(f"must have space units of mm, got {fields['space units']}")
    for name in ("space directions", "space origin"):  # VNL prints what it thinks of NaN
        numbers = re.split(r"[(), \t]+", fields.get(name, "").replace("none", "").strip("(), \t"))
        if not all(math.isfinite(float(number)) for number in numbers if number):
            raise Refused(f"must have finite {name}, got {fields[name]}")
    return axis
