"""Reading scans: the right voxels in the right place, and refusals that say why."""

import gzip
import struct
import tracemalloc

import nibabel
import numpy as np
import pytest
import torch

from planecycle_fast.volumes import IMAGENET_MEAN, IMAGENET_STD, Scan, intensities, load_scan, model_input


def save(path, array, affine=None, dtype=np.float32):
    nibabel.save(nibabel.Nifti1Image(np.asarray(array, dtype), np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SRA", "PIR", "ASL"])
def test_a_bright_voxel_ends_up_in_its_place(tmp_path, codes):
    # In RAS+ millimetres: 2 of 6 to the right, 5 of 7 to the front, 1 of 5 up.
    world = np.zeros((6, 7, 5), np.float32)
    world[2, 5, 1] = 100
    image = nibabel.Nifti1Image(world, np.diag([1.5, 2.0, 3.0, 1.0]))
    target = nibabel.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), target))
    path = tmp_path / "scan.nii.gz"
    nibabel.save(image, path)
    scan = load_scan(path)
    assert scan.voxels.shape == (5, 7, 6) and scan.voxels.dtype == torch.float32
    assert scan.spacing == (3.0, 2.0, 1.5)
    assert scan.voxels.nonzero().tolist() == [[1, 7 - 1 - 5, 2]]  # the face up: H counts from the front


