"""NIfTI, Analyze and FreeSurfer's MGH: what nibabel guesses or lets pass is found out or refused."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...optional import reason, require
from ..checks import Refused, ScanOptions, check_gzip, check_header, one_volume, silent, warn

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
MEANINGS = ("vector", "displacement vector", "symmetric matrix", "general matrix", "quaternion", "rgb vector")
MEANINGS += ("rgba vector", "pointset", "triangle", "dimless")
MGH_DTYPES = {0: "u1", 1: "i4", 3: "f4", 4: "i2", 10: "u2"}
TRAILING = 2**20  # bytes that may follow the voxels


def read_nifti(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32 and their affine (4, 4) to RAS+ millimetres, of .nii and .nii.gz, .hdr and .img.

    Where neither sform nor qform is set, and of Analyze, there is no orientation: voxels (k, j, i), and the
    millimetres along k, j, i. Raises Refused, MissingPackageError, OSError, and whatever nibabel makes of a damaged
    file.
    """
    pair(path)
    image = _opened(path, "NIfTI")
    header = image.header
    nifti = "qform_code" in header  # else Analyze
    if nifti and (meaning := header.get_intent()[0]) in MEANINGS:
        raise Refused(f"must hold one number a voxel, got the intent {meaning!r}")
    unit = header.get_xyzt_units()[0] if nifti else "unknown"
    if unit not in MILLIMETRES:
        raise Refused(f"must have units of length, got {unit!r}")
    single = nifti and header["magic"].item()[:2] == b"n+"
    voxels = _voxels(path, image, options, max_bytes, header.sizeof_hdr if single else 0)
    if nifti and header["sform_code"] and header["qform_code"]:
        _compare_forms(path, header, voxels.shape, MILLIMETRES[unit])
    if not nifti or (not header["sform_code"] and not header["qform_code"]):
        return voxels.transpose(2, 1, 0), _declared_zooms(image) * MILLIMETRES[unit]
    return voxels, np.diag([*[MILLIMETRES[unit]] * 3, 1.0]) @ image.affine


def _declared_zooms(image: SpatialImage) -> np.ndarray:  # (3,), along k, j, i
    """As they stand in the file: nibabel makes 1 of 0, and drops signs."""
    holder = image.file_map["header" if "header" in image.file_map else "image"]
    with holder.get_prepare_fileobj(mode="rb") as file:
        return np.array(type(image.header).from_fileobj(file, check=False).get_zooms()[2::-1], dtype=np.float64)


def pair(path: Path) -> Path | None:
    """The other file of a header and its voxels, .hdr and .img; None of others. Raises Refused where it is missing."""
    other = {".hdr": ".img", ".img": ".hdr"}.get(path.suffix.lower())
    if other is None:
        return None
    partner = path.with_suffix(other.upper() if path.suffix.isupper() else other)
    if not partner.is_file():
        raise Refused(f"must have its {'header' if other == '.hdr' else 'voxels'} beside it, got no {partner.name}")
    return partner


def read_freesurfer(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `read_nifti`, of .mgz and .mgh; without orientation where the header does not vouch for it."""
    with gzip.open(path) if path.suffix.lower() == ".mgz" else path.open("rb") as file:
        head = file.read(30)
    version, *shape, code, _, oriented = struct.unpack(">7ih", head)
    if version != 1 or code not in MGH_DTYPES:
        raise Refused(f"must be a FreeSurfer image of version 1 and a known type, got version {version}, type {code}")
    _check(tuple(shape), np.dtype(MGH_DTYPES[code]), options, max_bytes)  # before nibabel looks behind the voxels
    image = _opened(path, "FreeSurfer")
    voxels = _voxels(path, image, options, max_bytes, 0)
    if not oriented:
        return voxels.transpose(2, 1, 0), np.array(image.header["delta"][::-1], dtype=np.float64)
    return voxels, image.affine


def _check(
    shape: tuple[int, ...], dtype: np.dtype, options: ScanOptions, max_bytes: int
) -> tuple[tuple[int, ...], int | None]:
    """The shape of the volume that is to be read, and its index in a file of several. Raises Refused."""
    while len(shape) > 3 and shape[-1] == 1:  # some tools write (x, y, z, 1)
        shape = shape[:-1]
    volume, index = one_volume(tuple(map(int, shape)), 3, options)
    # The file's voxels, scaled in up to float64, and float32 copies before and after turning.
    check_header(volume, dtype, dtype.itemsize + max(dtype.itemsize, 8) + 8, max_bytes)
    return volume, index


def _opened(path: Path, kind: str) -> SpatialImage:
    """nibabel's image, whose voxels are still in the file."""
    nibabel = require("nibabel", "scans")
    try:
        with silent(nibabel.imageglobals.logger):  # which prints what nibabel mends in a header
            image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise Refused(f"must be a {kind} image: {reason(error)}") from None
    known = (nibabel.MGHImage,) if kind == "FreeSurfer" else (nibabel.AnalyzeImage,)  # of which NIfTI's are subclasses
    if not isinstance(image, known):
        raise Refused(f"must be a {kind} image, got {type(image).__name__}")
    return image


def _voxels(
    path: Path, image: SpatialImage, options: ScanOptions, max_bytes: int, header_bytes: int
) -> np.ndarray:  # (i, j, k) float32
    dtype, offset = image.get_data_dtype(), image.dataobj.offset
    volume, index = _check(image.shape, dtype, options, max_bytes)
    if offset < header_bytes:
        raise Refused(f"must have voxels behind its header of {header_bytes} bytes, got them at byte {offset}")
    if path.name.lower().endswith((".gz", ".mgz")):  # nibabel stops before the checksum
        check_gzip(path, 0, offset + math.prod(map(int, image.shape)) * dtype.itemsize, TRAILING)
    if index is None:
        return np.asarray(image.dataobj, dtype=np.float32).reshape(volume)
    return np.asarray(image.dataobj[:, :, :, index].reshape(volume), dtype=np.float32)


def _compare_forms(path: Path, header: Any, shape: tuple[int, ...], scale: float) -> None:
    """Warns where sform, which is taken, and qform place some voxel differently, by more than half of the smallest."""
    sform = header.get_sform()
    try:
        qform = header.get_qform()
    except Exception as error:  # a quaternion that is none
        warn(f"volume {path} has a qform that cannot be read ({reason(error)}): its sform was taken")
        return
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    apart = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()  # of affine maps, farthest at a corner
    sizes = np.linalg.norm(np.stack([sform, qform])[:, :3, :3], axis=1)
    if not apart <= sizes.min() / 2:
        warn(f"volume {path} has an sform and a qform that are up to {apart * scale:.3g} mm apart: its sform was taken")
