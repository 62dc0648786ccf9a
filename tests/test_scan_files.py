"""Reading scans: the right voxels in the right place, and refusals that say why."""

import gzip
import io
import itertools
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from planecycle_fast.scan_files import SUFFIXES, load_scan, scan_name

from .scans import execute, itk_image, write_dicom, write_frames, write_nifti, write_nrrd

GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.normal(size=(14, 13, 12)).astype(np.float32)
COUNTS = GENERATOR.integers(-1000, 1000, (7, 6, 5)).astype(np.int16)
SPACED = np.diag([1.5, 2.0, 3.0, 1.0])
SMOOTH = np.indices((64, 48, 5)).sum(0).astype(np.int16)  # packing noise, the writer would go beyond its memory
AXES = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]

# Reading, in place


def turned_affine(codes, oblique):
    """Array axes along `codes`, 1.5, 2 and 3 mm, from an odd corner; turned by 20 degrees or so where oblique."""
    affine = np.zeros((4, 4))
    for column, (code, size) in enumerate(zip(codes, (1.5, 2.0, 3.0))):
        row = next(r for r, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[row, column] = size if code in "RAS" else -size
    if oblique:
        angles = np.radians(20), np.radians(-15)
        (c, d), (s, t) = np.cos(angles), np.sin(angles)
        affine[:3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.array([[1, 0, 0], [0, d, -t], [0, t, d]]) @ affine[:3]
    affine[:, 3] = (-31.5, 12.25, 101, 1)
    return affine


WRITERS = {
    "nii": lambda folder, *scan: write_nifti(folder / "a.nii", *scan),
    "nii.gz": lambda folder, *scan: write_nifti(folder / "a.nii.gz", *scan),
    "nrrd": lambda folder, *scan: write_nrrd(folder / "a.nrrd", *scan),
    "packed nrrd": lambda folder, *scan: write_nrrd(folder / "a.nrrd", *scan, packed=True),
    "dicom": lambda folder, *scan: write_dicom(folder / "a", *scan),
    "frames": lambda folder, *scan: write_frames(folder / "a", *scan),
}


# RPS and LAS are mirrored: the third axis of DICOM slices then runs against their normal.
@pytest.mark.parametrize(
    "codes, oblique", [("RAS", False), ("LPS", True), ("SRA", False), ("PIR", True), ("RPS", True)]
)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_bright_voxel_keeps_its_millimetres(tmp_path, kind, codes, oblique):
    if kind == "frames" and codes == "RPS":
        pytest.skip("SimpleITK writes frames along their normal only")
    affine = turned_affine(codes, oblique)
    array = COUNTS.copy()
    array[2, 5, 1] = 5000
    scan = load_scan(WRITERS[kind](tmp_path, array, affine))
    assert scan.axes == "SPR" and scan.voxels.dtype == torch.float32 and scan.affine.dtype == np.float64
    place = np.unravel_index(scan.voxels.argmax().item(), scan.voxels.shape)
    assert np.sort(scan.voxels.numpy(), axis=None) == pytest.approx(np.sort(array, axis=None))
    np.testing.assert_allclose(scan.affine @ (*place, 1), affine @ (2, 5, 1, 1), atol=1e-4)
    # All voxels, by their millimetres: an independent way to every index.
    indices = (
        np.linalg.inv(affine) @ scan.affine @ np.vstack([np.indices(scan.voxels.shape).reshape(3, -1), [[1] * 210]])
    )
    assert np.array_equal(array[tuple(np.rint(indices[:3]).astype(int))], scan.voxels.numpy().flatten())
    assert np.allclose(sorted(scan.spacing), [1.5, 2.0, 3.0], atol=1e-5)
    # D goes up, H to the back, W to the right, as far as an oblique scan does.
    assert (np.diag(scan.affine[[2, 1, 0], :3]) * (1, -1, 1) > 0.8 * np.array(scan.spacing)).all()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SRA", "PIR", "ASL"])
def test_the_default_is_an_axial_picture_with_the_face_up(tmp_path, codes):
    # In RAS+ millimetres: 2 of 6 to the right, 5 of 7 to the front, 1 of 5 up.
    world = np.zeros((6, 7, 5), np.float32)
    world[2, 5, 1] = 100
    image = nibabel.Nifti1Image(world, SPACED)
    target = nibabel.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), target))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    scan = load_scan(tmp_path / "scan.nii.gz")
    assert scan.voxels.shape == (5, 7, 6)
    assert scan.spacing == (3.0, 2.0, 1.5)
    assert scan.voxels.nonzero().tolist() == [[1, 7 - 1 - 5, 2]]  # the face up: H counts from the front


