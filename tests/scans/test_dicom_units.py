"""What the numbers of a DICOM series mean: each slice by its own rescale, MONOCHROME1 turned, plain or packed."""

import tempfile

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from planecycle_fast.scans.checks import ScanWarning
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.formats import dicom_units
from planecycle_fast.scans.formats.dicom_values import GROUPS

from ..scan_writers import COUNTS, SMOOTH, write_dicom, write_frames
from .bad_scans import truncated
from .test_scan_traps import SHARED, edit, enhanced, group

PACKING = [None, "JPEG2000", "JPEG", "RLE"]
HIGHEST = {"u2": 65535, "i2": -1, "12 bits": 4095}  # of stored numbers, plus the lowest


def by_rle(folder):
    return edit(folder, lambda header: header.compress(RLELossless))


def write(folder, array, packed):
    folder = write_dicom(folder, array, packed=None if packed == "RLE" else packed)
    return by_rle(folder) if packed == "RLE" else folder


def slices(folder):
    """Each file's place along the stack."""
    return {path.name: int(pydicom.dcmread(path).ImagePositionPatient[2]) for path in folder.iterdir()}


@pytest.mark.parametrize("packed", PACKING)
@pytest.mark.parametrize("kind", HIGHEST)
def test_monochrome1_is_turned_within_its_bits_and_then_rescaled(tmp_path, kind, packed):
    array = SMOOTH.astype("u2" if kind == "12 bits" else kind)
    folder = write(tmp_path / "a", array, packed)
    place = slices(folder)

    def turn(header):
        header.PhotometricInterpretation, header.Modality = "MONOCHROME1", "MG"
        header.PresentationLUTShape = "INVERSE"
        k = place[header.filename.rsplit("/", 1)[-1]]
        header.RescaleSlope, header.RescaleIntercept = 1 + k / 4, -10 * k
        if kind == "12 bits":
            header.BitsStored, header.HighBit = 12, 11

    voxels = load_scan(edit(folder, turn), axes="RAS").voxels.numpy()
    k = np.arange(5)
    expected = (HIGHEST[kind] - array.astype(np.float64)) * (1 + k / 4) - 10 * k
    assert np.array_equal(voxels, expected.astype(np.float32))


def test_measurements_that_are_turned_lose_their_units_in_a_warning(run, tmp_path):
    def turn(header):
        header.PhotometricInterpretation, header.Modality, header.Units = "MONOCHROME1", "PT", "BQML"

    folder = edit(write_dicom(tmp_path / "a", COUNTS), turn)
    with pytest.warns(ScanWarning, match="is of MONOCHROME1 and was turned, .*: its units are no longer BQML$"):
        scan = load_scan(folder, axes="RAS")
    assert np.array_equal(scan.voxels.numpy(), -1.0 - COUNTS)
    status, _, err = run("a", "--out", "f.npz", "--pool")
    assert status == 0 and len(err) == 1 and err[0].startswith("planecycle-fast: volume a is of MONOCHROME1")


@pytest.mark.parametrize("packed", PACKING)
def test_every_slice_has_its_own_rescale(tmp_path, packed):
    folder = write(tmp_path / "a", SMOOTH, packed)
    place = slices(folder)

    def rescale(header):
        k = place[header.filename.rsplit("/", 1)[-1]]
        header.Modality, header.Units = "PT", "BQML"
        header.RescaleSlope, header.RescaleIntercept = 0.0123 * (k + 1), k - 3

    voxels = load_scan(edit(folder, rescale), axes="RAS").voxels.numpy()
    k = np.arange(5)
    slopes = np.array([float(f"{0.0123 * (n + 1):.6g}") for n in k])
    np.testing.assert_allclose(voxels, SMOOTH * slopes + k - 3, rtol=1e-6)