def test_formats(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", array)
    assert torch.equal(load_scan(tmp_path / "a.npy").voxels, torch.from_numpy(array).float())
    for name in ("a.nii", "a.nii.gz"):
        scan = load_scan(save(tmp_path / name, array[..., None], dtype=np.int16))  # some tools write (x, y, z, 1)
        assert torch.equal(scan.voxels, torch.from_numpy(array.transpose(2, 1, 0)[:, ::-1].copy()).float())


def truncated(path, array):
    save(path, array)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def huge(path):
    """A complete NIfTI header of 30000^3 voxels, and nothing else."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.float32)
    data = header.binaryblock + b"\0" * 4
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def huge_npy(path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }"
    header = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


NOISE = np.random.default_rng(0).normal(size=(12, 13, 14))
WITH_NAN = np.where(np.arange(14) == 3, np.nan, NOISE)
SCANS = {
    "missing": ("a.nii.gz", lambda p: None, "must be a file, got .*, which does not exist"),
    "folder": ("a.nii", lambda p: p.mkdir(), "which does not exist or is a folder"),
    "unknown ending": ("a.jpg", lambda p: p.write_bytes(b"1"), "ending in .nii, .nii.gz, .npy"),
    "truncated gz": ("a.nii.gz", lambda p: truncated(p, NOISE), "cannot be read, it may be truncated or damaged"),
    "truncated": ("a.nii", lambda p: truncated(p, NOISE), "cannot be read, it may be truncated or damaged"),
    "empty": ("a.nii", lambda p: p.write_bytes(b""), "(must be a NIfTI image|cannot be read)"),
    "not gzip": ("a.nii.gz", lambda p: p.write_bytes(b"hello" * 99), "(must be a NIfTI image|cannot be read)"),
    "not nifti": ("a.nii", lambda p: p.write_bytes(b"hello" * 99), "(must be a NIfTI image|cannot be read)"),
    "2D": ("a.nii", lambda p: save(p, NOISE[0]), r"must be 3D and not empty, got the shape \(13, 14\)"),
    "4D": ("a.nii", lambda p: save(p, NOISE[..., None].repeat(2, -1)), r"must be 3D .* \(12, 13, 14, 2\)"),
    "4D npy": (
        "a.npy",
        lambda p: np.save(p, NOISE[None]),
        r"must be 3D and not empty, got the shape \(1, 12, 13, 14\)",
    ),
    "no voxels": ("a.npy", lambda p: np.save(p, NOISE[:0]), r"must be 3D and not empty, got the shape \(0, 13, 14\)"),
    "NaN": ("a.nii.gz", lambda p: save(p, NOISE * np.nan), "must hold finite voxels, got 2184 NaN or infinite ones"),
    "some NaN": ("a.nii", lambda p: save(p, WITH_NAN), "must hold finite voxels, got 156 NaN or infinite ones"),
    "infinite": ("a.npy", lambda p: np.save(p, NOISE / 0), "must hold finite voxels"),
    "constant": ("a.nii", lambda p: save(p, NOISE * 0 + 7), "must hold an image, got the one value 7 everywhere"),
    "huge gz": ("a.nii.gz", huge, "must need at most 8 GiB to be read, got a header that asks for 5.03e[+]05 GiB"),
    "huge": ("a.nii", huge, "must need at most 8 GiB to be read, got a header that asks for"),
    "huge npy": ("a.npy", huge_npy, "must need at most 8 GiB to be read, got a header that asks for"),
    "pickle": (
        "a.npy",
        lambda p: np.save(p, np.array([{}]), allow_pickle=True),
        "must hold real numbers, got the dtype object",
    ),
    "complex": ("a.npy", lambda p: np.save(p, NOISE + 1j), "must hold real numbers, got the dtype complex128"),
    "colour": (
        "a.nii",
        lambda p: nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), [(c, "u1") for c in "RGB"]), np.eye(4)), p),
        "must hold real numbers, got the dtype",
    ),
    "truncated npy": (
        "a.npy",
        lambda p: (np.save(p, NOISE), p.write_bytes(p.read_bytes()[:999])),
        "cannot be read, it may be truncated or damaged",
    ),
    "npy header": ("a.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff\xff{"), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning")
@pytest.mark.parametrize("kind", SCANS)
def test_bad_files(tmp_path, kind):
    name, make, message = SCANS[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"volume .*{message}"):
        load_scan(tmp_path / name)


def test_the_limit_is_checked_before_any_voxel_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", NOISE)
    needed = NOISE.size * (4 + 8 + 8)  # float32 in the file, scaled in float64, two copies in float32
    assert load_scan(path, max_bytes=needed).voxels.shape == (14, 13, 12)

    def read(*_):
        raise AssertionError("voxels were read")

    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "__array__", read)
    with pytest.raises(ValueError, match=r"must need at most .*, got a header that asks for"):
        load_scan(path, max_bytes=needed - 1)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npy"])
def test_reading_keeps_to_what_was_declared(tmp_path, name, dtype):
    array = np.random.default_rng(0).integers(0, 200, (120, 110, 100)).astype(dtype)
    if name == "a.npy":
        np.save(tmp_path / name, array)
    else:
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.header.set_slope_inter(2.0, 1.0)
        nibabel.save(image, tmp_path / name)
    declared = array.size * (array.itemsize + 8 + 8)
    tracemalloc.start()
    load_scan(tmp_path / name, max_bytes=declared)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.02 * declared
    with pytest.raises(ValueError, match="got a header that asks for"):
        load_scan(tmp_path / name, max_bytes=declared - 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_headers_are_refused_or_read_but_never_crash(tmp_path):
    good = save(tmp_path / "good.nii", NOISE).read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for position in generator.integers(0, 352, 4):
            data[position] = generator.integers(0, 256)
        (tmp_path / "bad.nii").write_bytes(data)
        try:
            load_scan(tmp_path / "bad.nii", max_bytes=2**24)
        except ValueError as error:
            refused += 1
            assert "volume" in str(error)
    assert refused > 50


@pytest.mark.parametrize("columns", [[[1, 1, 0], [0, 0, 0], [0, 0, 1]], [[1, 1, 1]] * 3, [[np.nan] * 3] * 3], ids=str)
def test_an_affine_without_three_axes(tmp_path, columns):
    affine = np.eye(4)
    affine[:3, :3] = columns
    image = nibabel.Nifti1Image(NOISE.astype(np.float32), np.eye(4))
    image.header["sform_code"] = 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    data = bytearray(image.header.binaryblock + b"\0" * 4 + NOISE.astype("<f4").tobytes(order="F"))
    data[108:112] = struct.pack("<f", 352)
    data[344:348] = b"n+1\0"
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(ValueError, match="must have an affine whose axes span space|cannot be read"):
        load_scan(tmp_path / "a.nii")


def test_endings_in_capitals(tmp_path):
    save(tmp_path / "a.nii.gz", NOISE).rename(tmp_path / "A.NII.GZ")
    assert load_scan(tmp_path / "A.NII.GZ").voxels.shape == (14, 13, 12)


def test_model_input_has_cubic_tokens_and_imagenet_statistics():
    image = torch.rand(20, 30, 40)
    volume = model_input(image, spacing=(3.0, 1.0, 1.0), patch_size=(14, 14), size=112)
    # Sides of 60, 30 and 40 mm: the longest is 8 tokens, so a token is 7.5 mm.
    assert volume.shape == (1, 3, 8, 4 * 14, 5 * 14)
    for channel in range(3):
        grey = volume[0, channel] * IMAGENET_STD[channel] + IMAGENET_MEAN[channel]
        torch.testing.assert_close(grey.mean(), image.mean(), rtol=0.02, atol=0)
        assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="size must be at least one patch, 14 pixels, got 13"):
        model_input(image, (1, 1, 1), (14, 14), 13)


def test_resampling_keeps_places():
    image = torch.zeros(40, 20, 20)
    image[30:34, 4:8, 12:16] = 1
    volume = model_input(image, (1.0, 1.0, 1.0), (4, 4), 40)  # 10 x 5 x 5 tokens of 4 mm
    assert volume.shape == (1, 3, 10, 20, 20)
    bright = volume[0, 0].flatten().argmax().item()
    d, h, w = bright // 400, bright // 20 % 20, bright % 20
    assert d in (7, 8) and 4 <= h < 8 and 12 <= w < 16


def test_intensities(tmp_path):
    np.save(tmp_path / "a.npy", np.linspace(0, 1000, 1001).reshape(7, 11, 13))
    scan = load_scan(tmp_path / "a.npy")
    image = intensities(scan, (10, 90))
    assert image.min() == 0 and image.max() == 1
    assert image.flatten()[500].item() == pytest.approx(0.5, abs=1e-3)
    almost_empty = torch.zeros(10, 20, 30)
    almost_empty[5, 6, 7] = 3
    assert intensities(Scan(almost_empty, (1, 1, 1))).sum() == 1


def test_a_size_that_no_memory_holds():
    with pytest.raises(ValueError, match="size must leave a volume of at most 8 GiB, got 100000, which makes it"):
        model_input(torch.rand(4, 5, 6), (1, 1, 1), (14, 14), 100_000)
