"""MONAI: its dictionary transforms, data sets, loaders and sliding windows around a lifted model."""

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs monai, of the extra monai")
pytest.importorskip("nibabel", reason="needs nibabel, of the extra scans")
import monai.data as monai_data
from monai import transforms as mt
from monai.inferers import SlidingWindowInferer, sliding_window_inference

import planecycle_fast as pcf
from planecycle_fast.scans.monai_transforms import LoadScand, ToModelVolumed, Windowd

from ..host_models import BY_NAME
from ..scan_writers import turned_affine, write_nifti, write_nrrd

NOISE = np.random.default_rng(0).normal(100, 30, size=(40, 50, 6)).astype(np.float32)
CODES = ["RAS", "LPS", "PIR", "oblique SRA"]


@pytest.fixture(scope="module")
def lifted():
    torch.manual_seed(0)
    return pcf.lift(BY_NAME["hf-dinov3"].make())


def nifti(folder, codes="LPS", name="scan.nii.gz", array=NOISE):
    return str(write_nifti(folder / name, array, turned_affine(codes[-3:], codes.startswith("oblique"))))


@pytest.mark.parametrize("codes", CODES)
def test_a_scan_that_monai_reads_is_the_volume_of_ours(lifted, tmp_path, codes):
    path = nifti(tmp_path, codes)
    settings = {"window": "40,180", "spacing": (3, 1.7, 1.2), "fit": "resize"}
    given = pcf.prepare(pcf.load_scan(path), lifted, **settings)
    for load in (mt.LoadImaged("image", ensure_channel_first=True), LoadScand("image")):
        out = mt.Compose([load, ToModelVolumed("image", lifted, **settings)])({"image": path})["image"]
        assert torch.equal(out.as_tensor(), given.pixels[0])
        np.testing.assert_allclose(out.affine, given.affine, atol=1e-9)
        np.testing.assert_allclose(out.meta["feature_affine"], given.feature_affine(), atol=1e-9)
        assert out.meta["axes"] == "SPR"


def test_after_monais_orientation_and_spacing(lifted, tmp_path):
    """Orientationd exchanges axes of an affine and array alike: nothing changes. Spacingd gives another scan."""
    path = nifti(tmp_path, "PIR")
    plain, turned, spaced = (
        mt.Compose([mt.LoadImaged("image", ensure_channel_first=True), *steps, ToModelVolumed("image", lifted)])
        for steps in ([], [mt.Orientationd("image", axcodes="LAS")], [mt.Spacingd("image", pixdim=(2.0, 2.0, 2.0))])
    )
    plain, turned, spaced = (compose({"image": path})["image"] for compose in (plain, turned, spaced))
    assert torch.equal(plain.as_tensor(), turned.as_tensor())
    np.testing.assert_allclose(plain.affine, turned.affine, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(spaced.affine[:3, :3], axis=0), 2, atol=1e-5)
    image = mt.LoadImaged("image", ensure_channel_first=True)({"image": path})["image"]
    image.affine = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)) @ image.affine
    image.meta["space"] = "LPS"  # as ITK's readers leave it where they are asked to
    other = ToModelVolumed("image", lifted)({"image": image})["image"]
    assert torch.equal(plain.as_tensor(), other.as_tensor()) and other.meta["space"] == "RAS"
    np.testing.assert_allclose(plain.affine, other.affine, atol=1e-9)


def test_windows_are_ours(tmp_path):
    path = nifti(tmp_path)
    scan = pcf.transforms.window(pcf.load_scan(path), "10%,90%")
    image = mt.Compose([LoadScand("image"), Windowd("image", "10%,90%")])({"image": path})["image"]
    assert torch.equal(image.as_tensor()[0], scan.voxels) and image.meta["axes"] == "SPR"
    np.testing.assert_array_equal(image.affine, scan.affine)


