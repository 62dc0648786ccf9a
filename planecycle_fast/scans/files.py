"""Reading a scan: a file of one of SUFFIXES, or a folder of DICOM files.

An oriented scan is held as (D, H, W) with D from feet to head, H from front to back, W from the patient's
left to right, so that each slice is an axial picture with the face up, unless other axes are asked for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from ..optional import one_line
from .affines import regridded, shear_of
from .checks import Refused, ScanOptions, complaints, warn
from .formats import metaimage, nrrd
from .formats.arrays import read_npy, read_npz
from .formats.dicom import read_dicom
from .formats.dicom_series import files_of
from .formats.nifti import pair, read_freesurfer, read_nifti
from .orientation import AXIAL, LPS_TO_RAS, spans_space, turned
from .scan import MAX_BYTES, Scan


def load_scan(
    path: str | Path,
    axes: str | None = None,
    max_bytes: int = MAX_BYTES,
    *,
    fill_nan: float | None = None,
    index: int | None = None,
    array: str | None = None,
    series: str | int | None = None,
    allow_shear: bool = False,
    regrid: bool = False,
) -> Scan:
    """Reads a scan: NIfTI, Analyze, FreeSurfer's MGH, NRRD, MetaImage, a folder of DICOM files, or a (D, H, W) array.

    Oriented files are turned to `axes` by permutations and flips: an oblique scan is not resampled, and its
    affine stays oblique. A folder, with the folders in it, must hold the images of exactly one DICOM series, or
    `series` picks one; it may hold files of other kinds. An .npy has voxels of 1 mm; an .npz may hold `spacing` (3,),
    mm along D, H, W, beside its one array or the one called `volume`. A file whose header gives no orientation
    (Analyze, NIfTI without sform and qform, MGH that does not vouch for it, MetaImage without directions) is such an
    array too, its slices along the third axis. Where header and voxels are two files (.hdr and .img, .nhdr, .mhd)
    the header names the scan (or .img), and the other file lies beside it. docs/scans.md says more.

    Args:
        path: the file or folder.
        axes: the directions in which D, H, W are to increase: a letter each of R/L, A/P and S/I, in any order.
            Default "SPR"; arrays have no orientation and take none.
        max_bytes: refuse, before reading any voxel, a header whose scan needs more memory to be read; and later, a
            right grid that needs more.
        fill_nan: takes the place of NaN voxels, which otherwise are refused. Infinite ones are refused always.
        index: which volume of a file of several, from 0: along the last axis of NIfTI, MGH and MetaImage, the axis
            without a direction of NRRD, the first axis of .npy and .npz.
        array: which array of an .npz.
        series: of a DICOM folder, the number, UID, description or end of the UID that `list_series` says of one.
        allow_shear: keep axes that are not at right angles (a tilted gantry) as they are; so does the affine.
        regrid: resample those, and unevenly spaced slices of DICOM, linearly to a right and even grid.

    Returns a Scan: float32 voxels, float64 affine.

    Warns (`checks.ScanWarning`) where something was resampled or taken among several.

    Raises:
        MissingPackageError: NIfTI, Analyze and MGH without nibabel; NRRD and DICOM without SimpleITK.
        ValueError: options are not as above, or the scan is missing, may not be read, is damaged, of another format,
            not 3D, has sheared axes or uneven slices, needs more than max_bytes, or holds NaN or infinite voxels, or
            only one value.
    """
    series = str(series) if isinstance(series, int) else series
    options = ScanOptions(axes, fill_nan, index, array, series, allow_shear, regrid)
    with complaints(path):
        return checked(_read(Path(path), options, max_bytes))


def checked(scan: Scan) -> Scan:
    """A scan whose voxels are finite, and not all alike. Raises Refused."""
    if not torch.isfinite(scan.voxels).all():
        infinite, missing = int(scan.voxels.isinf().sum()), int(scan.voxels.isnan().sum())
        help_ = "; fill_nan (--fill-nan VALUE) takes the place of NaN" if missing else ""
        raise Refused(
            f"must hold finite voxels, got {missing} NaN and {infinite} infinite, or beyond float32's 3.4e+38{help_}"
        )
    if scan.voxels.min() == scan.voxels.max():
        raise Refused(f"must hold an image, got the one value {scan.voxels.min():g} everywhere")
    return scan


def scan_name(path: str | Path) -> str:
    """The name of a scan's file without its suffix, or of its folder: `ct.nii.gz` is `ct`."""
    path = Path(path)
    name = path.name or path.absolute().name
    suffix = _suffix(name)
    return name if path.is_dir() or len(suffix) == len(name) else name[: len(name) - len(suffix)]


