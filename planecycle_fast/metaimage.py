"""MetaImage, in one file (.mha) or as header and data file (.mhd): read by SimpleITK after its text was checked."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from .scan_checks import (
    DAMAGED,
    LPS_TO_RAS,
    Refused,
    check_header,
    check_size,
    check_zlib,
    one_line,
    one_volume,
    quiet_itk,
    sibling,
)
from .scan_options import ScanOptions

HEADER_BYTES = 2**16
DTYPES = {"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4"}
DTYPES |= {"LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4", "DOUBLE": "f8"}  # LONG has 4 bytes, or 8
TRUE, FALSE = ("true", "1"), ("false", "0")
DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")
ORIGINS = ("Offset", "Position", "Origin")
SPACINGS = ("ElementSpacing", "ElementSize")  # SimpleITK takes the size where there is no spacing


def read_metaimage(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32 and their affine (4, 4) to RAS+.

    Where the header gives no directions there is no orientation: voxels (k, j, i), and the millimetres along k, j, i.
    """
    fields, begin = _fields(path)
    sizes = tuple(int(size) for size in fields["DimSize"].split() if size.isdecimal())
    dtype, packed = _check(fields, len(sizes))
    whole = math.prod(sizes) * dtype.itemsize
    shape, index = one_volume(sizes, 3, options)
    # SimpleITK's image, packed ones with all volumes beside it, and float32 copies before and after turning.
    check_header(shape, dtype, dtype.itemsize + 8, max_bytes, 0 if index is None else whole)
    data = data_file(path)
    (check_zlib if packed else check_size)(data or path, 0 if data else begin, whole)
    with quiet_itk() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if tuple(reader.GetSize()) != sizes or reader.GetNumberOfComponents() != 1:
            raise Refused(f"must have sizes that can be read, got {fields['DimSize']!r}")
        if index is not None:
            reader.SetExtractSize([*shape, 0])
            reader.SetExtractIndex([0, 0, 0, index])
        image = reader.Execute()
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        voxels = sitk.GetArrayViewFromImage(image).astype(np.float32)  # (k, j, i); the view dies with its image
    if not any(name in fields for name in DIRECTIONS):
        return voxels, np.linalg.norm(affine[:3, :3], axis=0)[::-1]
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
    if np.dtype(DTYPES[kind]).itemsize > 1 and not {"BinaryDataByteOrderMSB", "ElementByteOrderMSB"} & set(fields):
        raise Refused("must say the order of its bytes (BinaryDataByteOrderMSB)")
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
            if names == SPACINGS and min(numbers) <= 0:
                raise Refused(f"must have a positive {name}, got {one_line(fields[name], 100)!r}")
    return np.dtype(DTYPES[kind]), flags["CompressedData"]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