def test_scans_without_orientation_stay_as_they_are(lifted, tmp_path):
    np.savez(tmp_path / "a.npz", volume=NOISE.transpose(2, 1, 0), spacing=np.array([3.0, 1, 1]))
    compose = mt.Compose([LoadScand("image"), ToModelVolumed("image", lifted)])
    out = compose({"image": tmp_path / "a.npz"})["image"]
    given = pcf.prepare(pcf.load_scan(tmp_path / "a.npz"), lifted)
    assert torch.equal(out.as_tensor(), given.pixels[0]) and out.meta["axes"] == "unknown"
    bare = monai_data.MetaTensor(torch.from_numpy(NOISE.transpose(2, 1, 0).copy())[None])
    assert torch.equal(ToModelVolumed("i", lifted, axes=None)({"i": bare})["i"].as_tensor(), out.as_tensor())


def pipeline(lifted):
    load = mt.LoadImaged("image", ensure_channel_first=True)
    crop = mt.CenterSpatialCropd("image", (32, 48, 5))
    return mt.Compose([load, mt.Orientationd("image", axcodes="RAS"), crop, ToModelVolumed("image", lifted)])


@pytest.mark.parametrize("loader", ["DataLoader", "ThreadDataLoader", "workers", "torch's workers"])
def test_batches_are_what_the_lifted_model_takes(lifted, tmp_path, loader):
    paths = [nifti(tmp_path, name=f"{i}.nii.gz", array=NOISE + i * np.arange(6)) for i in range(3)]
    items, compose = [{"image": path, "label": i} for i, path in enumerate(paths)], pipeline(lifted)
    cached = monai_data.CacheDataset(items, compose, progress=False, num_workers=0)
    make = {
        "DataLoader": lambda: monai_data.DataLoader(cached, batch_size=2),
        "ThreadDataLoader": lambda: monai_data.ThreadDataLoader(cached, batch_size=2, num_workers=0),
        "workers": lambda: monai_data.DataLoader(monai_data.Dataset(items, compose), batch_size=2, num_workers=1),
        "torch's workers": lambda: torch.utils.data.DataLoader(
            monai_data.Dataset(items, compose),
            batch_size=2,
            num_workers=1,
            collate_fn=monai_data.list_data_collate,
        ),
    }[loader]
    done = []
    with torch.no_grad():
        for batch in make():
            features = lifted(batch["image"].as_tensor())
            found = lifted(batch["image"]).patches
            assert type(found) is torch.Tensor and torch.equal(found, features.patches)
            for label, patches in zip(batch["label"].tolist(), features.patches):
                alone = compose(items[label])["image"].as_tensor()[None]
                torch.testing.assert_close(patches[None], lifted(alone).patches)
                done.append(label)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("codes", CODES)
def test_inverted_to_where_the_scan_was(lifted, tmp_path, codes):
    """Pixels come back to the voxels they were, to the bit of their window; patches to where their millimetres are."""
    path = nifti(tmp_path, codes)
    load, step = mt.LoadImaged("image", ensure_channel_first=True), ToModelVolumed("image", lifted, "0,200")
    compose = mt.Compose([load, mt.Orientationd("image", axcodes="LAS"), step])
    (item,) = monai_data.decollate_batch(
        next(iter(monai_data.DataLoader(monai_data.Dataset([{"image": path}], compose))))
    )
    original = load({"image": path})["image"]
    with torch.no_grad():
        item["patches"] = monai_data.MetaTensor(lifted(item["image"].as_tensor()[None]).patches[0].movedim(-1, 0))
    affine = item["image"].meta["feature_affine"].numpy()
    item["pixels"] = item["image"].clone()
    item["mask"] = monai_data.MetaTensor((item["image"].as_tensor()[:1] > 0).to(torch.uint8))
    names, nearest = ["patches", "pixels", "mask"], [True, False, True]
    back = mt.Invertd(names, compose, orig_keys="image", nearest_interp=nearest, to_tensor=True)(item)
    for name in names:
        assert back[name].shape[1:] == original.shape[1:]
        np.testing.assert_allclose(back[name].affine, original.affine, atol=1e-6)
    mean, std = step.mean[0], step.std[0]
    expected = (original.as_tensor()[0] / 200).clamp(0, 1)
    torch.testing.assert_close(back["pixels"].as_tensor()[0] * std + mean, expected, rtol=0, atol=1e-6)
    assert torch.equal(back["mask"].as_tensor()[0], (back["pixels"].as_tensor()[0] > 0).to(back["mask"].dtype))
    patches = item["patches"].as_tensor()
    for index in ((0, 0, 0), (3, 4, 5), (20, 30, 2), (39, 49, 5)):
        mm = original.affine.numpy() @ (*index, 1)
        cell = np.rint(np.linalg.inv(affine) @ mm)[:3].astype(int)
        cell = tuple(int(i) for i in np.clip(cell, 0, np.array(patches.shape[1:]) - 1))
        assert torch.equal(back["patches"].as_tensor()[(slice(None), *index)].float(), patches[(slice(None), *cell)])


