"""A folder with folders and several DICOM series: listed, one of them picked."""

import warnings

import numpy as np
import pytest

from planecycle_fast.commands.cli import main
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.formats.dicom_series import list_series

from ..scan_writers import COUNTS, write_dicom, write_frames
from .bad_scans import truncated
from .test_bad_scans import mutated
from .test_scan_traps import edit

T1, T2, SCOUT = "1.2.840.1.11", "1.2.840.1.22", "1.2.840.1.33"
ARRAYS = {T1: COUNTS, T2: COUNTS + 7, SCOUT: COUNTS[:, :, :2] * 2}


def study(path, numbers=(3, 2, 1)):
    """Two series in a folder of one, a third in files of two folders."""
    path.mkdir()
    for (uid, array), number, name in zip(ARRAYS.items(), numbers, ("T1 axial", "T2 axial", "scout")):
        folder = write_dicom(path / name.split()[0], array, series=uid)

        def describe(header, number=number, name=name):
            header.SeriesDescription, header.Modality = name, "MR"
            header.SeriesNumber = number

        edit(folder, describe)
    (path / "T1" / "deep" / "er").mkdir(parents=True)
    for name in ("2", "4"):
        (path / "T1" / name).rename(path / "T1" / "deep" / "er" / name)
    for file in (path / "scout").iterdir():
        file.rename(path / "T2" / f"scout{file.name}")
    (path / "scout").rmdir()
    return path


