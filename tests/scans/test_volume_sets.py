"""Many volumes in one array, as MedMNIST3D has them: each with the features that it has by itself, in one file."""

import numpy as np
import pytest
import torch

from planecycle_fast.scans import volume_sets
from planecycle_fast.scans.checks import ScanWarning
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.preprocess import PERCENTILES, Window, prepare
from planecycle_fast.scans.scan import Scan
from planecycle_fast.scans.volume_sets import features_of, load_volumes

from .bad_scans import npy_header, npz, packed_npy, truncated

GENERATOR = np.random.default_rng(0)
COUNTS = {"train": 5, "val": 2, "test": 3}


def medmnist(path, **more):
    """As its 3D sets are written: `np.savez_compressed`, uint8, labels (N, 1)."""
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"{split}_images"] = GENERATOR.integers(0, 256, (count, 6, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = GENERATOR.integers(0, 11, (count, 1), dtype=np.uint8)
    np.savez_compressed(path, **(arrays | more))
    return arrays | more


@pytest.mark.parametrize("pixels", [1, 2**14, 2**21], ids=["one by one", "two by two", "all at once"])
def test_each_volume_has_the_features_that_it_has_by_itself(run, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(volume_sets, "PIXELS", pixels)
    arrays = medmnist(tmp_path / "organ.npz")
    status, out, err = run("organ.npz", "--out", "f.safetensors", "--array", "train_images", "--layers", "1,3")
    assert (status, err) == (0, []) and out == ["f.safetensors  5 volumes of 6 x 2 x 2 patches"]
    tensors, metadata = load_features(tmp_path / "f.safetensors")
    assert tensors["layer3.patches"].shape == (5, 6, 2, 2, 64) and tensors["layer3.cls"].shape == (5, 6, 64)
    assert tensors["layer1.registers"].shape[:2] == (5, 6) and tensors["layer1.pooled"].shape == (5, 64)
    assert np.array_equal(tensors.pop("labels").numpy(), arrays["train_labels"])
    assert metadata["volumes"] == 5 and metadata["split"] == "train" and metadata["axes"] == "unknown"
    assert metadata["settings"]["array"] == "train_images" and metadata["settings"]["index"] is None
    assert metadata["size"] == [6, 2, 2] and metadata["padding"] == [4, 4] and metadata["scan_size"] == [6, 28, 28]
    for n in range(5):
        given = ("organ.npz", "--out", f"{n}.npz", "--array", "train_images", "--index", n, "--layers", "1,3")
        assert run(*given)[0] == 0
        one, of_one = load_features(tmp_path / f"{n}.npz")
        assert set(one) == set(tensors) and of_one["affine"] == metadata["affine"] and "volumes" not in of_one
        for name, tensor in one.items():
            torch.testing.assert_close(tensors[name][n], tensor, rtol=1e-4, atol=1e-5)


def test_pooled_vectors_and_the_second_run(run, tmp_path):
    arrays = medmnist(tmp_path / "organ.npz", spacing=np.array([2.0, 1, 1]))
    given = ("organ.npz", "--out", "f.npz", "--pool", "--array", "val_images")
    assert run(*given)[:2] == (0, ["f.npz  2 volumes of 6 x 2 x 2 patches"])
    tensors, metadata = load_features(tmp_path / "f.npz")
    assert set(tensors) == {"pooled", "labels"} and tensors["pooled"].shape == (2, 64)
    assert metadata["split"] == "val" and metadata["scan_spacing"] == [2, 1, 1]
    assert np.array_equal(tensors["labels"].numpy(), arrays["val_labels"])
    assert run(*given)[:2] == (0, ["f.npz  was there already"])
    status, _, err = run(*given[:-1], "test_images")
    assert status == 1 and "out must be new, or hold the same features already" in err[0]


def test_an_array_without_labels_or_with_many(run, tmp_path):
    volumes = GENERATOR.normal(size=(3, 4, 20, 20))
    wide = GENERATOR.normal(size=(3, 14)) > 0
    np.savez(tmp_path / "a.npz", some=volumes, other=volumes[:1], test_images=volumes, test_labels=wide)
    for array, labels in (("some", None), ("test_images", wide)):
        assert run("a.npz", "--out", f"{array}.safetensors", "--array", array)[0] == 0
        tensors, metadata = load_features(tmp_path / f"{array}.safetensors")
        assert tensors["patches"].shape[0] == metadata["volumes"] == 3
        assert metadata["split"] == (None if labels is None else "test")
        assert ("labels" in tensors) == (labels is not None)
    assert tensors["labels"].dtype == torch.bool and np.array_equal(tensors["labels"].numpy(), wide)
    assert run("a.npz", "--out", "one.npz", "--array", "other")[1] == ["one.npz  1 volumes of 4 x 2 x 2 patches"]


def test_for_python(tmp_path):
    arrays = medmnist(tmp_path / "organ.npz")
    volumes = load_volumes(tmp_path / "organ.npz", "test_images")
    assert len(volumes) == 3 and volumes.split == "test" and len(list(volumes)) == 3
    assert np.array_equal(volumes.labels, arrays["test_labels"])
    for n, scan in enumerate(volumes):
        alone = load_scan(tmp_path / "organ.npz", array="test_images", index=n)
        assert torch.equal(scan.voxels, alone.voxels) and scan.spacing == (1, 1, 1) and scan.axes is None
        assert np.array_equal(scan.voxels.numpy(), arrays["test_images"][n])
    with pytest.raises(IndexError):
        volumes[3]
    holes = arrays["test_images"].astype(np.float32)
    holes[1, 2] = np.nan
    np.savez(tmp_path / "holes.npz", holes)
    with pytest.raises(ValueError, match=r"^volume .*holes.npz must hold finite .* 784 NaN .* \(its volume 1\)$"):
        load_volumes(tmp_path / "holes.npz")[1]
    assert (load_volumes(tmp_path / "holes.npz", fill_nan=7)[1].voxels[2] == 7).all()


# Refused


def one_flat(path):
    volumes = GENERATOR.integers(0, 256, (4, 6, 28, 28), dtype=np.uint8)
    volumes[2] = 9
    np.savez(path, train_images=volumes, train_labels=np.zeros((4, 1)))


def with_labels(path, labels):
    np.savez(path, train_images=GENERATOR.normal(size=(4, 5, 20, 20)), train_labels=labels)


BAD = {
    "no array": (medmnist, [], "'val_labels']; array (--array NAME) picks one"),
    "labels": (medmnist, ["--array", "train_labels"], "must be 3D and not empty, got the shape (5, 1)"),
    "unknown": (medmnist, ["--array", "images"], "must hold an array called 'images', got ['test_images',"),
    "index": (medmnist, ["--array", "val_images", "--index", "2"], "must hold a volume of index 2, got 2 volumes"),
    "axes": (medmnist, ["--array", "val_images", "--axes", "RAS"], "must say how its axes lie to be turned"),
    "picture": (
        medmnist,
        ["--array", "val_images", "--picture"],
        "picture must be of one volume; index (--index) picks",
    ),
    "flat": (one_flat, [], "must hold an image, got the one value 9 everywhere (its volume 2)"),
    "fewer labels": (
        lambda p: with_labels(p, np.zeros((3, 1))),
        [],
        "must have labels for its 4 volumes, got the shape (3, 1) of float64",
    ),
    "words": (
        lambda p: with_labels(p, np.array(["a"] * 4)),
        [],
        "must have labels for its 4 volumes, got the shape (4,)",
    ),
    "pickled labels": (
        lambda p: npz(
            p,
            train_images=packed_npy(GENERATOR.normal(size=(2, 5, 20, 20))),
            train_labels=packed_npy(np.array([{}] * 2), allow_pickle=True),
        ),
        [],
        "must have labels for its 2 volumes, got the shape (2,) of object",
    ),
    "colours": (
        lambda p: np.savez(p, train_images=np.zeros((9, 28, 28, 3), np.uint8), train_labels=np.zeros(9)),
        [],
        "whose last axis looks like colours",
    ),
    "pictures": (
        lambda p: np.savez(p, train_images=np.zeros((9, 28, 28), np.uint8), train_labels=np.zeros(9)),
        [],
        "must hold volumes, got 9 pictures of 28 x 28 in train_images",
    ),
    "colours in 3D": (
        lambda p: np.savez(p, train_images=np.zeros((2, 8, 8, 8, 3), np.uint8), train_labels=np.zeros(2)),
        [],
        "must be 3D and not empty, got the shape (2, 8, 8, 8, 3)",
    ),
    "none": (
        lambda p: np.savez(p, train_images=np.zeros((0, 8, 8, 8), np.uint8), train_labels=np.zeros((0, 1))),
        [],
        "(N, D, H, W) and not empty, got the shape (0, 8, 8, 8) of train_images",
    ),
    "huge": (lambda p: npz(p, train_images=npy_header((10**6,) * 4)), [], "must need at most 8 GiB to be read"),
    "a series": (
        medmnist,
        ["--array", "train_images", "--series", "1"],
        "must be a folder to have the series '1' picked",
    ),
    "a volume beside the window": (
        lambda p: np.savez(p, train_images=GENERATOR.normal(size=(3, 2, 8, 8)) + np.reshape([0, 0, 99], (3, 1, 1, 1))),
        ["--array", "train_images", "--window=-5,5"],
        "window must overlap the scan's intensities",
    ),
    "short": (
        lambda p: npz(p, train_images=npy_header((9, 8, 8, 8))),
        [],
        "must have arrays as long as their headers say",
    ),
    "truncated": (lambda p: (medmnist(p), truncated(p)), [], "cannot be read, it may be truncated or damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused_is_one_line_and_leaves_nothing(run, tmp_path, kind):
    make, arguments, message = BAD[kind]
    make(tmp_path / "a.npz")
    if kind != "no array" and "--array" not in arguments:
        arguments = ["--array", "train_images"]
    status, out, err = run("a.npz", "--out", "out", *arguments)
    assert status == 1 and out == [] and len(err) == 1 and err[0].startswith("planecycle-fast: volume a.npz")
    assert message in err[0], err
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_sets_are_of_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 5)))
    for name in ("a.npy", "missing.npz", "."):
        with pytest.raises(ValueError, match="must be an .npz file to hold an array of volumes"):
            load_volumes(tmp_path / name)


def test_a_set_is_a_sequence_of_scans(tmp_path):
    array = GENERATOR.normal(size=(5, 3, 8, 8)).astype(np.float32)
    volumes = a_set(tmp_path / "a.npz", array)
    assert len(list(volumes)) == 5
    for number in (0, 4, -1, np.int64(2)):
        assert np.array_equal(volumes[number].voxels.numpy(), array[number])
    for number in (5, -6):
        with pytest.raises(IndexError):
            volumes[number]
    for number in (slice(0, 2), [0, 1], 1.0, None):
        with pytest.raises(TypeError):
            volumes[number]


def a_set(path, volumes):
    np.savez(path, volumes)
    return load_volumes(path)


def given(scan: Scan):
    return prepare(scan, (4, 4), PERCENTILES)


def test_more_features_than_memory(tmp_path):
    volumes = a_set(tmp_path / "a.npz", GENERATOR.normal(size=(6, 3, 8, 8)))
    done = []

    def compute(pixels):
        return {"patches": pixels.mean(1).flatten(1)}  # (B, 192)

    size = 6 * 192 * 4
    assert features_of(volumes, given, compute, lambda: done.append(1), size)[0]["patches"].shape == (6, 192)
    assert len(done) == 6
    with pytest.raises(
        ValueError, match=r"features of 6 volumes must need at most .*; pool \(--pool\) keeps one vector"
    ):
        features_of(volumes, given, compute, lambda: None, size - 1)


def test_warnings_of_many_volumes_are_one(tmp_path):
    masks = np.zeros((5, 2, 20, 20))
    masks[:, 0, 0, 0] = 1
    masks[1] = GENERATOR.normal(size=(2, 20, 20))
    volumes = a_set(tmp_path / "a.npz", masks)
    with pytest.warns(ScanWarning, match="^4 of 5 volumes; volume 0: window 0.5%,99.5% has no width") as caught:
        features_of(volumes, given, lambda pixels: {"pooled": pixels.flatten(1)}, lambda: None)
    assert len(caught) == 1


def test_a_window_beside_one_volume_names_it(tmp_path):
    volumes = a_set(tmp_path / "a.npz", GENERATOR.normal(size=(3, 2, 8, 8)) + np.reshape([0, 99, 0], (3, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"window must overlap .*, got -5,5 \(its volume 1\)$"):
        features_of(
            volumes,
            lambda scan: prepare(scan, (4, 4), Window(-5, 5)),
            lambda pixels: {"pooled": pixels.flatten(1)},
            lambda: None,
        )


def test_an_error_in_one_volume_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(volume_sets, "PIXELS", 2 * 3 * 64)
    volumes = a_set(tmp_path / "a.npz", GENERATOR.normal(size=(6, 3, 8, 8)))
    calls = []

    def compute(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise ValueError("features must be finite")
        return {"pooled": pixels.flatten(1)}

    with pytest.raises(ValueError, match="^volumes 2 to 3: features must be finite"):
        features_of(volumes, given, compute, lambda: None)
    assert calls == [2, 2]
