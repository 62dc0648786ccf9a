"""Reading scans: the right voxels in the right place, and refusals that say why."""

import itertools
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from planecycle_fast.scans.files import SUFFIXES, load_scan, scan_name

from ..scan_writers import COUNTS, NOISE, SMOOTH, SPACED, WRITERS, turned_affine, write_dicom, write_frames, write_nifti
from .bad_scans import element, nrrd, patched

AXES = [
    "".join(letters) for pairs in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*pairs)
]

# Reading, in place


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
    assert SUFFIXES[:2] == (".nii", ".nii.gz")
    for name in (*(f"ct{suffix}" for suffix in SUFFIXES), "there/CT.NII.GZ", "ct"):
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
    assert load_scan(folder).voxels.shape == (5, 6, 7)


def test_positions_are_rounded_by_scanners(tmp_path):
    rounded = {"0020|0032": lambda k: f"0\\0\\{round(1.25 * k, 1)}"}
    scan = load_scan(write_dicom(tmp_path / "a", COUNTS, tags=rounded))
    assert scan.spacing[0] == pytest.approx(1.25, abs=0.02)
