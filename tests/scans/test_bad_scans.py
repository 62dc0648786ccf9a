"""Bad scans are refused in one line that says why, and never crash or print."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from planecycle_fast.scans.files import load_scan

from ..scan_writers import (
    COUNTS,
    NOISE,
    SMOOTH,
    WRITERS,
    itk_image,
    turned_affine,
    write_dicom,
    write_frames,
    write_nifti,
    write_nrrd,
)
from .bad_dicom import BAD_DICOM
from .bad_formats import BAD_FORMATS
from .bad_scans import SCANS, nrrd, truncated

ALL = SCANS | BAD_FORMATS | BAD_DICOM


@pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning")
@pytest.mark.parametrize("kind", ALL)
def test_bad_scans(tmp_path, kind):
    name, make, message = ALL[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"^volume .*{name} .*({message})") as raised:
        load_scan(tmp_path / name)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("columns", [[[1, 1, 0], [0, 0, 0], [0, 0, 1]], [[1, 1, 1]] * 3, [[np.nan] * 3] * 3], ids=str)
def test_an_affine_without_three_axes(tmp_path, columns):
    affine = np.eye(4)
    affine[:3, :3] = columns
    image = nibabel.Nifti1Image(NOISE, np.eye(4))
    image.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    data = bytearray(image.header.binaryblock + b"\0" * 4 + NOISE.tobytes(order="F"))
    data[108:112] = struct.pack("<f", 352)
    data[344:348] = b"n+1\0"
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(ValueError, match="must have an affine whose axes span space"):
        load_scan(tmp_path / "a.nii")


@pytest.mark.parametrize("kind", ["nii", "nrrd", "mha", "mgh", "dicom"])
def test_no_permission(tmp_path, monkeypatch, kind):
    path = WRITERS[kind](tmp_path, COUNTS)
    opened = Path.open

    def refuse(self, *arguments, **settings):
        if self.name in ("3", path.name):
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    where = r" \(file 3\)" if kind == "dicom" else ""
    with pytest.raises(ValueError, match=f"^volume {path} cannot be read: Permission denied{where}$"):
        load_scan(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", ["nii", "nrrd", "dicom"])
def test_no_permission_of_the_system(tmp_path, kind):
    path = WRITERS[kind](tmp_path, COUNTS)
    path.chmod(0)
    try:
        with pytest.raises(ValueError, match=f"^volume {path} cannot be read: Permission denied"):
            load_scan(path)
    finally:
        path.chmod(0o700)


@pytest.mark.parametrize(
    "package, kind", [("nibabel", "nii"), ("nibabel", "mgz"), ("SimpleITK", "nrrd"), ("SimpleITK", "dicom")]
)
def test_missing_packages(tmp_path, monkeypatch, package, kind):
    path = WRITERS[kind](tmp_path, COUNTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"package '{package}' is not installed; .*'planecycle-fast\\[scans\\]'"):
        load_scan(path)


def test_warnings_of_simpleitk_are_as_they_were(tmp_path):
    assert sitk.ProcessObject.GetGlobalWarningDisplay()
    load_scan(write_nrrd(tmp_path / "a.nrrd", NOISE))
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


# Damage, at random

QUIET = """
import sys
from pathlib import Path
from planecycle_fast.scans.files import load_scan
counts = [0, 0]
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_scan(path, max_bytes=2**24)
        counts[0] += 1
    except ValueError as error:
        counts[1] += 1
        assert str(error).startswith(f"volume {path} ") and len(str(error).splitlines()) == 1, error
