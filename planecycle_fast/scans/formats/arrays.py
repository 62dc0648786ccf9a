"""Arrays of numpy, .npy and .npz: no orientation, and headers that are read before anything else."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...optional import one_line
from ..checks import Refused, ScanOptions, check_header, one_volume

HEADER_BYTES = 2**14  # of an array; numpy itself refuses more than 10000
IMAGES, LABELS = "_images", "_labels"  # MedMNIST's names for arrays: train_images, train_labels, val_images, ...


def read_npy(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D, H, W), millimetres along D, H, W. Of (N, D, H, W) one volume, without reading the others."""
    with path.open("rb") as file:
        shape, dtype, _ = _array_header(file)
    _check_volumes(shape, dtype)
    volume, index = one_volume(shape, 0, options)
    check_header(volume, dtype, _array_bytes(dtype), max_bytes)
    if index is None:
        return np.load(path, allow_pickle=False), np.ones(3)
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[index]), np.ones(3)


def read_npz(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D, H, W), millimetres along D, H, W. Of (N, D, H, W) one volume, though all are unpacked."""
    with zipfile.ZipFile(path) as archive:
        name, names = _wanted(archive, options)

        def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
            _check_volumes(shape, dtype, name, names)
            everything = "; load_volumes, or features --array without --index, takes all"
            volume, index = one_volume(shape, 0, options, everything)
            more = 0 if index is None else math.prod(shape) * dtype.itemsize
            check_header(volume, dtype, _array_bytes(dtype), max_bytes, more)

        voxels = _member(archive, name, check)
        spacing = _spacing(archive, names)
    return voxels if voxels.ndim == 3 else voxels[options.index].copy(), spacing


def holds_volumes(path: Path, options: ScanOptions) -> bool:
    """Whether an .npz array that was asked for by its name is (N, D, H, W), and no volume of it was asked for."""
    if options.array is None or options.index is not None or path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{options.array}.npy") as file:
            return len(_array_header(file)[0]) == 4
    except Exception:  # whatever is wrong, its reader says so
        return False


def read_volumes(
    path: Path, options: ScanOptions, max_bytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, str | None]:
    """Voxels (N, D, H, W) as stored, millimetres along D, H, W, labels (N, ...), and MedMNIST's name of the split."""
    with zipfile.ZipFile(path) as archive:
        name, names = _wanted(archive, options)

        def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
            _check_volumes(shape, dtype, name, names)
            if len(shape) != 4 or min(shape) < 1:
                raise Refused(f"must hold volumes, (N, D, H, W) and not empty, got the shape {shape} of {name}")
            more = math.prod(shape) * dtype.itemsize
            check_header(shape[1:], dtype, _array_bytes(dtype), max_bytes, more)

        voxels = _member(archive, name, check)
        split = name.removesuffix(IMAGES) if _is_labelled(name, names) else None
        labels = None
        if split is not None:
            labels = _member(archive, split + LABELS, lambda *header: _check_labels(*header, len(voxels), max_bytes))
        return voxels, _spacing(archive, names), labels, split


def _wanted(archive: zipfile.ZipFile, options: ScanOptions) -> tuple[str, list[str]]:
    """The name of the array to read, and those of all arrays."""
    names = sorted({name[:-4] for name in archive.namelist() if name.endswith(".npy")})
    if "affine" in names:
        raise Refused("must not hold an affine, of which an .npz cannot say the axes; give a spacing, or write NIfTI")
    arrays = [name for name in names if name != "spacing"]
    listed = one_line(str(arrays or names), 200)
    if options.array is not None:
        if options.array not in arrays:
            raise Refused(f"must hold an array called {options.array[:50]!r}, got {listed}")
        return options.array, names
    if "volume" not in arrays and len(arrays) != 1:
        raise Refused(f"must hold one array, or one called 'volume', got {listed}; array (--array NAME) picks one")
    return "volume" if "volume" in arrays else arrays[0], names


def _is_labelled(name: str, names: list[str]) -> bool:
    return name.endswith(IMAGES) and name.removesuffix(IMAGES) + LABELS in names


def _check_volumes(shape: tuple[int, ...], dtype: np.dtype, name: str = "", names: list[str] = ()) -> None:
    """Refuses what has the dimensions of volumes, but is none."""
    if len(shape) == 4 and shape[-1] in (3, 4):
        raise Refused(f"must hold one number a voxel, got the shape {shape}, whose last axis looks like colours")
    if len(shape) == 3 and _is_labelled(name, names):
        raise Refused(f"must hold volumes, got {shape[0]} pictures of {shape[1]} x {shape[2]} in {name}")


def _check_labels(shape: tuple[int, ...], dtype: np.dtype, count: int, max_bytes: int) -> None:
    if not shape or shape[0] != count or dtype.kind not in "biuf":
        raise Refused(f"must have labels for its {count} volumes, got the shape {shape} of {dtype}")
    if math.prod(shape) * dtype.itemsize > max_bytes:
        raise Refused(f"must have labels of a few numbers, got the shape {shape}")


def _spacing(archive: zipfile.ZipFile, names: list[str]) -> np.ndarray:
    return _member(archive, "spacing", _check_spacing).astype(np.float64) if "spacing" in names else np.ones(3)


def _check_spacing(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if shape != (3,) or dtype.kind not in "iuf":
        raise Refused(f"must have a spacing of 3 positive finite numbers, got the shape {shape} of {dtype}")


def _member(archive: zipfile.ZipFile, name: str, check: Callable[[tuple[int, ...], np.dtype], None]) -> np.ndarray:
    """One array of an .npz, unpacked after `check` has seen its shape and dtype."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        shape, dtype, start = _array_header(file)
    check(shape, dtype)
    size = start + math.prod(shape) * dtype.itemsize
    if info.file_size != size:
        raise Refused(f"must have arrays as long as their headers say, got {info.file_size} bytes of {size} in {name}")
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at its end, where the checksum is compared
    return array


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype, and where the voxels begin, from the first bytes of an .npy file."""
    head = io.BytesIO(file.read(HEADER_BYTES))  # no more, whatever length the header gives for itself
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    return shape, dtype, head.tell()


def _array_bytes(dtype: np.dtype) -> int:
    """Memory to read one voxel of an array: as stored, and its copy in float32, with room for a cast between."""
    return dtype.itemsize + 8
