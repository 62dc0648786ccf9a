"""Reading a scan: NIfTI, NRRD, a folder of DICOM files, or an array without orientation.

An oriented scan is held as (D, H, W) with D from feet to head, H from front to back, W from the patient's
left to right, so that each slice is an axial picture with the face up, unless other axes are asked for.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .dicom import read_dicom
from .geometry import regridded, shear_of
from .nifti import read_nifti
from .optional import MissingPackageError
from .orientation import AXIAL, check_axes, spans_space, turned
from .scan_checks import DAMAGED, Refused, check_gzip, check_header, one_line, quiet_itk, reason, warn
from .scan_options import ScanOptions
from .volumes import MAX_BYTES, Scan

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".npy", ".npz")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
NRRD_SPACES = ("left-posterior-superior", "left-anterior-superior", "right-anterior-superior", "lps", "las", "ras")
NRRD_DTYPES = {f"{bits}-bit signed integer": f"i{bits // 8}" for bits in (8, 16, 32, 64)}
NRRD_DTYPES |= {f"{bits}-bit unsigned integer": f"u{bits // 8}" for bits in (8, 16, 32, 64)}
NRRD_DTYPES |= {"32-bit float": "f4", "64-bit float": "f8"}
HEADER_BYTES = 2**14  # of an array; numpy itself refuses more than 10000


def load_scan(
    path: str | Path,
    axes: str | None = None,
    max_bytes: int = MAX_BYTES,
    *,
    series: str | None = None,
    allow_shear: bool = False,
    regrid: bool = False,
) -> Scan:
    """Reads a NIfTI file (.nii, .nii.gz), an NRRD file, a folder of DICOM files, or a (D, H, W) array (.npy, .npz).

    Oriented files are turned to `axes` by permutations and flips: an oblique scan is not resampled, and its
    affine stays oblique. A folder, with the folders in it, must hold the images of exactly one DICOM series, or
    `series` picks one; it may hold files of other kinds. An .npy has voxels of 1 mm; an .npz may hold `spacing` (3,),
    mm along D, H, W, beside its one array or the one called `volume`. A NIfTI whose
    header gives no orientation is such an array too, its slices along the third axis.

    Args:
        path: the file or folder.
        axes: the directions in which D, H, W are to increase: a letter each of R/L, A/P and S/I, in any order.
            Default "SPR"; arrays have no orientation and take none.
        max_bytes: refuse, before reading any voxel, a header whose scan needs more memory to be read; and later, a
            right grid that needs more.
        series: of a DICOM folder, the number, UID, description or end of the UID that `list_series` says of one.
        allow_shear: keep axes that are not at right angles (a tilted gantry) as they are; so does the affine.
        regrid: resample those, and unevenly spaced slices of DICOM, linearly to a right and even grid.

    Returns a Scan: float32 voxels, float64 affine.

    Warns (`scan_checks.ScanWarning`) where something was resampled or taken among several.

    Raises:
        MissingPackageError: NIfTI without nibabel; NRRD or DICOM without SimpleITK.
        ValueError: axes are not as above, or the scan is missing, may not be read, is damaged, of another format,
            not 3D, has sheared axes or uneven slices, needs more than max_bytes, or holds NaN or infinite voxels, or
            only one value.
    """
    path = Path(path)
    options = ScanOptions(
        axes=None if axes is None else check_axes(axes), series=series, allow_shear=allow_shear, regrid=regrid
    )
    try:
        scan = _read(path, options, max_bytes)
    except MissingPackageError:
        raise
    except Exception as error:  # a damaged file can raise anything in the libraries that read it
        raise ValueError(f"volume {path} {one_line(_complaint(path, error))}") from error
    finite = torch.isfinite(scan.voxels)
    if not finite.all():
        bad = scan.voxels.numel() - int(finite.sum())
        raise ValueError(f"volume {path} must hold finite voxels, got {bad} NaN or infinite ones")
    if scan.voxels.min() == scan.voxels.max():
        raise ValueError(f"volume {path} must hold an image, got the one value {scan.voxels.min():g} everywhere")
    return scan


def _complaint(path: Path, error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # the system's, not a library's
        where = f" (file {Path(error.filename).name})" if error.filename and Path(error.filename) != path else ""
        return f"cannot be read: {error.strerror}{where}"
    return f"{DAMAGED}: {reason(error)}"


def scan_name(path: str | Path) -> str:
    """The name of a scan's file without its suffix, or of its folder: `ct.nii.gz` is `ct`."""
    path = Path(path)
    name = path.name or path.absolute().name
    suffix = _suffix(name)
    return name if path.is_dir() or len(suffix) == len(name) else name[: len(name) - len(suffix)]


