"""MetaImage, in one file (.mha) or as header and data file (.mhd).

By itself: SimpleITK guesses what a header leaves out, and prints what it thinks of a damaged one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from ...optional import one_line
from ..checks import DAMAGED, Refused, ScanOptions, check_header, check_size, one_volume, sibling, unpacked
from ..orientation import LPS_TO_RAS

HEADER_BYTES = 2**16
DTYPES = {"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4"}
DTYPES |= {"LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4", "DOUBLE": "f8"}  # LONG has 4 bytes, or 8
TRUE, FALSE = ("true", "1"), ("false", "0")
ORDERS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")
ORIGINS = ("Offset", "Position", "Origin")
SPACINGS = ("ElementSpacing", "ElementSize")  # the size where there is no spacing, as others do


def read_metaimage(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32 and their affine (4, 4) to RAS+.

    Where the header gives no directions there is no orientation: voxels (k, j, i), and the millimetres along k, j, i.
    """
    fields, begin = _fields(path)
    sizes = tuple(int(size) for size in fields["DimSize"].split() if size.isdecimal())
    dtype, packed = _check(fields, len(sizes))
    whole = math.prod(sizes) * dtype.itemsize
    shape, index = one_volume(sizes, 3, options)
    # The file's voxels, of packed ones all volumes, and float32 copies before and after turning.
    check_header(shape, dtype, dtype.itemsize + 8, max_bytes, whole if packed and index is not None else 0)
    data = data_file(path)
    data, begin = (path, begin) if data is None else (data, 0)
    size = math.prod(shape) * dtype.itemsize
    first = size * (index or 0)
    if packed:
        buffer = unpacked(data, begin, whole)[first : first + size]
    else:
        check_size(data, begin, whole)
        with data.open("rb") as file:
            file.seek(begin + first)
            buffer = file.read(size)
    voxels = np.frombuffer(buffer, dtype).reshape(shape[::-1]).astype(np.float32)  # (k, j, i)
    spacing = _numbers(fields, SPACINGS)[:3]
    if not any(name in fields for name in DIRECTIONS):
        return voxels, spacing[::-1]
    affine = np.eye(4)
    directions = _numbers(fields, DIRECTIONS).reshape(len(sizes), len(sizes))  # a row per axis
    affine[:3, :3] = directions[:3, :3].T * spacing
    affine[:3, 3] = _numbers(fields, ORIGINS)[:3]
    return voxels.transpose(2, 1, 0), LPS_TO_RAS @ affine


def data_file(path: Path) -> Path | None:
    """The file that holds the voxels of a header in a file of its own; None where it holds them. Raises Refused."""
    name = _fields(path)[0]["ElementDataFile"]
    if name == "LOCAL":
        return None
    if re.match(r"LIST\b", name) or "%" in name:
        raise Refused(f"must have one data file, got {one_line(name, 100)!r}")
    return sibling(path, name)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """What a header says, and where it ends: behind the line that names the data."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    end = re.search(rb"^ElementDataFile *= *[^\r\n]*(\r?\n|$)", head, re.MULTILINE)
    if end is None:
        raise Refused("must be a MetaImage, got a file whose header does not name its data (ElementDataFile)")
    text = head[: end.end()].decode(errors="surrogateescape")
    fields = re.findall(r"^([A-Za-z]+) *= *(.*?)[ \t\r]*$", text, re.MULTILINE)
    known = dict(fields)
    if len(known) != len(fields):
        raise Refused(f"{DAMAGED}: its header says something twice")
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in known:
            raise Refused(f"must say its {name}")
    return known, end.end()


def _check(fields: dict[str, str], dimensions: int) -> tuple[np.dtype, bool]:
    """Refuses what SimpleITK would guess, or read wrongly. Returns the voxels' dtype, and whether they are packed."""
    if fields.get("ObjectType", "Image").lower() != "image":
        raise Refused(f"must be an image, got the ObjectType {fields['ObjectType'][:50]!r}")
    if fields["NDims"] != str(dimensions) or len(fields["DimSize"].split()) != dimensions:
        raise Refused(
            f"must have as many sizes as dimensions, got {fields['DimSize'][:100]!r} of {fields['NDims'][:9]}"
        )
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise Refused(f"must hold one number a voxel, got {fields['ElementNumberOfChannels'][:9]}")
    if fields.get("HeaderSize", "0") != "0":
        raise Refused(f"must hold its voxels right behind its header, got the HeaderSize {fields['HeaderSize'][:20]}")
    kind = fields["ElementType"].removeprefix("MET_")
    if kind not in DTYPES:
        raise Refused(f"must hold real numbers of a known size, got the ElementType {fields['ElementType'][:50]!r}")
    flags = {}
    for name, default in (("BinaryData", None), ("CompressedData", "False")):
        text = fields.get(name, default)
        if text is None or text.lower() not in TRUE + FALSE:
            raise Refused(f"must say whether it is {name}, True or False, got {text!r}")
        flags[name] = text.lower() in TRUE
    if not flags["BinaryData"]:
        raise Refused("must hold binary data, got text")
    dtype = np.dtype(DTYPES[kind])
    orders = {fields[name].lower() for name in ORDERS if name in fields}
    if dtype.itemsize > 1 and (len(orders) != 1 or not orders <= {*TRUE, *FALSE}):
        raise Refused(f"must say the order of its bytes (BinaryDataByteOrderMSB), True or False, got {sorted(orders)}")
    if not set(SPACINGS) & set(fields):
        raise Refused("must say its ElementSpacing, without which it has no size in millimetres")
    if set(DIRECTIONS) & set(fields) and not set(ORIGINS) & set(fields):
        raise Refused("must say its Offset, without which it has no place in millimetres")
    for names, count in ((DIRECTIONS, dimensions**2), (ORIGINS, dimensions), (SPACINGS, dimensions)):
        if len(given := [name for name in names if name in fields]) > 1 and names != SPACINGS:
            raise Refused(f"must say once where its axes lie, got {' and '.join(given)}")
        for name in given:
            numbers = [_number(number) for number in fields[name].split()]
            if len(numbers) != count or not all(map(math.isfinite, numbers)):
                raise Refused(f"must have {count} finite numbers as {name}, got {one_line(fields[name], 100)!r}")
            if count == 16 and any(numbers[n] for n in (3, 7, 11, 12, 13, 14)):
                raise Refused(f"must keep space and time apart, got {one_line(fields[name], 100)!r} as {name}")
            rows = np.reshape(numbers, (-1, dimensions))  # of directions, one per axis
            if names == DIRECTIONS and not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3):
                raise Refused(f"must have directions of length 1, got {one_line(fields[name], 100)!r} as {name}")
            if names == SPACINGS and min(numbers) <= 0:
                raise Refused(f"must have a positive {name}, got {one_line(fields[name], 100)!r}")
    return dtype.newbyteorder(">" if orders & set(TRUE) else "<"), flags["CompressedData"]


def _numbers(fields: dict[str, str], names: tuple[str, ...]) -> np.ndarray:
    """Of the first of these fields that is there."""
    return np.array([_number(number) for number in next(fields[name] for name in names if name in fields).split()])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
