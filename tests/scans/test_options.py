"""One of several volumes or arrays, and NaN: what may be asked of the readers of scans."""

import re

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from planecycle_fast.commands.cli import main
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan

from ..scan_writers import COUNTS, NOISE, SPACED, WRITERS, write_dicom, write_mgh, write_nifti, write_nrrd
from .bad_formats import meta
from .bad_scans import nrrd

SEVERAL = np.stack([COUNTS + 5000 * n for n in range(3)], -1).astype(np.int16)  # (i, j, k, volumes)
ONES = "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"


# Several volumes


def write_frames_of_nrrd(path, axis, volumes=SEVERAL):
    """Volumes along an axis of their own: the fastest, the slowest, or in the middle."""
    sizes, kinds, directions = ["7", "6", "5"], ["domain"] * 3, ["(1.5,0,0)", "(0,2,0)", "(0,0,3)"]
    for values, value in ((sizes, str(volumes.shape[-1])), (kinds, "list"), (directions, "none")):
        values.insert(axis, value)
    data = np.moveaxis(volumes, -1, axis).T.tobytes()
    values = dict(sizes=" ".join(sizes), kinds=" ".join(kinds), space_directions=" ".join(directions))
    nrrd(path, data, type="short", dimension="4", space_origin="(0,0,0)", **values)
    return path


def write_image_of_four(path, packed=False):
    image = sitk.GetImageFromArray(np.ascontiguousarray(SEVERAL.T), isVector=False)
    image.SetSpacing((1.5, 2, 3, 9))
    image.SetDirection(np.diag([-1.0, -1, 1, 1]).flatten().tolist())
    sitk.WriteImage(image, str(path), useCompression=packed)
    return path


FOURS = {
    "nii": ("a.nii", lambda p: write_nifti(p, SEVERAL, SPACED)),
    "nii.gz": ("a.nii.gz", lambda p: write_nifti(p, SEVERAL, SPACED)),
    "nii of five": ("a.nii", lambda p: write_nifti(p, SEVERAL[..., None], SPACED)),
    "mgz": ("a.mgz", lambda p: write_mgh(p, SEVERAL, SPACED)),
    "mha": ("a.mha", write_image_of_four),
    "packed mha": ("a.mha", lambda p: write_image_of_four(p, True)),
    "mhd": ("a.mhd", write_image_of_four),
    "nrrd, slowest": ("a.nrrd", lambda p: write_frames_of_nrrd(p, 3)),
    "nrrd, fastest": ("a.nrrd", lambda p: write_frames_of_nrrd(p, 0)),
    "nrrd, between": ("a.nrrd", lambda p: write_frames_of_nrrd(p, 1)),
    "npy": ("a.npy", lambda p: np.save(p, SEVERAL.T)),
    "npy, fortran": ("a.npy", lambda p: np.save(p, np.asfortranarray(SEVERAL.T))),
    "npz": ("a.npz", lambda p: np.savez(p, SEVERAL.T)),
}