def _suffix(name: str) -> str:
    return max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default="")


def _read(path: Path, options: ScanOptions, max_bytes: int) -> Scan:
    if path.is_dir():
        voxels, affine = read_dicom(path, options, max_bytes)
        return _oriented(path, voxels, LPS_TO_RAS @ affine, options, max_bytes)
    if options.series is not None:
        raise Refused(f"must be a folder to have the series {one_line(options.series, 64)!r} picked")
    if not path.is_file():
        raise Refused("must be a file, or a folder of DICOM files, got a path where there is neither")
    suffix = _suffix(path.name)
    if not suffix:
        raise Refused(f"must be a file ending in {', '.join(SUFFIXES)}, or a folder of DICOM files")
    with path.open("rb") as file:  # what the system refuses, it says best itself
        file.read(1)
    voxels, place = _READERS[suffix](path, options, max_bytes)
    if place.shape == (4, 4):
        return _oriented(path, voxels, place, options, max_bytes)
    if options.axes is not None:
        raise Refused(f"must say how its axes lie to be turned to axes {options.axes!r}, but it does not")
    return Scan(_tensor(voxels), np.diag([*place, 1.0]))


def _oriented(
    path: Path,
    voxels: np.ndarray,  # (i, j, k)
    affine: np.ndarray,  # (4, 4), of i, j, k to RAS+
    options: ScanOptions,
    max_bytes: int,
) -> Scan:
    affine = np.asarray(affine, dtype=np.float64)
    if not spans_space(affine):
        raise Refused(f"must have an affine whose axes span space, got {affine[:3].tolist()}")
    degrees = shear_of(affine, voxels.shape)
    if degrees and not options.allow_shear:
        sheared = f"must have axes at right angles, got a gantry tilt or shear of {degrees:.3g} degrees"
        if not options.regrid:
            raise Refused(
                f"{sheared}; --spacing (regrid=True) resamples to a right grid, --allow-shear (allow_shear=True) "
                "keeps this one"
            )
        if np.isfinite(voxels).all():  # others are refused as they are
            voxels, affine = regridded(voxels, affine, max_bytes)
            warn(f"volume {path} {sheared}: resampled to a right grid of {' x '.join(map(str, voxels.shape))} voxels")
    axes = options.axes or AXIAL
    voxels, affine = turned(voxels, affine, axes)
    return Scan(_tensor(voxels), affine, axes)


def _tensor(voxels: np.ndarray) -> torch.Tensor:
    """Contiguous, float32; numpy counts an axis of one as contiguous whatever its stride, torch does not."""
    voxels = np.ascontiguousarray(voxels, dtype=np.float32)
    return torch.from_numpy(voxels.copy() if min(voxels.strides) < 0 else voxels)