def test_a_list(tmp_path, capsys):
    found = list_series(study(tmp_path / "a"))
    assert [(each.number, each.uid, each.images, each.size) for each in found] == [
        (1, SCOUT, 2, (6, 7)),
        (2, T2, 5, (6, 7)),
        (3, T1, 5, (6, 7)),
    ]
    assert main(["series", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.splitlines() == [
        f"1: MR 'scout', 2 images of 6 x 7, UID {SCOUT}",
        f"2: MR 'T2 axial', 5 images of 6 x 7, UID {T2}",
        f"3: MR 'T1 axial', 5 images of 6 x 7, UID {T1}",
    ]
    assert main(["series", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"planecycle-fast: volume {tmp_path / 'no'} must be a folder of DICOM files, got none there"
    ]


@pytest.mark.parametrize("name, data, message", [
    (None, b"", "must hold a DICOM series, got a folder without DICOM images"),
    ("notes.txt", b"hello", "must hold a DICOM series, got a folder without DICOM images"),
    ("1.dcm", b"hello", "cannot be read, it may be damaged: 1.dcm is not a DICOM file"),
])  # fmt: skip
def test_a_list_of_nothing_is_refused(tmp_path, capsys, name, data, message):
    if name is not None:
        (tmp_path / name).write_bytes(data)
    assert main(["series", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and f"volume {tmp_path} {message}" in captured.err
    for series in (None, "1"):
        with pytest.raises(ValueError, match=f"^volume {tmp_path} {message}"):
            load_scan(tmp_path, series=series)


def test_a_list_is_of_printable_characters(tmp_path, capsys):
    def describe(header):
        header.SeriesDescription, header.Modality = "\x1b[31mred", "\x1b[2J"
        header.add_new("SeriesInstanceUID", "LO", "1.2\x1b[2J")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of such values
        edit(write_dicom(tmp_path / "a", COUNTS), describe)
    assert main(["series", str(tmp_path / "a")]) == 0
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isprintable() and "red" in line and "5 images of 6 x 7" in line


@pytest.mark.parametrize("wanted, uid", [
    ("3", T1), ("2", T2), (T1, T1), ("840.1.22", T2), ("scout", SCOUT), (" T1 axial", T1), ("1.33", SCOUT),
])  # fmt: skip
def test_picking_one(tmp_path, wanted, uid):
    assert np.array_equal(load_scan(study(tmp_path / "a"), axes="RAS", series=wanted).voxels.numpy(), ARRAYS[uid])


def test_a_number_that_is_no_text_and_a_long_end(tmp_path):
    folder = study(tmp_path / "a")
    write_dicom(folder / "late", COUNTS + 9, series="1.2.840.12345678", tags={"0020|0011": "9"})
    for wanted, array in ((2, ARRAYS[T2]), ("12345678", COUNTS + 9), (9, COUNTS + 9)):
        assert np.array_equal(load_scan(folder, axes="RAS", series=wanted).voxels.numpy(), array)


def test_numbers_that_are_not_one_series(tmp_path):
    folder = study(tmp_path / "a", numbers=(5, 5, None))
    assert [each.number for each in list_series(folder)] == [5, 5, None]
    for wanted, message in (("5", "one series '5', got 2: 5: MR "), ("1", "a series '1', got 3"), ("None", "a series")):
        with pytest.raises(ValueError, match=f"must have {message}"):
            load_scan(folder, series=wanted)
    for each in list_series(folder):
        scan = load_scan(folder, axes="RAS", series=each.uid)
        assert np.array_equal(scan.voxels.numpy(), ARRAYS[each.uid])


@pytest.mark.parametrize("wanted, message", [
    (None, r"one image series, or have one picked \(--series\), got 3: 1: MR 'scout', 2 images of 6 x 7"),
    ("4", "must have a series '4', got 3: 1: MR 'scout'"),
    ("22", "must have a series '22', got 3: 1: MR 'scout'"),  # the end of a UID, but it could be a number
    ("T1", "must have a series 'T1', got 3"),
    ("", "must have a series '', got 3"),
    ("1.2.840", "must have a series '1.2.840', got 3"),
])  # fmt: skip
def test_none_or_several(tmp_path, wanted, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_scan(study(tmp_path / "a"), series=wanted)
    assert "\n" not in str(raised.value)


def test_an_end_or_a_description_of_several(tmp_path):
    write_dicom(tmp_path / "a", COUNTS, series="1.2.7.1")
    write_dicom(tmp_path / "a", COUNTS, series="1.2.8.1", prefix="b")
    for wanted in (".1", "same"):
        edit(tmp_path / "a", lambda header: setattr(header, "SeriesDescription", "same"))
        with pytest.raises(ValueError, match=f"must have one series '{wanted}', got 2"):
            load_scan(tmp_path / "a", series=wanted)


def test_a_series_of_a_file(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS)
    with pytest.raises(ValueError, match="must be a folder to have the series '3' picked"):
        load_scan(tmp_path / "a.npy", series="3")


def test_folders_by_links_once_each_and_hidden_ones_not(tmp_path):
    folder = write_dicom(tmp_path / "a", COUNTS)
    (folder / "loop").symlink_to(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("1", "3"):
        (folder / name).rename(outside / name)
    (folder / "x").symlink_to(outside)
    (folder / "y").symlink_to(outside)
    write_dicom(folder / ".hidden", COUNTS, series="1.9")
    assert np.array_equal(load_scan(folder, axes="RAS").voxels.numpy(), COUNTS)


def test_damage_beside_a_series_that_is_picked(tmp_path):
    folder = study(tmp_path / "a")
    write_frames(folder / "other", COUNTS)
    truncated(folder / "other" / "frames", 0.2)
    assert load_scan(folder, series="3").voxels.shape == (5, 6, 7)
    with pytest.raises(ValueError, match="cannot be read, it may be|must have"):
        load_scan(folder)
    (folder / "T1" / "deep" / "er" / "2").write_bytes(b"hello")
    with pytest.raises(ValueError, match="must have evenly|2 is not a DICOM file with its prefix"):
        load_scan(folder, series="3")
    assert load_scan(folder, series="2").voxels.shape == (5, 6, 7)


def test_features_of_each_series(run, tmp_path):
    folder = study(tmp_path / "a")
    status, out, err = run("a", "--out", "out", "--pool")
    assert status == 1 and out == [] and len(err) == 1 and "or have one picked (--series), got 3" in err[0]
    assert not (tmp_path / "out").exists()
    for wanted, name in (("2", "a_2"), ("T1 axial", "a_T1_axial")):
        status, out, err = run("a", "--out", "out", "--pool", "--series", wanted)
        assert (status, err) == (0, []) and out[0].startswith(f"out/{name}.safetensors  ")
    metadata = [load_features(tmp_path / "out" / f"{name}.safetensors").metadata for name in ("a_2", "a_T1_axial")]
    assert [each["settings"]["series"] for each in metadata] == ["2", "T1 axial"]
    assert metadata[0]["scan_sha256"] != metadata[1]["scan_sha256"]
    # What is beside a series is no part of it; each of its files is.
    (folder / "T2" / "notes.txt").write_text("hello")
    assert run("a", "--out", "out", "--pool", "--series", "2")[1] == ["out/a_2.safetensors  was there already"]
    slice_ = folder / "T1" / "deep" / "er" / "2"
    slice_.write_bytes(slice_.read_bytes()[:-2] + b"ab")
    assert run("a", "--out", "out", "--pool", "--series", "2")[0] == 0
    assert run("a", "--out", "out", "--pool", "--series", "T1 axial")[0] == 1
    status, _, err = run("a", "--out", "a/T1/deep/f.npz", "--series", "2")
    assert status == 1 and err == ["planecycle-fast: out must not be in the folder of a scan, got a/T1/deep/f.npz"]


def test_damaged_headers_are_listed_or_refused(tmp_path):
    generator = np.random.default_rng(3)
    data = (write_frames(tmp_path / "whole", COUNTS) / "frames").read_bytes()
    listed = 0
    for number in range(150):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "frames").write_bytes(mutated(data, generator, 128, 700))
        for read in (list_series, load_scan):
            try:
                read(folder)
                listed += read is list_series
            except ValueError as error:
                assert str(error).startswith(f"volume {folder} ") and "\n" not in str(error)
    assert 20 < listed <= 150