def test_a_series_that_is_packed_in_part_and_nothing_left_behind(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder = write_dicom(tmp_path / "a", SMOOTH)
    edit(folder, lambda header: header.compress(RLELossless), ("1", "3"))
    assert np.array_equal(load_scan(folder, axes="RAS").voxels.numpy(), SMOOTH)
    truncated(folder / "3", 0.9)
    with pytest.raises(ValueError, match=r"cannot be read, it may be truncated or damaged: .* \(file 3\)"):
        load_scan(folder)
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("packed", [None, "JPEG2000"])
@pytest.mark.parametrize("turned", [False, True])
def test_every_frame_has_its_own_rescale(tmp_path, packed, turned):
    folder = write_frames(tmp_path / "a", SMOOTH, packed=packed)
    frames = {
        "PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20, 30 + 3 * k]),
        "PixelValueTransformationSequence": lambda k: group(
            RescaleSlope=1 + k, RescaleIntercept=-7 * k, RescaleType="US"
        ),
    }
    enhanced(folder / "frames", SHARED, frames)
    if turned:
        edit(folder, lambda header: setattr(header, "PhotometricInterpretation", "MONOCHROME1"))
        edit(folder, lambda header: setattr(header, "Modality", "MR"))
    k = np.arange(5)
    stored = -1.0 - SMOOTH if turned else SMOOTH
    assert np.array_equal(load_scan(folder, axes="LPS").voxels.numpy(), stored * (1.0 + k) - 7 * k)


@pytest.mark.parametrize("sequence, name, values", [
    ("PixelValueTransformationSequence", "RescaleType", ("US", "mm2/s")),
    ("MREchoSequence", "EffectiveEchoTime", (2.46, 4.92)),
    ("MRDiffusionSequence", "DiffusionBValue", (0.0, 800.0)),
    ("CTXRayDetailsSequence", "KVP", ("80", "140")),
    ("MRImageFrameTypeSequence", "FrameType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])),
    ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
])  # fmt: skip
@pytest.mark.parametrize("missing", [False, True])
def test_frames_that_are_not_one_volume(tmp_path, sequence, name, values, missing):
    folder = write_frames(tmp_path / "a", COUNTS)

    def of(k):
        item = {} if missing and k == 3 else {name: values[k == 3]}
        if sequence == "PixelValueTransformationSequence":
            item |= {"RescaleSlope": 1, "RescaleIntercept": 0}
        return group(**item)

    positions = {"PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20, 30 + 3 * k])}
    shared = {key: item for key, item in SHARED.items() if key != "PixelValueTransformationSequence"}
    enhanced(folder / "frames", shared, positions | {sequence: of})
    with pytest.raises(ValueError, match=rf"must have the same {name} in all slices, got .* \(file frames\)"):
        load_scan(folder)


def frames_of_two_units(path):
    """Frames that would be refused for their units."""
    folder = write_frames(path, COUNTS)
    frames = {
        "PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20, 30 + 3 * k]),
        "PixelValueTransformationSequence": lambda k: group(
            RescaleSlope=1, RescaleIntercept=0, RescaleType=("HU", "US")[k % 2]
        ),
    }
    shared = {key: item for key, item in SHARED.items() if key != "PixelValueTransformationSequence"}
    enhanced(folder / "frames", shared, frames)
    return folder


@pytest.mark.parametrize("kind", ["frames", "slices"])
def test_sizes_that_are_declared_are_looked_at_before_units(tmp_path, kind):
    """Which take long, where there are many frames."""
    if kind == "frames":
        folder = frames_of_two_units(tmp_path / "a")
    else:
        folder = write_dicom(tmp_path / "a", COUNTS)
        edit(folder, lambda header: setattr(header, "KVP", header.filename.rsplit("/", 1)[-1] + "0"))
    with pytest.raises(ValueError, match="must have the same (RescaleType|KVP) in all slices"):
        load_scan(folder)
    edit(folder, lambda header: (setattr(header, "Rows", 65535), setattr(header, "Columns", 65535)))
    with pytest.raises(ValueError, match="must need at most 8 GiB to be read, got a header that asks for"):
        load_scan(folder)


def test_what_frames_share_is_asked_for_once(tmp_path, monkeypatch):
    asked, value_of = [], dicom_units.value_of

    def ask(image, name, read, frame=0):
        asked.append((name, frame))
        return value_of(image, name, read, frame)

    monkeypatch.setattr(dicom_units, "value_of", ask)
    with pytest.raises(ValueError, match="must have the same RescaleType in all slices"):
        load_scan(frames_of_two_units(tmp_path / "a"))
    assert ("Modality", 0) in asked and ("RescaleType", 1) in asked
    assert {name for name, frame in asked if frame} <= set(GROUPS)


def test_a_rescale_in_some_frames_only(tmp_path):
    folder = write_frames(tmp_path / "a", COUNTS)
    frames = {
        "PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20, 30 + 3 * k]),
        "PixelValueTransformationSequence": lambda k: group(
            **({} if k == 2 else {"RescaleSlope": 1, "RescaleIntercept": -1024})
        ),
    }
    shared = {key: item for key, item in SHARED.items() if key != "PixelValueTransformationSequence"}
    enhanced(folder / "frames", shared, frames)
    with pytest.raises(ValueError, match="must have a RescaleSlope and a RescaleIntercept in all slices, or in none"):
        load_scan(folder)


def test_what_scanners_vary_in_one_volume(tmp_path):
    """Numbers that are rounded otherwise, times, and the extremes of each slice are no other meaning."""
    folder = write_dicom(tmp_path / "a", COUNTS)

    def vary(header):
        k = int(header.filename.rsplit("/", 1)[-1])
        header.EchoTime, header.AcquisitionNumber, header.AcquisitionTime = f"{2.46 + k * 1e-4}", k, f"10000{k}"
        header.add_new("SmallestImagePixelValue", "SS", -k)
        header.WindowCenter, header.SliceLocation, header.InstanceNumber = str(k), str(k), k

    assert np.array_equal(load_scan(edit(folder, vary), axes="RAS").voxels.numpy(), COUNTS)
