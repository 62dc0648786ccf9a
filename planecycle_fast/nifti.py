"""NIfTI: what nibabel guesses or lets pass is found out or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .optional import require
from .scan_checks import Refused, check_gzip, check_header, reason, warn
from .scan_options import ScanOptions

MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
TRAILING = 2**20  # bytes that may follow the voxels


def read_nifti(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32 and their affine (4, 4) to RAS+ millimetres.

    Where neither sform nor qform is set there is no orientation: voxels (k, j, i), and the millimetres along
    k, j, i. Raises Refused, MissingPackageError, OSError, and whatever nibabel makes of a damaged file.
    """
    nibabel = require("nibabel", "scans")
    try:
        with _silent(nibabel.imageglobals.logger):  # which prints what nibabel mends in a header
            image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise Refused(f"must be a NIfTI image: {reason(error)}") from None
    shape, dtype, header = image.shape, image.get_data_dtype(), image.header
    while len(shape) > 3 and shape[-1] == 1:  # some tools write (x, y, z, 1)
        shape = shape[:-1]
    # The file's voxels, scaled in up to float64, and float32 copies before and after turning.
    check_header(shape, dtype, dtype.itemsize + max(dtype.itemsize, 8) + 8, max_bytes)
    offset = image.dataobj.offset
    if offset < header.sizeof_hdr:
        raise Refused(f"must have voxels behind its header of {header.sizeof_hdr} bytes, got them at byte {offset}")
    if path.name.lower().endswith(".gz"):  # nibabel stops before the checksum
        check_gzip(path, 0, offset + int(np.prod(shape)) * dtype.itemsize, TRAILING)
    unit = header.get_xyzt_units()[0]
    if unit not in MILLIMETRES:
        raise Refused(f"must have units of length, got {unit!r}")
    if header["sform_code"] and header["qform_code"]:
        _compare_forms(path, header, shape, MILLIMETRES[unit])
    voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    if not header["sform_code"] and not header["qform_code"]:
        return voxels.transpose(2, 1, 0), np.array(header.get_zooms()[2::-1], dtype=np.float64) * MILLIMETRES[unit]
    return voxels, np.diag([*[MILLIMETRES[unit]] * 3, 1.0]) @ image.affine


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


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