def test_all_axes(tmp_path):
    affine = turned_affine("PIR", True)
    path = write_nifti(tmp_path / "a.nii", COUNTS, affine)
    assert len(AXES) == 48
    for axes in AXES:
        scan = load_scan(path, axes=axes.lower())
        assert scan.axes == axes
        place = np.unravel_index(scan.voxels.argmax().item(), scan.voxels.shape)
        original = np.unravel_index(COUNTS.argmax(), COUNTS.shape)
        np.testing.assert_allclose(scan.affine @ (*place, 1), affine @ (*original, 1), atol=1e-4)
        assert nibabel.aff2axcodes(scan.affine) == tuple(axes)


@pytest.mark.parametrize("axes", ["", "SP", "SPRR", "SPS", "SPL ", "XYZ", "LRS", 3, ("S", "P", "R")], ids=repr)
def test_axes_that_are_none(tmp_path, axes):
    with pytest.raises(ValueError, match=r"axes must be one letter each of R/L, A/P and S/I, such as 'SPR', got"):
        load_scan(tmp_path / "not even there.nii", axes=axes)


@pytest.mark.parametrize("space, signs", [("LPS", (-1, -1)), ("left-anterior-superior", (-1, 1)), ("RAS", (1, 1))])
def test_spaces_of_nrrd(tmp_path, space, signs):
    nrrd(tmp_path / "a.nrrd", space=space)
    scan = load_scan(tmp_path / "a.nrrd", axes="RAS")
    # The file's own axes go to the left, or to the back, where the sign is negative: the scan begins at their end.
    x, y = (sign * corner if sign > 0 else -corner - size for sign, corner, size in zip(signs, (5, 6), (1 * 5, 2 * 4)))
    assert scan.affine.tolist() == [[1, 0, 0, x], [0, 2, 0, y], [0, 0, 3, 7], [0, 0, 0, 1]]


def test_arrays_stay_as_they_are(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS)
    np.save(tmp_path / "f.npy", np.asfortranarray(COUNTS))
    np.savez(tmp_path / "only.npz", anything=COUNTS)
    np.savez_compressed(tmp_path / "named.npz", volume=COUNTS, mask=COUNTS > 0, spacing=[3, 2, 1.5])
    for name in ("a.npy", "f.npy", "only.npz", "named.npz"):
        scan = load_scan(tmp_path / name)
        assert torch.equal(scan.voxels, torch.from_numpy(COUNTS).float()) and scan.axes is None
        assert scan.spacing == ((3.0, 2.0, 1.5) if name == "named.npz" else (1.0, 1.0, 1.0))
        assert scan.affine.tolist() == np.diag([*scan.spacing, 1]).tolist()
        with pytest.raises(ValueError, match=r"must say how its axes lie to be turned to axes 'RAS', but"):
            load_scan(tmp_path / name, axes="RAS")


def test_a_fourth_axis_of_one(tmp_path):
    scan = load_scan(write_nifti(tmp_path / "a.nii", COUNTS[..., None]))  # some tools write (x, y, z, 1)
    assert torch.equal(scan.voxels, torch.from_numpy(COUNTS.transpose(2, 1, 0)[:, ::-1].copy()).float())


