"""MetaImage, detached NRRD, pairs, Analyze, MGH: in place, as NIfTI; files of several volumes or arrays; NaN."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from planecycle_fast.digests import digest_of_scan
from planecycle_fast.feature_files import load_features
from planecycle_fast.orientation import spans_space
from planecycle_fast.scan_files import load_scan, other_file

from .bad_formats import meta, mgh
from .bad_scans import nrrd
from .scans import COUNTS, NOISE, SPACED, WRITERS, itk_image, write_analyze, write_mgh, write_nifti, write_nrrd

NEW = [kind for kind in WRITERS if kind.split()[-1] in ("nhdr", "mha", "mhd", "hdr", "img", "mgz", "mgh")]
SEVERAL = np.stack([COUNTS + 5000 * n for n in range(3)], -1).astype(np.int16)  # (i, j, k, volumes)
ONES = "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"


def random_affine(generator):
    """Any directions at right angles, also mirrored ones, any spacing and place."""
    directions = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = directions * generator.uniform(0.3, 4, 3)
    affine[:3, 3] = generator.uniform(-200, 200, 3)
    return affine


@pytest.mark.parametrize("kind", NEW)
def test_random_affines_are_read_as_from_nifti(tmp_path, kind):
    generator = np.random.default_rng(len(kind))
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        affine = random_affine(generator)
        expected = load_scan(write_nifti(tmp_path / "a.nii", COUNTS, affine))
        scan = load_scan(WRITERS[kind](folder, COUNTS, affine))
        assert torch.equal(scan.voxels, expected.voxels) and scan.axes == "SPR" and spans_space(affine)
        np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-3)  # mm; single precision of 200 mm and less


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u4", "i8", "f4", "f8"])
@pytest.mark.parametrize("suffix", ["mha", "mhd", "nhdr"])
def test_types_of_voxels(tmp_path, suffix, dtype):
    array = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(dtype)
    scan = load_scan(write_nrrd(tmp_path / f"a.{suffix}", array), axes="RAS")
    assert np.array_equal(scan.voxels.numpy(), array)


def test_bytes_in_the_other_order(tmp_path):
    array = np.arange(120, dtype=">f4")
    meta(tmp_path / "a.mha", array.tobytes(), BinaryDataByteOrderMSB="True", TransformMatrix="-1 0 0 0 -1 0 0 0 1")
    scan = load_scan(tmp_path / "a.mha", axes="RAS")
    assert np.array_equal(scan.voxels.numpy(), array.reshape(4, 5, 6).T)
    assert scan.affine.tolist() == [[1, 0, 0, -5], [0, 2, 0, -6], [0, 0, 3, 7], [0, 0, 0, 1]]


def without_flag(path):
    write_mgh(path, COUNTS, SPACED)
    data = bytearray(path.read_bytes())
    data[28:30] = b"\0\0"
    path.write_bytes(data)


WITHOUT = {
    "analyze": ("a.hdr", lambda p: write_analyze(p, COUNTS, (1.5, 2, 3)), [3, 2, 1.5]),
    "analyze voxels": ("a.img", lambda p: write_analyze(p, COUNTS, (1.5, 2, 3)), [3, 2, 1.5]),
    "metaimage": (
        "a.mha",
        lambda p: meta(p, COUNTS.astype("f4").T.tobytes(), DimSize="7 6 5", TransformMatrix=None, Offset=None),
        [3, 2, 1],
    ),
    "mgh": ("a.mgh", without_flag, [1, 1, 1]),  # FreeSurfer's own default, as the spacing is not vouched for either
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_without_orientation_axes_are_unknown(tmp_path, kind):
    name, make, spacing = WITHOUT[kind]
    make(tmp_path / name)
    scan = load_scan(tmp_path / name)
    assert scan.axes is None and scan.affine.tolist() == np.diag([*spacing, 1.0]).tolist()
    assert np.array_equal(scan.voxels.numpy(), COUNTS.T)
    with pytest.raises(ValueError, match="must say how its axes lie to be turned to axes 'RAS'"):
        load_scan(tmp_path / name, axes="RAS")


@pytest.mark.parametrize("zooms", [(0, 1, 1), (1, -2, 1), (1, np.nan, 1), (1, 1, np.inf)])
@pytest.mark.parametrize("name", ["a.hdr", "a.nii", "a.nii.gz"])
def test_a_spacing_that_is_none(tmp_path, name, zooms):
    if name == "a.hdr":
        data = bytearray(write_analyze(tmp_path / name, COUNTS).read_bytes())
    else:
        image = nibabel.Nifti1Image(COUNTS, None)
        image.header["qform_code"] = image.header["sform_code"] = 0
        data = bytearray(image.to_bytes())
    data[80:92] = np.array(zooms, "<f4").tobytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ValueError, match="must have a spacing of 3 positive finite numbers, got"):
        load_scan(tmp_path / name)


@pytest.mark.parametrize("kind", ["mgz", "hdr", "img", "mha"])
def test_endings_in_capitals(tmp_path, kind):
    expected = load_scan(WRITERS[kind](tmp_path, COUNTS))
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(f"A{path.suffix.upper()}"))
    assert torch.equal(load_scan(tmp_path / f"A.{kind.upper()}").voxels, expected.voxels)


# Several volumes


def write_frames_of_nrrd(path, axis):
    """Volumes along an axis of their own: the fastest, the slowest, or in the middle."""
    sizes, kinds, directions = ["7", "6", "5"], ["domain"] * 3, ["(1.5,0,0)", "(0,2,0)", "(0,0,3)"]
    for values, value in ((sizes, "3"), (kinds, "list"), (directions, "none")):
        values.insert(axis, value)
    data = np.moveaxis(SEVERAL, -1, axis).T.tobytes()
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


# Two files are one scan


def test_the_digest_is_of_both_files(tmp_path):
    for kind, other in (("mhd", "a.raw"), ("packed nhdr", "a.raw.gz"), ("hdr", "a.img"), ("img", "a.hdr")):
        path = WRITERS[kind](tmp_path, COUNTS)
        assert other_file(path) == tmp_path / other
        before = digest_of_scan(path)
        assert digest_of_scan(path) == before
        data = bytearray((tmp_path / other).read_bytes())
        data[-1] ^= 1
        (tmp_path / other).write_bytes(data)
        assert digest_of_scan(path) != before
    assert other_file(WRITERS["mha"](tmp_path, COUNTS)) is None and other_file(tmp_path / "not there.mhd") is None


def test_changed_voxels_are_another_scan(run, tmp_path):
    WRITERS["mhd"](tmp_path, COUNTS)
    assert run("a.mhd", "--out", "f.npz")[0] == 0
    assert run("a.mhd", "--out", "f.npz")[1] == ["f.npz  was there already"]
    (tmp_path / "a.raw").write_bytes((COUNTS.T + 1).astype("<i2").tobytes())
    status, _, err = run("a.mhd", "--out", "f.npz")
    assert status == 1 and "out must be new, or hold the same features already" in err[0]


@pytest.mark.parametrize("name", ["f.npz", "f.npz.png", "f.safetensors"])
def test_out_never_replaces_the_voxels(run, tmp_path, name):
    data = NOISE.flatten()[:120].tobytes()
    (tmp_path / name).write_bytes(data)
    meta(tmp_path / "a.mhd", b"", ElementDataFile=name)
    nrrd(tmp_path / "b.nhdr", b"", data_file=name)
    for scan in ("a.mhd", "b.nhdr"):
        load_scan(tmp_path / scan)
        status, out, err = run(scan, "--out", name.removesuffix(".png"), "--overwrite")
        assert status == 1 and out == [] and "out must not replace a scan" in err[0]
        assert (tmp_path / name).read_bytes() == data


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


def test_a_packed_file_of_other_formats_is_checked_to_its_end(tmp_path):
    mgh(tmp_path / "a.mgz", COUNTS)
    raw = gzip.decompress((tmp_path / "a.mgz").read_bytes())
    (tmp_path / "a.mgz").write_bytes(gzip.compress(raw + b"tags of FreeSurfer"))
    load_scan(tmp_path / "a.mgz")
    image = itk_image(COUNTS)
    sitk.WriteImage(image, str(tmp_path / "a.mhd"), useCompression=True)
    data = bytearray((tmp_path / "a.zraw").read_bytes())
    data[-1] ^= 1  # of the checksum
    (tmp_path / "a.zraw").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read, it may be truncated or damaged: .*incorrect data check"):
        load_scan(tmp_path / "a.mhd")
    nibabel.load(tmp_path / "a.mgz")