print(*counts)
"""


def mutated(data, generator, start, stop, count=3):
    data = bytearray(data)
    for position in generator.integers(start, min(stop, len(data)), count):
        data[position] = generator.choice([0, 10, 32, 48, 57, 128, 255, generator.integers(0, 256)])
    return bytes(data)


def test_damaged_files_are_refused_or_read_and_never_crash_or_print(tmp_path):
    generator = np.random.default_rng(1)
    folder = tmp_path / "damaged"
    folder.mkdir()
    nifti = write_nifti(tmp_path / "a.nii", COUNTS).read_bytes()
    raw, packed = (write_nrrd(tmp_path / "a.nrrd", COUNTS, packed=p).read_bytes() for p in (False, True))
    for number in range(120):
        (folder / f"{number}.nrrd").write_bytes(mutated(raw, generator, 8, 330))
        (folder / f"{number}p.nrrd").write_bytes(mutated(packed, generator, 8, 10**6))
    nrrd(folder / "nan.nrrd", space_directions="(nan,0,0) (0,2,0) (0,0,3)")
    truncated(write_nrrd(folder / "short.nrrd", NOISE))
    for number in range(50):
        (folder / f"{number}.nii").write_bytes(mutated(nifti, generator, 0, 352))
    for kind in ("mha", "packed mha", "mhd", "nhdr", "hdr", "mgh", "mgz"):
        (tmp_path / kind).mkdir()
        path = WRITERS[kind](tmp_path / kind, COUNTS)
        data = path.read_bytes()
        for number in range(30):
            (folder / f"{number}{kind}{path.suffix}").write_bytes(mutated(data, generator, 0, 400))
            if kind == "hdr":
                shutil.copy(path.with_suffix(".img"), folder / f"{number}{kind}.img")
        if kind in ("mhd", "nhdr"):
            shutil.copy(path.with_suffix(".raw"), folder)
    slices = {path.name: path.read_bytes() for path in write_dicom(tmp_path / "raw", COUNTS).iterdir()}
    for number in range(120):  # few of them reach GDCM
        (folder / str(number)).mkdir()
        for name, data in slices.items():
            (folder / str(number) / name).write_bytes(mutated(data, generator, 128, 700))
    frames = (write_frames(tmp_path / "packed", SMOOTH, packed="JPEG2000") / "frames").read_bytes()
    for number in range(4):  # the decoder prints
        (folder / f"packed {number}").mkdir()
        data = mutated(frames, generator, frames.index(b"\xff\x4f\xff\x51"), 10**6, 6)
        (folder / f"packed {number}" / "frames").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", QUIET, folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read > 20 and refused > 200


def test_pixels_that_cannot_be_decoded(tmp_path):
    folder = write_frames(tmp_path / "a", SMOOTH, packed="JPEG2000")
    data = (folder / "frames").read_bytes()
    start = data.index(b"\xff\x4f\xff\x51")
    (folder / "frames").write_bytes(data[: start + 4] + b"\0" * 40 + data[start + 44 :])
    with pytest.raises(ValueError, match=r"cannot be read, it may be truncated or damaged: .* \(file frames\)"):
        load_scan(folder)


def test_a_crash_of_the_decoder_is_a_bad_scan(tmp_path, monkeypatch):
    folder = write_frames(tmp_path / "a", SMOOTH, packed="JPEG2000")
    started = subprocess.Popen

    def crash(arguments, **settings):
        return started([*arguments[:2], "import os, sys; sys.stdin.read(); os.abort()"], **settings)

    monkeypatch.setattr(subprocess, "Popen", crash)
    with pytest.raises(ValueError, match=r"damaged: its decoder ended with status -?\d+ \(file"):
        load_scan(folder)


def test_nothing_is_read_from_the_working_directory(tmp_path, monkeypatch):
    folder = write_dicom(tmp_path / "a", COUNTS)
    (tmp_path / "json.py").write_text("raise RuntimeError('not mine')")
    monkeypatch.chdir(tmp_path)
    if sys.version_info >= (3, 11):
        assert load_scan(folder.name).voxels.shape == (5, 6, 7)


def test_images_are_written_as_they_are_read():
    """The tests' own writer: the affine of an image is the one it was made with."""
    affine = turned_affine("PIR", True)
    image = itk_image(COUNTS, affine)
    place = image.TransformIndexToPhysicalPoint((2, 5, 1))
    np.testing.assert_allclose((-place[0], -place[1], place[2], 1), affine @ (2, 5, 1, 1))