def test_monais_sliding_windows_take_a_lifted_model(lifted):
    """Maps (B, C, D, H, W) at the patch's stride; without overlap each window is that crop, as in ours."""
    volume = torch.randn(1, 3, 4, 64, 96)

    def maps(windows):
        return lifted(windows).patches.movedim(-1, 1)

    ours = pcf.sliding_window(lifted, volume, (2, 32, 48), overlap=0, batch=2).patches.movedim(-1, 1)
    with torch.no_grad():
        theirs = sliding_window_inference(volume, (2, 32, 48), 2, maps, overlap=0)
        torch.testing.assert_close(theirs, ours)
        torch.testing.assert_close(SlidingWindowInferer((2, 32, 48), 2, overlap=0)(volume, maps), ours)
        overlapping = SlidingWindowInferer((2, 32, 64), 1, overlap=(0, 0, 0.5), mode="constant")(volume, maps)
    ours = pcf.sliding_window(lifted, volume, (2, 32, 64), overlap=(0, 0, 0.5), blend="constant")
    torch.testing.assert_close(overlapping, ours.patches.movedim(-1, 1))


def test_metatensors_are_plain_in_lists_and_windows(lifted):
    volume = monai_data.MetaTensor(torch.randn(1, 3, 2, 32, 32))
    windows, (listed,) = pcf.sliding_window(lifted, volume, (1, 32, 32)), pcf.map_volumes(lifted, [volume])
    assert type(windows.patches) is type(listed.patches) is torch.Tensor


def test_what_is_refused(lifted, tmp_path):
    two = monai_data.MetaTensor(torch.rand(2, 4, 32, 32))
    with pytest.raises(Exception, match=r"i must have one channel and three axes, .* got \(2, 4, 32, 32\)"):
        ToModelVolumed("i", lifted)({"i": two})
    with pytest.raises(Exception, match="i must be a MetaTensor, as of LoadImaged or LoadScand, got Tensor"):
        ToModelVolumed("i", lifted)({"i": torch.rand(1, 4, 32, 32)})
    with pytest.raises(TypeError, match="scan must be a Scan, an array or a plain tensor .*, got a MetaTensor"):
        pcf.prepare(two[0], lifted)
    for setting, words in (({"fit": "crop"}, "fit must"), ({"axes": "XYZ"}, "axes must"), ({"window": "1"}, "window")):
        with pytest.raises(ValueError, match=words):
            ToModelVolumed("i", lifted, **setting)
    with pytest.raises(Exception, match="volume .*none.nii must be a file"):
        LoadScand("i")({"i": tmp_path / "none.nii"})
    write_nrrd(tmp_path / "a.nrrd", NOISE, turned_affine("LPS", False))
    assert LoadScand("i", axes="RAS")({"i": tmp_path / "a.nrrd"})["i"].meta["axes"] == "RAS"
