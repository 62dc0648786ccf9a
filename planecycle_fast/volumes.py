"""Reading a scan and making it the input of a lifted model.

A scan is held as (D, H, W) with D from feet to head, H from front to back, W from the patient's left
to right, so that each slice is an axial picture with the face up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .optional import MissingPackageError, require

MAX_BYTES = 8 * 2**30  # enough for 512 x 512 x 2000 voxels of any dtype up to 32 bits
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".nii", ".nii.gz", ".npy")


@dataclass(frozen=True)
class Scan:
    """A 3D image."""

    voxels: Tensor  # (D, H, W) float32
    spacing: tuple[float, float, float]  # mm between voxels along D, H, W


def load_scan(path: str | Path, max_bytes: int = MAX_BYTES) -> Scan:
    """Reads a NIfTI file (.nii, .nii.gz) or a (D, H, W) array (.npy, taken as 1 mm).

    NIfTI is reoriented by its affine, to the nearest axes: an oblique scan is not resampled.

    Args:
        path: the file.
        max_bytes: refuse, before reading any voxel, a header whose scan needs more memory to be read.

    Raises:
        MissingPackageError: NIfTI without nibabel.
        ValueError: the file is missing, damaged, of another format, not 3D, needs more than max_bytes,
            or holds NaN or infinite voxels, or only one value.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise ValueError(f"volume must be a file, got {path}, which does not exist or is a folder")
    if not name.endswith(SUFFIXES):
        raise ValueError(f"volume must be a file ending in {', '.join(SUFFIXES)}, got {path}")
    read = _read_npy if name.endswith(".npy") else _read_nifti
    try:
        scan = read(path, max_bytes)
    except MissingPackageError:
        raise
    except _Refused as error:
        raise ValueError(f"volume {path} {error}") from None
    except Exception as error:  # a damaged file can raise anything in the libraries that read it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"volume {path} cannot be read, it may be truncated or damaged: {reason}") from error
    finite = torch.isfinite(scan.voxels)
    if not finite.all():
        bad = scan.voxels.numel() - int(finite.sum())
        raise ValueError(f"volume {path} must hold finite voxels, got {bad} NaN or infinite ones")
    if scan.voxels.min() == scan.voxels.max():
        raise ValueError(f"volume {path} must hold an image, got the one value {scan.voxels.min():g} everywhere")
    return scan


class _Refused(Exception):
    """A file that could be read but must not be; the message goes on from the file's name."""


def _check_header(shape: tuple[int, ...], dtype: np.dtype, max_bytes: int) -> None:
    """Raises _Refused unless the header declares a 3D array of real numbers that can be read in max_bytes."""
    if dtype.hasobject or dtype.kind not in "biuf":
        raise _Refused(f"must hold real numbers, got the dtype {dtype}")
    if len(shape) != 3 or min(shape) < 1:
        raise _Refused(f"must be 3D and not empty, got the shape {shape}")
    # The file's voxels, scaled in up to float64, and float32 copies before and after reorienting.
    size = math.prod(int(n) for n in shape) * (dtype.itemsize + max(dtype.itemsize, 8) + 8)
    if size > max_bytes:
        raise _Refused(f"must need at most {_gib(max_bytes)} to be read, got a header that asks for {_gib(size)}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _read_npy(path: Path, max_bytes: int) -> Scan:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    _check_header(shape, dtype, max_bytes)
    voxels = np.load(path, allow_pickle=False).astype(np.float32)
    return Scan(torch.from_numpy(np.ascontiguousarray(voxels)), (1.0, 1.0, 1.0))


def _read_nifti(path: Path, max_bytes: int) -> Scan:
    nibabel = require("nibabel", "demo")
    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise _Refused(f"must be a NIfTI image: {error}") from None
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:  # some tools write (x, y, z, 1)
        shape = shape[:-1]
    _check_header(shape, image.get_data_dtype(), max_bytes)
    axes = image.affine[:3, :3]
    spacing = nibabel.affines.voxel_sizes(image.affine)
    if not np.isfinite(axes).all() or not abs(np.linalg.det(axes)) > 1e-3 * spacing.prod() > 0:
        raise _Refused(f"must have an affine whose axes span space, got {axes.tolist()}")
    to_ras = nibabel.orientations.io_orientation(image.affine)
    spacing = spacing[np.argsort(to_ras[:, 0])]  # of x, y, z
    voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    voxels = nibabel.orientations.apply_orientation(voxels, to_ras)  # x to the right, y to the front, z up
    voxels = voxels.transpose(2, 1, 0)[:, ::-1]  # (D, H, W), the face up
    return Scan(torch.from_numpy(np.ascontiguousarray(voxels)), tuple(float(s) for s in spacing[::-1]))


def intensities(scan: Scan, percentiles: tuple[float, float] = (0.5, 99.5)) -> Tensor:
    """The scan's voxels (D, H, W), the percentiles mapped to 0 and 1, and cut off there.

    Where the percentiles are equal, as in a mask that is almost empty, the extremes take their place.
    """
    low, high = np.percentile(scan.voxels.numpy(), percentiles)
    if high <= low:
        low, high = scan.voxels.min(), scan.voxels.max()
    return ((scan.voxels - float(low)) / float(high - low)).clamp(0, 1)


def model_input(
    image: Tensor,  # (D, H, W) in [0, 1]
    spacing: tuple[float, float, float],  # mm along D, H, W
    patch_size: tuple[int, int],  # pixels
    size: int,
) -> Tensor:  # (1, 3, D', height, width)
    """An image as a model's volume, resampled so that tokens are as deep as they are wide.

    The longest side becomes about `size` pixels of a slice; the others follow the millimetres, rounded
    to whole tokens. Three equal channels, with ImageNet's mean removed and its deviation divided out.

    Raises ValueError if `size` is smaller than a patch, or the volume would need more than MAX_BYTES.
    """
    if size < max(patch_size):
        raise ValueError(f"size must be at least one patch, {max(patch_size)} pixels, got {size}")
    extent = [n * s for n, s in zip(image.shape, spacing)]  # mm
    token = max(extent) / (size / max(patch_size))  # mm
    depth, rows, columns = (max(1, round(e / token)) for e in extent)
    shape = (depth, rows * patch_size[0], columns * patch_size[1])
    if 3 * 4 * math.prod(shape) > MAX_BYTES:
        raise ValueError(f"size must leave a volume of at most {_gib(MAX_BYTES)}, got {size}, which makes it {shape}")
    mean, std = (torch.tensor(t).view(1, 3, 1, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
    return (_resample(image[None, None], shape) - mean) / std


def _resample(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(1, 1, ...) to (1, 1, *shape): axes that shrink are averaged, axes that grow interpolated."""
    shrunk = tuple(min(n, m) for n, m in zip(image.shape[2:], shape))
    return F.interpolate(F.interpolate(image, shrunk, mode="area"), shape, mode="trilinear")