@pytest.mark.parametrize("kind", FOURS)
def test_one_of_several_volumes(tmp_path, kind):
    name, make = FOURS[kind]
    make(tmp_path / name)
    for index in range(3):
        scan = load_scan(tmp_path / name, axes=None if ".np" in name else "RAS", index=index)
        whole = SEVERAL[..., index].T if ".np" in name else SEVERAL[..., index]
        if "nrrd" in kind:  # whose own axes go to the left and to the back
            whole = whole[::-1, ::-1]
        assert np.array_equal(scan.voxels.numpy(), whole)
        assert scan.spacing == ((1.0, 1.0, 1.0) if ".np" in name else (1.5, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"must be 3D .*, 3 volumes: index \(--index\) picks one, from 0"):
        load_scan(tmp_path / name)
    with pytest.raises(ValueError, match="must hold a volume of index 3, got 3 volumes"):
        load_scan(tmp_path / name, index=3)


@pytest.mark.parametrize("axis", [0, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_volumes_of_nrrd(tmp_path, axis, count):
    volumes = np.concatenate([SEVERAL, SEVERAL + 7], -1)[..., :count]
    write_frames_of_nrrd(tmp_path / "a.nrrd", axis, volumes)
    for index in range(count):
        scan = load_scan(tmp_path / "a.nrrd", axes="LPS", index=index)
        assert np.array_equal(scan.voxels.numpy(), volumes[..., index])
    with pytest.raises(ValueError, match=f"{count} volumes?: index .--index. picks one"):
        load_scan(tmp_path / "a.nrrd")
    nrrd(tmp_path / "b.nrrd", dimension="4", sizes="6 5 4", space_directions="(1,0,0) (0,2,0) (0,0,3) none")
    with pytest.raises(ValueError, match="must have as many sizes as dimensions, got 3 of 4"):
        load_scan(tmp_path / "b.nrrd", index=0)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_index_of_the_only_volume(tmp_path, kind):
    path = WRITERS[kind](tmp_path, COUNTS)
    if path.is_dir():
        with pytest.raises(ValueError, match="must be a file to hold several arrays or volumes, got a folder"):
            load_scan(path, index=0)
        return
    assert torch.equal(load_scan(path, index=0).voxels, load_scan(path).voxels)
    with pytest.raises(ValueError, match="must hold a volume of index 1, got 1 volume$"):
        load_scan(path, index=1)


def test_only_the_volume_that_is_asked_for_needs_memory(tmp_path):
    for name, make in (FOURS["nii"], FOURS["mha"], FOURS["mhd"], FOURS["npy"]):
        make(tmp_path / name)
        needed = COUNTS.size * (2 + 8 + (8 if name == "a.nii" else 0))
        load_scan(tmp_path / name, index=1, max_bytes=needed)
        with pytest.raises(ValueError, match="got a header that asks for"):
            load_scan(tmp_path / name, index=1, max_bytes=needed - 1)
    for kind in ("packed mha", "npz", "nrrd, slowest"):  # these read all volumes
        FOURS[kind][1](tmp_path / FOURS[kind][0])
        with pytest.raises(ValueError, match="got a header that asks for"):
            load_scan(tmp_path / FOURS[kind][0], index=1, max_bytes=needed)


def test_space_and_time_that_are_mixed(tmp_path):
    matrix = ONES.split()
    matrix[3] = "0.5"
    fields = dict(NDims="4", DimSize="6 5 2 2", Offset="0 0 0 0", ElementSpacing="1 1 1 1")
    meta(tmp_path / "a.mha", TransformMatrix=ONES, **fields)
    assert load_scan(tmp_path / "a.mha", index=1).voxels.shape == (2, 5, 6)
    meta(tmp_path / "a.mha", TransformMatrix=" ".join(matrix), **fields)
    with pytest.raises(ValueError, match="must keep space and time apart"):
        load_scan(tmp_path / "a.mha", index=1)


COLOURS = {
    "pixels last": (
        "a.npy",
        lambda p: np.save(p, np.zeros((5, 6, 7, 3), np.uint8)),
        "whose last axis looks like colours",
    ),
    "with alpha": ("a.npz", lambda p: np.savez(p, np.zeros((5, 6, 7, 4))), "whose last axis looks like colours"),
    "pictures": (
        "a.npz",
        lambda p: np.savez(p, train_images=NOISE, train_labels=np.zeros((14, 1))),
        "must hold volumes, got 14 pictures of 13 x 12 in train_images",
    ),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_and_pictures_are_no_volumes(tmp_path, kind):
    name, make, message = COLOURS[kind]
    make(tmp_path / name)
    for options in ({"array": "train_images"},) if kind == "pictures" else ({}, {"index": 0}):
        with pytest.raises(ValueError, match=message):
            load_scan(tmp_path / name, **options)


def test_one_of_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", one=COUNTS, two=COUNTS + 1, spacing=[3, 2, 1])
    scan = load_scan(tmp_path / "a.npz", array="two")
    assert np.array_equal(scan.voxels.numpy(), COUNTS + 1) and scan.spacing == (3, 2, 1)
    with pytest.raises(ValueError, match=r"got \['one', 'two'\]; array \(--array NAME\) picks one"):
        load_scan(tmp_path / "a.npz")
    for name in ("three", "spacing", ""):
        with pytest.raises(ValueError, match=f"must hold an array called '{name}', got \\['one', 'two'\\]"):
            load_scan(tmp_path / "a.npz", array=name)
    for kind in ("nii", "mha", "mgz"):
        with pytest.raises(ValueError, match="must be an .npz to hold an array called 'one'"):
            load_scan(WRITERS[kind](tmp_path, COUNTS), array="one")


@pytest.mark.parametrize("index", [-1, 1.5, True, "1"])
def test_an_index_that_is_none(tmp_path, index):
    with pytest.raises(ValueError, match=f"index must be that of a volume, 0 or more, got {index!r}"):
        load_scan("not even there.nii", index=index)


@pytest.mark.parametrize("name", ["array", "series"])
@pytest.mark.parametrize("value", [1.5, b"1", ["1"]])
def test_names_that_are_none(tmp_path, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be text, got {value!r}")):
        load_scan("not even there.nii", **{name: value})


# NaN


HOLES = np.where(np.arange(12) == 3, np.float32(np.nan), NOISE)


@pytest.mark.parametrize(
    "name, make", [("a.nii", write_nifti), ("a.mha", write_nrrd), ("a.mgh", write_mgh), ("a.npy", np.save)]
)
def test_nan_is_filled(tmp_path, name, make):
    make(tmp_path / name, HOLES)
    axes = None if name == "a.npy" else "RAS"
    for value in (-1000, 0.25):
        scan = load_scan(tmp_path / name, axes, fill_nan=value)
        assert np.array_equal(scan.voxels.numpy(), np.where(np.isnan(HOLES), np.float32(value), NOISE))
    with pytest.raises(ValueError, match="got 182 NaN and 0 infinite, .*; fill_nan .--fill-nan VALUE. takes the place"):
        load_scan(tmp_path / name)
    make(tmp_path / name, np.where(np.isnan(HOLES), np.float32(np.inf), HOLES))
    with pytest.raises(ValueError, match="got 0 NaN and 182 infinite, or beyond float32's 3.4e[+]38$"):
        load_scan(tmp_path / name, fill_nan=0)
    make(tmp_path / name, NOISE * np.float32(np.nan))
    with pytest.raises(ValueError, match="must hold an image, got the one value 7 everywhere"):
        load_scan(tmp_path / name, fill_nan=7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, "0"])
def test_what_cannot_fill(value):
    with pytest.raises(ValueError, match="fill_nan must be a finite number within float32, got"):
        load_scan("not even there.nii", fill_nan=value)


# From the command line


def test_options_of_the_command_line(run, tmp_path):
    holes = SEVERAL.astype(np.float32)
    holes[1, 2, 3, 1] = np.nan
    write_nifti(tmp_path / "a.nii", holes)
    np.savez(tmp_path / "b.npz", one=SEVERAL[..., 0], two=SEVERAL[..., 1])
    for name, options, settings in (
        ("a.nii", ["--index", "1", "--fill-nan", "-3"], {"index": 1, "fill_nan": -3.0, "array": None}),
        ("b.npz", ["--array", "two"], {"index": None, "fill_nan": None, "array": "two"}),
    ):
        status, out, err = run(name, "--out", "out", *options, "--pool")
        assert (status, err) == (0, []), err
        metadata = load_features(tmp_path / "out" / f"{name[0]}.safetensors").metadata
        assert settings.items() <= metadata["settings"].items()
    for options, message in (
        (["--index", "1"], "must hold finite voxels, got 1 NaN"),
        ([], "3 volumes: index (--index) picks one"),
        (["--index", "9"], "must hold a volume of index 9, got 3 volumes"),
        (["--array", "x"], "must be an .npz"),
    ):
        status, out, err = run("a.nii", "--out", "new", *options)
        assert status == 1 and out == [] and len(err) == 1 and message in err[0]
    assert run("a.nii", "--out", "new", "--index", "-1")[0] == 1
    assert not (tmp_path / "new").exists()


def test_the_demo_takes_what_its_lines_advise(model, tmp_path, monkeypatch, capsys):
    """And resamples what `features` only does where it is asked to: it gives every scan another grid."""
    monkeypatch.chdir(tmp_path)
    holes = np.concatenate([SEVERAL.astype(np.float32)] * 2, 2)
    holes[1, 2, 3, 1] = np.nan
    sheared = np.diag([1.0, 1, 2.5, 1])
    sheared[1, 2] = 2.5 * np.tan(np.radians(20))
    write_nifti(tmp_path / "a.nii", holes, sheared)
    np.savez(tmp_path / "b.npz", one=SEVERAL[..., 0], two=SEVERAL[..., 1])
    write_dicom(tmp_path / "c", COUNTS)
    write_dicom(tmp_path / "c" / "d", COUNTS[:, :, :3], series="1.2.9")
    for name, options, advice, size in (
        ("a.nii", ["--index", "1", "--fill-nan", "0"], ["--index", "--fill-nan"], "10 x 15 x 7"),
        ("b.npz", ["--array", "two"], ["--array"], "7 x 6 x 5"),
        ("c", ["--series", "1.2.9"], ["--series"], "3 x 6 x 7"),
    ):
        for count, hint in enumerate(advice):
            given = options[: 2 * count]
            assert main(["demo", "--model", model, "--volume", name, "--out", "p.png", *given]) == 1
            captured = capsys.readouterr()
            assert captured.out == "" and hint in captured.err and len(captured.err.splitlines()) == 1
        assert not (tmp_path / "p.png").exists()
        assert main(["demo", "--model", model, "--volume", name, "--out", "p.png", "--size", "64", *options]) == 0
        captured = capsys.readouterr()
        assert f"{name}: {size} voxels" in captured.out
        assert captured.err.count("resampled to a right grid") == len(captured.err.splitlines()) == (name == "a.nii")
        (tmp_path / "p.png").unlink()