def test_endings_in_capitals(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", NOISE).rename(tmp_path / "A.NII.GZ")
    assert load_scan(tmp_path / "A.NII.GZ").voxels.shape == (12, 13, 14)


def test_names(tmp_path, monkeypatch):
    assert SUFFIXES == (".nii", ".nii.gz", ".nrrd", ".npy", ".npz")
    for name in ("ct.nii.gz", "ct.nii", "ct.nrrd", "ct.npy", "ct.npz", "there/CT.NII.GZ", "ct"):
        assert scan_name(name).lower() == "ct"
    assert scan_name(Path("a.b.nii")) == "a.b" and scan_name(".nii") == ".nii"
    (tmp_path / "series.npy").mkdir()
    assert scan_name(tmp_path / "series.npy") == "series.npy"
    monkeypatch.chdir(tmp_path / "series.npy")
    assert scan_name(".") == "series.npy"


# DICOM, what is accepted


def test_every_slice_is_rescaled_by_itself(tmp_path):
    folder = write_dicom(tmp_path / "a", COUNTS)
    assert np.array_equal(load_scan(folder, axes="RAS").voxels.numpy(), COUNTS)
    (folder / "0").write_bytes(patched((folder / "0").read_bytes(), "0028|1053", b".5"))
    (folder / "1").write_bytes(patched((folder / "1").read_bytes(), "0028|1052", b"-9"))
    names = np.random.default_rng(5).permutation(5)
    expected = COUNTS.astype(np.float32)
    expected[:, :, names == 0] *= 0.5
    expected[:, :, names == 1] -= 9
    assert np.array_equal(load_scan(folder, axes="RAS").voxels.numpy(), expected)


def test_packed_pixels(tmp_path):
    scan = load_scan(write_dicom(tmp_path / "a", SMOOTH, packed="JPEG2000"), axes="RAS")
    assert np.array_equal(scan.voxels.numpy(), SMOOTH)
    scan = load_scan(write_frames(tmp_path / "b", SMOOTH, SPACED, packed="JPEG2000"), axes="RAS")
    assert np.array_equal(scan.voxels.numpy(), SMOOTH)


def test_frames_that_go_down_stay_where_they_are(tmp_path):
    folder = write_frames(tmp_path / "a", COUNTS)
    up = load_scan(folder, axes="RAS")
    data = (folder / "frames").read_bytes()
    position = re.compile(rb"(\x20\x00\x32\x00....[-0\\\\]*)([0-4])", re.DOTALL)
    assert [int(found[2]) for found in position.finditer(data)] == [0, 1, 2, 3, 4]
    (folder / "frames").write_bytes(position.sub(lambda found: found[1] + b"%d" % (4 - int(found[2])), data))
    down = load_scan(folder, axes="RAS")
    assert torch.equal(down.voxels, up.voxels.flip(2)) and np.array_equal(down.affine, up.affine)
    (folder / "frames").write_bytes(position.sub(lambda found: found[1] + b"%d" % (int(found[2]) * 2 % 5), data))
    with pytest.raises(ValueError, match="must have its frames in the order of their positions"):
        load_scan(folder)


def test_other_files_are_ignored(tmp_path):
    folder = write_dicom(tmp_path / "a", COUNTS)
    (folder / "README").write_text("hello" * 99)
    (folder / "empty").write_bytes(b"")
    (folder / "._0.dcm").write_bytes(b"of a Mac")
    for name, kind in (("DICOMDIR", b"1.2.840.10008.1.3.10"), ("report", b"1.2.840.10008.5.1.4.1.1.88.11")):
        kind = element(0x0002, 0x0002, b"UI", kind + b"\0" * (len(kind) % 2))
        syntax = element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0")
        series = element(0x0020, 0x000E, b"UI", b"1.9\0")  # of another series, without pixels
        (folder / name).write_bytes(b"\0" * 128 + b"DICM" + kind + syntax + series)
    write_dicom(folder / "deeper", COUNTS, series="1.2.99")
    assert load_scan(folder).voxels.shape == (5, 6, 7)


def test_positions_are_rounded_by_scanners(tmp_path):
    rounded = {"0020|0032": lambda k: f"0\\0\\{round(1.25 * k, 1)}"}
    scan = load_scan(write_dicom(tmp_path / "a", COUNTS, tags=rounded))
    assert scan.spacing[0] == pytest.approx(1.25, abs=0.02)


# Refusals


def truncated(path, share=2 / 3):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def element(group, number, kind, value):
    """An element with explicit type."""
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def patched(data, tag, value):
    """DICOM bytes with another value, as long as the old one, of an element with implicit type."""
    key = struct.pack("<HHI", *(int(part, 16) for part in tag.split("|")), len(value))
    assert data.count(key) == 1, data.count(key)
    start = data.index(key) + len(key)
    return data[:start] + value + data[start + len(value) :]


def huge(path):
    """A complete NIfTI header of 30000^3 voxels, and nothing else."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.float32)
    data = header.binaryblock + b"\0" * 4
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def npy_header(shape, kind="<f4"):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def npz(path, kind=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def packed_npy(array, **settings):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **settings)
    return file.getvalue()


def nrrd(path, data=None, **fields):
    """An NRRD file of (6, 5, 4) voxels, or with other fields; None leaves one out."""
    values = {
        "type": "float",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "6 5 4",
        "space_directions": "(1,0,0) (0,2,0) (0,0,3)",
        "endian": "little",
        "encoding": "raw",
        "space_origin": "(5,6,7)",
    } | fields
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]
    data = NOISE.flatten()[:120].tobytes() if data is None else data
    path.write_bytes("\n".join(["NRRD0004", *lines, "", ""]).encode() + data)


def nrrd_of(path, array):
    sitk.WriteImage(array, str(path))


def series(path, *faults, affine=None, array=COUNTS, **settings):
    """A DICOM series with faults: functions of its folder."""
    write_dicom(path, array, affine, **settings)
    for fault in faults:
        fault(path)


def edit(tag, value, *names):
    """A fault: other bytes as the value of a tag, in some files of the folder."""

    def fault(folder):
        for name in names or [path.name for path in folder.iterdir()]:
            (folder / name).write_bytes(patched((folder / name).read_bytes(), tag, value))

    return fault


def mixed(path):
    write_dicom(path, COUNTS)
    write_dicom(path, COUNTS[:, :, :3], series="1.2.840.99999.1.2.3.4.5.6.7.8", prefix="other")


def other_size(path):
    write_dicom(path, COUNTS)
    write_dicom(path.with_name("b"), COUNTS[:5])
    shutil.copy(path.with_name("b") / "3", path / "3")


def in_colour(path):
    path.mkdir()
    image = sitk.GetImageFromArray(np.zeros((3, 4, 3), np.uint8), isVector=True)
    image.SetMetaData("0020|000e", "1.2.3.4")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path / "a.dcm"))
    execute(writer, image)


def sheared(degrees):
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[1, 2] = 3 * np.tan(np.radians(degrees))
    return affine


def drop_the_third(folder):
    names = np.random.default_rng(5).permutation(5)
    (folder / str(names[2])).unlink()


def flipped_bit(path):
    write_nrrd(path, NOISE, packed=True)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum
    path.write_bytes(data)


WITH_NAN = np.where(np.arange(12) == 3, np.float32(np.nan), NOISE)
DAMAGED = "cannot be read, it may be truncated or damaged: "
TOO_MUCH = "must need at most 8 GiB to be read, got a header that asks for "
ONE_NPZ = "must hold one array, or one called 'volume', got "
SCANS = {
    "missing": ("a.nii.gz", lambda p: None, "must be a file, or a folder of DICOM files, got a path where there is"),
    "unknown ending": ("a.jpg", lambda p: p.write_bytes(b"1"), "must be a file ending in .nii, .nii.gz, .nrrd, .npy"),
    # NIfTI
    "truncated gz": ("a.nii.gz", lambda p: truncated(write_nifti(p, NOISE)), DAMAGED),
    "truncated": ("a.nii", lambda p: truncated(write_nifti(p, NOISE)), DAMAGED),
    "empty": ("a.nii", lambda p: p.write_bytes(b""), "must be a NIfTI image"),
    "not gzip": ("a.nii.gz", lambda p: p.write_bytes(b"hello" * 99), "must be a NIfTI image"),
    "not nifti": ("a.nii", lambda p: p.write_bytes(b"hello" * 99), "must be a NIfTI image"),
    "2D": ("a.nii", lambda p: write_nifti(p, NOISE[0]), r"must be 3D and not empty, got the shape \(13, 12\)"),
    "4D": ("a.nii", lambda p: write_nifti(p, NOISE[..., None].repeat(2, -1)), r"must be 3D .* \(14, 13, 12, 2\)"),
    "NaN": ("a.nii.gz", lambda p: write_nifti(p, NOISE * np.nan), "must hold finite voxels, got 2184 NaN or infinite"),
    "some NaN": ("a.nii", lambda p: write_nifti(p, WITH_NAN), "must hold finite voxels, got 182 NaN or infinite ones"),
    "constant": (
        "a.nii",
        lambda p: write_nifti(p, NOISE * 0 + 7),
        "must hold an image, got the one value 7 everywhere",
    ),
    "huge gz": ("a.nii.gz", huge, TOO_MUCH + "5.03e[+]05 GiB"),
    "huge": ("a.nii", huge, TOO_MUCH),
    "colour": (
        "a.nii",
        lambda p: nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), [(c, "u1") for c in "RGB"]), np.eye(4)), p),
        "must hold real numbers, got the dtype",
    ),
    "complex": ("a.nii", lambda p: write_nifti(p, NOISE + 1j), "must hold real numbers, got the dtype complex64"),
    # npy
    "npy 4D": ("a.npy", lambda p: np.save(p, NOISE[None]), r"must be 3D .*, got the shape \(1, 14, 13, 12\)"),
    "npy no voxels": ("a.npy", lambda p: np.save(p, NOISE[:0]), r"must be 3D and not empty, got .* \(0, 13, 12\)"),
    "npy infinite": ("a.npy", lambda p: np.save(p, NOISE / 0), "must hold finite voxels"),
    "npy huge": ("a.npy", lambda p: p.write_bytes(npy_header((10**6,) * 3)), TOO_MUCH),
    "npy pickle": (
        "a.npy",
        lambda p: np.save(p, np.array([{}]), allow_pickle=True),
        "must hold real numbers, got the dtype object",
    ),
    "npy bare pickle": ("a.npy", lambda p: p.write_bytes(pickle.dumps(NOISE)), DAMAGED),
    "npy complex": ("a.npy", lambda p: np.save(p, NOISE + 1j), "must hold real numbers, got the dtype complex"),
    "npy truncated": ("a.npy", lambda p: (np.save(p, NOISE), truncated(p)), DAMAGED),
    "npy header": ("a.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{"), DAMAGED),
    "npy long header": (
        "a.npy",
        lambda p: p.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"{" * 10**5),
        DAMAGED,
    ),
    "npy empty": ("a.npy", lambda p: p.write_bytes(b""), DAMAGED),
    # npz
    "npz two": ("a.npz", lambda p: np.savez(p, one=NOISE, two=NOISE), ONE_NPZ + r"\['one', 'two'\]"),
    "npz none": ("a.npz", lambda p: np.savez(p, spacing=[1, 1, 1]), ONE_NPZ + r"\['spacing'\]"),
    "npz 2D": ("a.npz", lambda p: np.savez(p, NOISE[0]), r"must be 3D and not empty, got the shape \(13, 12\)"),
    "npz spacing": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 0, 1]), "must have a spacing of 3 positive fin"),
    "npz NaN spacing": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 1, np.nan]), "must have a spacing of 3 posi"),
    "npz two spacings": ("a.npz", lambda p: np.savez(p, NOISE, spacing=[1, 2]), r"spacing of 3 .* the shape \(2,\)"),
    "npz pickle": (
        "a.npz",
        lambda p: npz(p, volume=packed_npy(np.array([{}]), allow_pickle=True)),
        "must hold real numbers, got the dtype object",
    ),
    "npz pickled spacing": (
        "a.npz",
        lambda p: npz(p, volume=packed_npy(NOISE), spacing=packed_npy(np.array([{}] * 3), allow_pickle=True)),
        r"must have a spacing .* got the shape \(3,\) of object",
    ),
    "npz huge": ("a.npz", lambda p: npz(p, volume=npy_header((10**6,) * 3)), TOO_MUCH),
    "npz bomb": (  # 64 MiB of nothing behind the header of one MiB
        "a.npz",
        lambda p: npz(p, volume=npy_header((64, 64, 64)) + b"\0" * 2**26),
        "must have arrays as long as their headers say, got 67108992 bytes of 1048704 in volume",
    ),
    "npz short": ("a.npz", lambda p: npz(p, volume=npy_header((64, 64, 64))), "must have arrays as long as"),
    "npz truncated": ("a.npz", lambda p: (np.savez_compressed(p, NOISE), truncated(p)), DAMAGED),
    "npz not zip": ("a.npz", lambda p: p.write_bytes(b"hello" * 99), DAMAGED + "File is not a zip file"),
    "npz empty": ("a.npz", lambda p: p.write_bytes(b""), DAMAGED),
    # NRRD
    "nrrd truncated": ("a.nrrd", lambda p: truncated(write_nrrd(p, NOISE)), DAMAGED + r"\[nrrd\]"),
    "nrrd truncated gz": ("a.nrrd", lambda p: truncated(write_nrrd(p, NOISE, packed=True)), DAMAGED),
    "nrrd checksum": ("a.nrrd", flipped_bit, DAMAGED + "CRC check failed"),
    "nrrd packs less": (
        "a.nrrd",
        lambda p: nrrd(p, gzip.compress(b"\1" * 479), encoding="gzip"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "nrrd bomb": (
        "a.nrrd",
        lambda p: nrrd(p, gzip.compress(b"\1" * 2**26), encoding="gzip"),
        DAMAGED + "it must unpack to 480 bytes",
    ),
    "nrrd empty": ("a.nrrd", lambda p: p.write_bytes(b""), "must be an NRRD file"),
    "nrrd magic": ("a.nrrd", lambda p: p.write_bytes(b"hello" * 99), "must be an NRRD file"),
    "nrrd nifti": ("a.nrrd", lambda p: write_nifti(p.with_suffix(".nii"), NOISE).rename(p), "must be an NRRD file"),
    "nrrd huge": ("a.nrrd", lambda p: nrrd(p, sizes="30000 30000 30000"), TOO_MUCH + "3.02e[+]05 GiB"),
    "nrrd overflow": ("a.nrrd", lambda p: nrrd(p, sizes=" ".join(["4294967296"] * 3)), "(must need|cannot be read)"),
    "nrrd 2D": ("a.nrrd", lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[0])), "must be 3D .* the dimension '2'"),
    "nrrd 4D": ("a.nrrd", lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[None])), "must be 3D .* dimension '4'"),
    "nrrd colour": (
        "a.nrrd",
        lambda p: nrrd_of(p, sitk.GetImageFromArray(NOISE[..., None].repeat(3, -1), isVector=True)),
        "must be 3D and not empty, got the dimension '4'",
    ),
    "nrrd flat colour": ("a.nrrd", lambda p: nrrd(p, kinds="RGB-color domain domain", sizes="3 5 8"), "must|cannot"),
    "nrrd complex": ("a.nrrd", lambda p: nrrd(p, kinds="complex domain domain", sizes="2 5 12"), "must|cannot"),
    "nrrd NaN": ("a.nrrd", lambda p: write_nrrd(p, WITH_NAN), "must hold finite voxels, got 182"),
    "nrrd constant": ("a.nrrd", lambda p: write_nrrd(p, NOISE * 0), "must hold an image, got the one value 0"),
    "nrrd no space": ("a.nrrd", lambda p: nrrd(p, space=None), "must say its space .*, got None"),
    "nrrd odd space": ("a.nrrd", lambda p: nrrd(p, space="scanner-xyz"), "must say its space .*, got 'scanner-xyz'"),
    "nrrd no directions": ("a.nrrd", lambda p: nrrd(p, space_directions=None), "must say its space .* and directions"),
    "nrrd NaN directions": (
        "a.nrrd",
        lambda p: nrrd(p, space_directions="(nan,0,0) (0,2,0) (0,0,3)"),
        "must have finite space directions",
    ),
    "nrrd singular": ("a.nrrd", lambda p: nrrd(p, space_directions="(1,0,0) (1,0,0) (0,0,3)"), "(must have an|cannot)"),
    "nrrd flat": (
        "a.nrrd",
        lambda p: nrrd(p, space_directions="(1,0,0) (1,0.0001,0) (0,0,3)"),
        "must have an affine whose axes span space",
    ),
    "nrrd detached": ("a.nrrd", lambda p: nrrd(p, data_file="/etc/passwd"), "must hold its voxels right behind"),
    "nrrd skip": ("a.nrrd", lambda p: nrrd(p, byte_skip="-1"), "must hold its voxels right behind"),
    # DICOM
    "empty folder": ("a", lambda p: p.mkdir(), "must hold a DICOM series, got a folder without DICOM images"),
    "no DICOM": ("a", lambda p: (p.mkdir(), (p / "README").write_text("hi")), "must hold a DICOM series"),
    "mixed series": ("a", mixed, r"must hold exactly one image series, got 2: ...1.2.3.4 \(5 images\), \.\.\..* \(3"),
    "dicom damaged magic": ("a", lambda p: (p.mkdir(), (p / "1.dcm").write_bytes(b"hello")), "1.dcm is not a DICOM"),
    "dicom truncated": (
        "a",
        lambda p: series(p, lambda q: truncated(q / "3", 0.98)),
        DAMAGED + ".*less than expected .*file 3",
    ),
    "dicom truncated header": (
        "a",
        lambda p: series(p, lambda q: truncated(q / "3", 0.5)),
        "must have the element SeriesInstanceUID .file 3",
    ),
    "dicom no pixels": (
        "a",
        lambda p: series(p, lambda q: (q / "3").write_bytes((q / "3").read_bytes().split(b"\xe0\x7f")[0])),
        DAMAGED + ".*no pixel data to decode .file 3.",
    ),
    "missing slice": ("a", lambda p: series(p, drop_the_third), "got 1 to 2 mm: slices are missing or unevenly spaced"),
    "uneven slices": (
        "a",
        lambda p: series(p, tags={"0020|0032": lambda k: f"0\\0\\{3 * k + (k == 1) * 0.2}"}),
        "must have evenly spaced slices, got 2.8 to 3.2 mm",
    ),
    "time series": (
        "a",
        lambda p: series(p, tags={"0020|0032": lambda k: f"0\\0\\{k // 2}"}),
        "got several images at one position, a time series[?]",
    ),
    "all at one place": ("a", lambda p: series(p, tags={"0020|0032": "0\\0\\1"}), "several images at one position"),
    "gantry tilt": ("a", lambda p: series(p, affine=sheared(12)), "got a gantry tilt of 12 degrees"),
    "slight tilt": ("a", lambda p: series(p, affine=sheared(1)), "got a gantry tilt of 1 degrees"),
    "other orientation": (
        "a",
        lambda p: series(p, tags={"0020|0037": lambda k: "1\\0\\0\\0\\0\\1" if k == 2 else "1\\0\\0\\0\\1\\0"}),
        "must have the same orientation and pixel spacing in all slices",
    ),
    "no orientation": (
        "a",
        lambda p: series(p, edit("0020|0037", b"1\\0\\0\\1\\0\\0 "), affine=np.diag([-1.0, -1, 1, 1])),
        "two perpendicular unit vectors",
    ),
    "NaN position": (
        "a",
        lambda p: series(p, tags={"0020|0032": "0\\nan\\1"}),
        "readable ImagePositionPatient",
    ),
    "other size": ("a", other_size, r"must have the same size and type of pixels in all images, got \(6, 7"),
    "one slice": ("a", lambda p: series(p, array=COUNTS[:, :, :1]), "must be a volume of at least 2 slices, got one"),
    "dicom colour": ("a", in_colour, "must be grey, of MONOCHROME2, got 3 samples a pixel of 'RGB'"),
    "dicom constant": ("a", lambda p: series(p, array=COUNTS * 0), "must hold an image, got the one value 0"),
    "dicom huge": (
        "a",
        lambda p: (write_frames(p, COUNTS), edit("0028|0010", b"\xff\xff")(p)),
        DAMAGED + ".*less than expected",
    ),
    "dicom packed huge": ("a", lambda p: packed_huge(p), TOO_MUCH),
    "dicom no slope": ("a", lambda p: series(p, edit("0028|1053", b"0 ", "2")), "one rescale slope, not 0"),
    "dicom bits": ("a", lambda p: series(p, edit("0028|0101", b"\x20\0")), "pixels of 8, 16 or 32 bits, got 32 of 16"),
}


def packed_huge(path):
    """65535 x 65535 x 10000 pixels, packed: nothing but the header says how many."""
    header = b"".join(
        element(int(tag[:4], 16), int(tag[5:], 16), kind, value)
        for tag, kind, value in [
            ("0002|0010", b"UI", b"1.2.840.10008.1.2.4.90"),
            ("0020|000e", b"UI", b"1.2.3.4\0"),
            ("0028|0002", b"US", b"\1\0"),
            ("0028|0004", b"CS", b"MONOCHROME2 "),
            ("0028|0008", b"IS", b"100000"),
            ("0028|0010", b"US", b"\xff\xff"),
            ("0028|0011", b"US", b"\xff\xff"),
            ("0028|0100", b"US", b"\x10\0"),
            ("0028|0101", b"US", b"\x10\0"),
            ("0028|0102", b"US", b"\x0f\0"),
            ("0028|0103", b"US", b"\0\0"),
        ]
    )
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    pixels += struct.pack("<HHI", 0xFFFE, 0xE000, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.mkdir()
    (path / "1").write_bytes(b"\0" * 128 + b"DICM" + header + pixels)


@pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning")
@pytest.mark.parametrize("kind", SCANS)
def test_bad_scans(tmp_path, kind):
    name, make, message = SCANS[kind]
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


@pytest.mark.parametrize("kind", ["nii", "nrrd", "dicom"])
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


@pytest.mark.parametrize("package, kind", [("nibabel", "nii"), ("SimpleITK", "nrrd"), ("SimpleITK", "dicom")])
def test_missing_packages(tmp_path, monkeypatch, package, kind):
    path = WRITERS[kind](tmp_path, COUNTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"package '{package}' is not installed; .*'planecycle-fast\\[scans\\]'"):
        load_scan(path)


def test_warnings_of_simpleitk_are_as_they_were(tmp_path):
    assert sitk.ProcessObject.GetGlobalWarningDisplay()
    load_scan(write_nrrd(tmp_path / "a.nrrd", NOISE))
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


# Memory


def test_the_limit_is_checked_before_any_voxel_is_read(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz", NOISE)
    needed = NOISE.size * (4 + 8 + 8)  # float32 in the file, scaled in float64, two copies in float32
    assert load_scan(path, max_bytes=needed).voxels.shape == (12, 13, 14)

    def read(*_, **__):
        raise AssertionError("voxels were read")

    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "__array__", read)
    monkeypatch.setattr(np.lib.format, "read_array", read)
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", read)
    monkeypatch.setattr(subprocess, "Popen", read)
    np.savez(tmp_path / "a.npz", NOISE)
    paths = [path, tmp_path / "a.npz", write_nrrd(tmp_path / "a.nrrd", NOISE), write_dicom(tmp_path / "a", COUNTS)]
    for path, size in zip(paths, (needed, NOISE.size * 12, NOISE.size * 12, COUNTS.size * 8)):
        with pytest.raises(ValueError, match=r"must need at most .*, got a header that asks for"):
            load_scan(path, max_bytes=size - 1)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npy", "a.npz", "fortran.npz"])
def test_reading_keeps_to_what_was_declared(tmp_path, name, dtype):
    array = np.random.default_rng(0).integers(0, 2, (120, 110, 100)).astype(dtype)
    if name == "a.npy":
        np.save(tmp_path / name, array)
    elif name.endswith(".npz"):
        np.savez_compressed(tmp_path / name, np.asfortranarray(array) if "fortran" in name else array)
    else:
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.header.set_slope_inter(2.0, 1.0)
        nibabel.save(image, tmp_path / name)
    declared = array.size * (array.itemsize + (8 if ".np" in name else 8 + 8))
    tracemalloc.start()
    load_scan(tmp_path / name, max_bytes=declared)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.05 * declared
    with pytest.raises(ValueError, match="got a header that asks for"):
        load_scan(tmp_path / name, max_bytes=declared - 1)


RESIDENT = """
import resource, sys
from pathlib import Path
from planecycle_fast.scan_files import load_scan

def children():
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

def own():
    status = Path("/proc/self/status").read_text()
    return [1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM")]

load_scan(sys.argv[1])
for path, limit in (sys.argv[2:4], sys.argv[4:6]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    (before, _), before_children = own(), children()
    load_scan(path, max_bytes=int(limit))
    print(own()[1] - before + children() - before_children)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux, to measure memory")
def test_reading_by_simpleitk_keeps_to_what_was_declared(tmp_path):
    array = np.random.default_rng(0).integers(0, 2, (240, 300, 120)).astype(np.int16)
    (tmp_path / "small").mkdir()
    small = write_frames(tmp_path / "small" / "a", COUNTS)  # a first child
    nrrd_limit, frames_limit = array.size * (2 + 8), array.size * (8 + 3 * 2 + 16)
    large = write_nrrd(tmp_path / "a.nrrd", array, None, True), write_frames(tmp_path / "a", array)
    arguments = [small, large[0], str(nrrd_limit), large[1], str(frames_limit)]
    done = subprocess.run([sys.executable, "-c", RESIDENT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for used, limit in zip(map(int, done.stdout.split()), (nrrd_limit, frames_limit)):
        assert 0.4 * limit < used < limit + 2**24, done.stdout  # less, and nothing was measured
    for path, limit in zip(large, (nrrd_limit, frames_limit)):
        with pytest.raises(ValueError, match="got a header that asks for"):
            load_scan(path, max_bytes=limit - 1)


# Damage, at random

QUIET = """
import sys
from pathlib import Path
from planecycle_fast.scan_files import load_scan
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