def _read_nrrd(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (i, j, k) float32, affine (4, 4) to RAS+."""
    begin, packed = _check_nrrd(path)
    with quiet_itk() as sitk:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO")  # else any other reader that likes the file's first bytes may take it
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise Refused(f"must hold one number a voxel, got {reader.GetNumberOfComponents()}")
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        if kind not in NRRD_DTYPES:
            raise Refused(f"must hold real numbers, got {kind}")
        dtype = np.dtype(NRRD_DTYPES[kind])
        # SimpleITK's image, and float32 copies before and after turning.
        check_header(reader.GetSize(), dtype, dtype.itemsize + 8, max_bytes)
        if packed:
            check_gzip(path, begin, math.prod(reader.GetSize()) * dtype.itemsize)
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
        image = reader.Execute()
        voxels = sitk.GetArrayViewFromImage(image).astype(np.float32)  # (k, j, i); the view dies with its image
    return voxels.transpose(2, 1, 0), LPS_TO_RAS @ affine


def _check_nrrd(path: Path) -> tuple[int, bool]:
    """Refuses by the header's text what SimpleITK would read wrongly: another file's voxels, unknown axes, NaN.

    Returns where the voxels begin, and whether they are packed by gzip.
    """
    with path.open("rb") as file:
        head = file.read(2**20)
    if not head.startswith(b"NRRD"):
        raise Refused("must be an NRRD file, got one that does not begin with NRRD")
    end = re.search(rb"\r?\n\r?\n", head)
    if end is None:
        raise Refused(f"{DAMAGED}: its header does not end")
    text = head[: end.start()].decode("latin-1").lower()
    fields = dict(re.findall(r"^([^#:\r\n]+): *(.*?)[ \r]*$", text, re.MULTILINE))
    for name in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"):
        if name in fields:
            raise Refused(f"must hold its voxels right behind its header, got the field {name!r}")
    if fields.get("dimension") != "3":
        raise Refused(f"must be 3D and not empty, got the dimension {fields.get('dimension')!r}")
    if fields.get("space") not in NRRD_SPACES or "space directions" not in fields:
        raise Refused(f"must say its space ({', '.join(NRRD_SPACES[:3])}) and directions, got {fields.get('space')!r}")
    if "space origin" not in fields:
        raise Refused("must say its space origin, without which it has no place in millimetres")
    if set(re.findall(r'"(.*?)"', fields.get("space units", ""))) - {"mm"}:
        raise Refused(f"must have space units of mm, got {fields['space units']}")
    for name in ("space directions", "space origin"):  # VNL prints what it thinks of NaN
        numbers = re.split(r"[(), \t]+", fields.get(name, "").strip("(), \t"))
        if not all(math.isfinite(float(number)) for number in numbers if number):
            raise Refused(f"must have finite {name}, got {fields[name]}")
    return end.end(), fields.get("encoding") in ("gzip", "gz")


def _read_npy(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D, H, W), millimetres along D, H, W."""
    with path.open("rb") as file:
        shape, dtype, _ = _array_header(file)
    check_header(shape, dtype, _array_bytes(dtype), max_bytes)
    return np.load(path, allow_pickle=False), np.ones(3)


def _read_npz(path: Path, options: ScanOptions, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D, H, W), millimetres along D, H, W."""
    with zipfile.ZipFile(path) as archive:
        names = sorted({name[:-4] for name in archive.namelist() if name.endswith(".npy")})
        if "affine" in names:
            raise Refused(
                "must not hold an affine, of which an .npz cannot say the axes; give a spacing, or write NIfTI"
            )
        arrays = [name for name in names if name != "spacing"]
        if "volume" not in arrays and len(arrays) != 1:
            raise Refused(f"must hold one array, or one called 'volume', got {one_line(str(names), 200)}")
        name = "volume" if "volume" in arrays else arrays[0]
        voxels = _member(archive, name, lambda shape, dtype: check_header(shape, dtype, _array_bytes(dtype), max_bytes))
        if "spacing" not in names:
            return voxels, np.ones(3)
        spacing = _member(archive, "spacing", _check_spacing)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise Refused(f"must have a spacing of 3 positive finite numbers, got {spacing.tolist()}")
    return voxels, spacing.astype(np.float64)


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


# Voxels, and either (i, j, k) with the affine (4, 4) to RAS+, or (D, H, W) with the millimetres along them.
_READERS = {".nii": read_nifti, ".nii.gz": read_nifti, ".nrrd": _read_nrrd, ".npy": _read_npy, ".npz": _read_npz}