def other_file(path: Path) -> Path | None:
    """The file beside a scan's own with its voxels, or its header; None where it needs none, or it is not there."""
    _, find = (None, None) if path.is_dir() else _READERS.get(_suffix(path.name), (None, None))
    try:
        return None if find is None else find(path)
    except (Refused, OSError):  # of which `load_scan` says more
        return None


def digest_of_scan(scan: Path, series: str | None = None) -> str:
    """SHA-256 of a scan's file, with the other one where header and voxels are two, one after another.

    Of a folder those of its only DICOM series, or of the one that is picked.

    Raises ValueError for a path that cannot be read.
    """
    digest = hashlib.sha256()
    with complaints(scan):
        beside = other_file(scan)
        for file in files_of(scan, series) if scan.is_dir() else [scan] if beside is None else [scan, beside]:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default="")


def _read(path: Path, options: ScanOptions, max_bytes: int) -> Scan:
    if path.is_dir():
        if options.array is not None or options.index is not None:
            raise Refused("must be a file to hold several arrays or volumes, got a folder")
        voxels, affine = read_dicom(path, options, max_bytes)
        return _oriented(path, voxels, LPS_TO_RAS @ affine, options, max_bytes)
    check_no_series(options)
    if not path.is_file():
        raise Refused("must be a file, or a folder of DICOM files, got a path where there is neither")
    suffix = _suffix(path.name)
    if not suffix:
        raise Refused(f"must be a file ending in {', '.join(SUFFIXES)}, or a folder of DICOM files")
    with path.open("rb") as file:  # what the system refuses, it says best itself
        file.read(1)
    if options.array is not None and suffix != ".npz":
        raise Refused(f"must be an .npz to hold an array called {options.array[:50]!r}")
    read, _ = _READERS[suffix]
    voxels, place = read(path, options, max_bytes)
    voxels = filled(voxels, options)
    if place.shape == (4, 4):
        return _oriented(path, voxels, place, options, max_bytes)
    return in_place(voxels, place, options)


def check_no_series(options: ScanOptions) -> None:
    """Raises Refused where a series is to be picked in a file."""
    if options.series is not None:
        raise Refused(f"must be a folder to have the series {one_line(options.series, 64)!r} picked")


def filled(voxels: np.ndarray, options: ScanOptions) -> np.ndarray:
    """The same voxels, any shape, without NaN where something is to take its place."""
    if options.fill_nan is not None and voxels.dtype.kind == "f":
        voxels = voxels if voxels.flags.writeable else voxels.copy()
        voxels[np.isnan(voxels)] = options.fill_nan
    return voxels


def in_place(
    voxels: np.ndarray,  # (D, H, W)
    spacing: np.ndarray,  # (3,), mm along D, H, W
    options: ScanOptions,
) -> Scan:
    """The scan of an array without orientation. Raises Refused."""
    if options.axes is not None:
        raise Refused(f"must say how its axes lie to be turned to axes {options.axes!r}, but it does not")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise Refused(f"must have a spacing of 3 positive finite numbers, got {spacing.tolist()}")
    return Scan(_tensor(voxels), np.diag([*spacing, 1.0]))


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


# Voxels, and either (i, j, k) with the affine (4, 4) to RAS+, or (D, H, W) with the millimetres along them.
# And what finds the other file of a scan that may be two.
_READERS = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".img"), (read_nifti, pair)),
    **dict.fromkeys((".mgz", ".mgh"), (read_freesurfer, None)),
    **dict.fromkeys((".nrrd", ".nhdr"), (nrrd.read_nrrd, nrrd.data_file)),
    **dict.fromkeys((".mha", ".mhd"), (metaimage.read_metaimage, metaimage.data_file)),
    ".npy": (read_npy, None),
    ".npz": (read_npz, None),
}
SUFFIXES = tuple(_READERS)
