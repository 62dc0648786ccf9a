"""What readers of scans get wrong without a word: orders, units, signs, missing ends. Read rightly, or refused."""

import gzip

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.sequence import Sequence

from planecycle_fast.scans.files import load_scan

from ..scan_writers import COUNTS, NOISE, SMOOTH, write_dicom, write_frames, write_nifti, write_nrrd

# DICOM


def edit(folder, change, names=None):
    for path in sorted(folder.iterdir()):
        if names is None or path.name in names:
            header = pydicom.dcmread(path)
            change(header)
            header.save_as(path)
    return folder


def high_bit(header):
    header.BitsStored, header.HighBit = 12, 15


def lookup_table(header):
    header.ModalityLUTSequence = Sequence([Dataset()])


def dose(header):
    header.DoseGridScaling = "0.01"


@pytest.mark.parametrize("packed", [None, "JPEG2000"])
@pytest.mark.parametrize(
    "change, message",
    [
        (high_bit, "must have pixels of 8, 16 or 32 bits, got 12 of 16, the highest 15"),
        (lookup_table, "must have plain intensities on a plain grid, got the element ModalityLUTSequence"),
        (dose, "must have plain intensities on a plain grid, got the element DoseGridScaling"),
    ],
)
def test_intensities_that_would_be_others(tmp_path, change, message, packed):
    folder = edit(write_dicom(tmp_path / "a", SMOOTH, packed=packed), change)
    with pytest.raises(ValueError, match=message):
        load_scan(folder)


def broken_link(path):
    path.unlink()
    path.symlink_to("an object that was never fetched")


ENDS = {
    "broken link": (broken_link, "must hold its files, got a link to a file that is not there, IM4"),
    "empty": (lambda path: path.write_bytes(b""), "IM4 is not a DICOM file"),
    "damaged": (lambda path: path.write_bytes(b"\0" * 500), "IM4 is not a DICOM file"),
    "other ending": (
        lambda path: (path.write_bytes(b"\0" * 500), path.rename(path.with_name("X.IMA"))),
        "X.IMA is not",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("end", [0, -1])
def test_a_slice_missing_at_an_end(tmp_path, kind, end):
    damage, message = ENDS[kind]
    folder = write_dicom(tmp_path / "a", COUNTS, prefix="IM")
    at_end = sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])[end]
    other = folder / "IM4"  # give the file at the end the name that the messages have
    if at_end != other:
        other.rename(folder / "swap"), at_end.rename(other), (folder / "swap").rename(at_end)
    damage(other)
    with pytest.raises(ValueError, match=message):
        load_scan(folder)


def spaced(step, jitter=0.0):
    return {"0020|0032": lambda k: f"0\\0\\{step * k + jitter * (k % 2):.4f}"}


def test_a_slice_missing_in_a_very_fine_series(tmp_path):
    load_scan(write_dicom(tmp_path / "whole", COUNTS, tags=spaced(0.1)))
    folder = write_dicom(tmp_path / "a", COUNTS, tags=spaced(0.1))
    middle = sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])[2]
    middle.unlink()
    with pytest.raises(ValueError, match="slices are missing or unevenly spaced"):
        load_scan(folder)


def test_thick_slices_may_be_rounded_by_as_much_as_a_hundredth(tmp_path):
    assert load_scan(write_dicom(tmp_path / "a", COUNTS, tags=spaced(20, 0.15))).spacing[0] == pytest.approx(
        20, abs=0.1
    )


def group(**elements):
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return Sequence([item])


def enhanced(path, shared, per_frame):
    """A multi-frame file with functional groups, and none of their elements at its root."""
    header = pydicom.dcmread(path)
    for name in ("RescaleSlope", "RescaleIntercept", "PixelSpacing", "SpacingBetweenSlices", "ImageOrientationPatient"):
        if name in header:
            delattr(header, name)
    if per_frame and "ImagePositionPatient" in header:
        del header.ImagePositionPatient
    header.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    for name, item in shared.items():
        setattr(header.SharedFunctionalGroupsSequence[0], name, item)
    if "PerFrameFunctionalGroupsSequence" in header:
        del header.PerFrameFunctionalGroupsSequence
    if per_frame:
        header.PerFrameFunctionalGroupsSequence = Sequence([Dataset() for _ in range(header.NumberOfFrames)])
        for k, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
            for name, make in per_frame.items():
                setattr(frame, name, make(k))
    header.save_as(path)


SHARED = {
    "PlaneOrientationSequence": group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    "PixelMeasuresSequence": group(PixelSpacing=[2, 1.5], SpacingBetweenSlices=3),
    "PixelValueTransformationSequence": group(RescaleSlope=2, RescaleIntercept=-1000),
}


