"""MetaImage, detached NRRD, pairs, Analyze, MGH: in place, as NIfTI; two files are one scan."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from planecycle_fast.scans.files import digest_of_scan, load_scan, other_file
from planecycle_fast.scans.orientation import spans_space

from ..scan_writers import COUNTS, NOISE, SPACED, WRITERS, itk_image, write_analyze, write_mgh, write_nifti, write_nrrd
from .bad_formats import meta, mgh
from .bad_scans import nrrd

NEW = [kind for kind in WRITERS if kind.split()[-1] in ("nhdr", "mha", "mhd", "hdr", "img", "mgz", "mgh")]


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