def test_functional_groups(tmp_path):
    folder = write_frames(tmp_path / "a", COUNTS)
    positions = {"PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20, 30 + 3 * k])}
    enhanced(folder / "frames", SHARED, positions)
    scan = load_scan(folder, axes="LPS")
    assert np.array_equal(scan.voxels.numpy(), COUNTS * 2.0 - 1000)
    assert scan.affine.tolist() == [[-1.5, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]]
    slopes = {"PixelValueTransformationSequence": lambda k: group(RescaleSlope=1 + k, RescaleIntercept=-k)}
    enhanced(folder / "frames", SHARED, positions | slopes)
    k = np.arange(5)
    assert np.array_equal(load_scan(folder, axes="LPS").voxels.numpy(), COUNTS * (1.0 + k) - k)


def test_frames_by_their_distance(tmp_path):
    folder = write_frames(tmp_path / "a", COUNTS)
    header = pydicom.dcmread(folder / "frames")
    header.ImagePositionPatient = [10, 20, 30]
    header.save_as(folder / "frames")
    enhanced(folder / "frames", SHARED, {})
    assert load_scan(folder, axes="LPS").affine.tolist() == [
        [-1.5, 0, 0, -10],
        [0, -2, 0, -20],
        [0, 0, 3, 30],
        [0] * 3 + [1],
    ]


# NIfTI


def test_without_orientation_axes_are_unknown(tmp_path):
    image = nibabel.Nifti1Image(COUNTS, None)
    image.header.set_zooms((1.5, 2, 3))
    image.header["qform_code"] = image.header["sform_code"] = 0
    nibabel.save(image, tmp_path / "a.nii")
    scan = load_scan(tmp_path / "a.nii")
    assert scan.axes is None and scan.affine.tolist() == np.diag([3.0, 2, 1.5, 1]).tolist()
    assert np.array_equal(scan.voxels.numpy(), COUNTS.transpose(2, 1, 0))
    with pytest.raises(ValueError, match="must say how its axes lie to be turned to axes 'RAS'"):
        load_scan(tmp_path / "a.nii", axes="RAS")


@pytest.mark.parametrize("unit, scale", [("mm", 1), ("unknown", 1), ("meter", 1000), ("micron", 0.001)])
def test_units(tmp_path, unit, scale):
    image = nibabel.Nifti1Image(COUNTS, np.diag([1.5, 2, 3, 1]) + np.eye(4, k=3) * 7)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    scan = load_scan(tmp_path / "a.nii", axes="RAS")
    np.testing.assert_allclose(scan.affine[:3], image.affine[:3] * scale)


def test_voxels_that_would_begin_within_the_header(tmp_path):
    data = bytearray(write_nifti(tmp_path / "a.nii", NOISE).read_bytes())
    data[108:112] = np.float32(0).tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(ValueError, match="must have voxels behind its header of 348 bytes, got them at byte 0"):
        load_scan(tmp_path / "a.nii")


@pytest.mark.parametrize("damage", ["a bit", "the checksum"])
def test_checksums(tmp_path, damage):
    raw = write_nifti(tmp_path / "a.nii", NOISE).read_bytes()
    data = bytearray(gzip.compress(raw, 0))  # stored, as they are
    load = tmp_path / "a.nii.gz"
    load.write_bytes(data)
    load_scan(load)
    if damage == "a bit":
        data[-100] ^= 1
    load.write_bytes(data if damage == "a bit" else data[:-8])
    with pytest.raises(ValueError, match="cannot be read, it may be truncated or damaged"):
        load_scan(load)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SRA"])
@pytest.mark.parametrize("shape", [(9, 8, 1), (1, 8, 9), (2, 1, 1)])
def test_axes_of_one(tmp_path, codes, shape):
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(codes), shape)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    scan = load_scan(write_nifti(tmp_path / "a.nii", array, affine))
    assert sorted(scan.voxels.shape) == sorted(shape) and all(s > 0 for s in scan.voxels.stride())


# NRRD and npz


def test_nrrd_in_other_units_or_without_a_place(tmp_path):
    data = write_nrrd(tmp_path / "a.nrrd", NOISE).read_bytes()
    assert b"space origin" in data
    for lines, message in (
        (b'space units: "um" "um" "um"\n', 'must have space units of mm, got "um" "um" "um"'),
        (b'space units: "mm" "mm" "mm"\n', None),
    ):
        (tmp_path / "b.nrrd").write_bytes(data.replace(b"space origin", lines + b"space origin"))
        if message is None:
            load_scan(tmp_path / "b.nrrd")
        else:
            with pytest.raises(ValueError, match=message):
                load_scan(tmp_path / "b.nrrd")
    start = data.index(b"space origin")
    (tmp_path / "b.nrrd").write_bytes(data[:start] + data[data.index(b"\n", start) + 1 :])
    with pytest.raises(ValueError, match="must say its space origin"):
        load_scan(tmp_path / "b.nrrd")


def test_an_affine_that_would_be_ignored(tmp_path):
    np.savez(tmp_path / "a.npz", volume=NOISE, affine=np.eye(4))
    with pytest.raises(ValueError, match="must not hold an affine"):
        load_scan(tmp_path / "a.npz")
