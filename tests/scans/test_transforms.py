"""Steps from a scan to a model's volume, in Python: each keeps its affine, and all of them are the command's."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.scans import transforms
from planecycle_fast.scans.preprocess import Window
from planecycle_fast.scans.scan import IMAGENET_MEAN, IMAGENET_STD

from ..host_models import BY_NAME
from ..scan_writers import write_nifti
from ..toy import ToyViT, toy_lift

AFFINE = np.array([[0, 0.3, 1.5, -20], [0.2, -2.0, 0.1, 30], [3.0, 0, 0, 5], [0, 0, 0, 1]])


def scan(*shape):
    return pcf.Scan(torch.rand(shape, generator=torch.Generator().manual_seed(0)), AFFINE, "SPR")


def ramp(shape):
    """Voxels that are their own millimetres along the second axis of space."""
    indices = np.vstack([np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape)))])
    return pcf.Scan(torch.from_numpy((AFFINE @ indices)[1].reshape(shape)).float(), AFFINE, "SPR")


STEPS = {
    "pad": lambda s: transforms.pad(s, (8, 21, 24)),
    "pad at the end": lambda s: transforms.pad(s, multiple=(1, 16, 16), where="end"),
    "crop": lambda s: transforms.crop(s, (4, 11, 12)),
    "crop at the end": lambda s: transforms.crop(s, multiple=(2, 8, 8), where="end"),
    "crop from a voxel": lambda s: transforms.crop(s, (3, 9, 8), where=(1, 5, 7)),
    "pad or crop": lambda s: transforms.pad_or_crop(s, (9, 10, 30)),
    "resize": lambda s: transforms.resize(s, (10, 12, 40)),
    "resample": lambda s: transforms.resample(s, (1.5, 2.6, 1.1)),
    "nearest": lambda s: transforms.resize(s, (18, 60, 66), mode="nearest"),
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_keeps_the_millimetres(step):
    source = ramp((6, 20, 22))
    moved = STEPS[step](source)
    assert moved.voxels.shape != source.voxels.shape and moved.axes == "SPR"
    indices = np.vstack([np.indices(moved.voxels.shape).reshape(3, -1), np.ones((1, moved.voxels.numel()))])
    expected = (moved.affine @ indices)[1]
    inside = (np.linalg.inv(AFFINE) @ moved.affine @ indices)[:3]
    inner = ((inside > 1.5) & (inside < np.array([[4.5], [18.5], [20.5]]))).all(0)
    if step == "crop from a voxel":
        assert torch.equal(moved.voxels, source.voxels[1:4, 5:14, 7:15])
    tolerance = 1.1 if step == "nearest" else 0.3  # mm; a voxel has 2
    np.testing.assert_allclose(moved.voxels.numpy().reshape(-1)[inner], expected[inner], atol=tolerance)
    assert inner.sum() > 50


def test_steps_in_any_order_keep_the_millimetres():
    """A voxel that only steps without interpolation have touched is the very one that its affine says."""
    generator = np.random.default_rng(0)
    steps = [
        lambda s: transforms.pad(s, (8, 21, 24), value=-1),
        lambda s: transforms.pad(s, multiple=(1, 16, 16), where="end", value=-1),
        lambda s: transforms.pad_or_crop(s, (5, 12, 30), value=-1),
        lambda s: transforms.crop(s, (4, 15, 13)),
        lambda s: transforms.crop(s, (3, 9, 8), where=(0, 1, 2)),
        lambda s: transforms.crop(s, multiple=(1, 4, 4), where="end"),
    ]
    source, seen = scan(6, 20, 22), 0
    for _ in range(30):
        moved = source
        for step in generator.permutation(steps)[:4]:
            moved = step(moved)
        indices = np.vstack([np.indices(moved.voxels.shape).reshape(3, -1), np.ones((1, moved.voxels.numel()))])
        at = np.rint((np.linalg.inv(AFFINE) @ moved.affine @ indices)[:3]).astype(int)
        values = moved.voxels.numpy().reshape(-1)
        inside = ((at >= 0) & (at < np.array([[6], [20], [22]]))).all(0)
        kept = inside & (values >= 0)
        np.testing.assert_array_equal(values[kept], source.voxels.numpy()[tuple(at[:, kept])])
        seen += kept.sum()
    assert seen > 1000


def test_what_is_padded_and_what_stays():
    source = scan(3, 5, 6)
    padded = transforms.pad(source, (4, 8, 6))
    assert torch.equal(padded.voxels[:3, 1:6], source.voxels)
    assert padded.voxels[3].unique() == source.voxels.min() and padded.voxels[:, 0].unique() == source.voxels.min()
    assert torch.equal(transforms.crop(padded, (3, 5, 6)).voxels, source.voxels)
    assert transforms.pad(source, 2).voxels is source.voxels and transforms.crop(source, 9).voxels is not None
    assert transforms.pad(source, (3, 5, 8), where="end", value=-7).voxels[..., 6:].unique() == -7


@pytest.mark.parametrize("kind", [np.uint8, np.int16, ">f4", np.float64, bool, torch.uint8, torch.float16, torch.bool])
def test_arrays_of_any_real_dtype_are_scans_of_one_millimetre(kind):
    values = np.arange(24).reshape(2, 3, 4) % 2
    array = torch.from_numpy(values).to(kind) if isinstance(kind, torch.dtype) else values.astype(kind)
    made = transforms.as_scan(array)
    assert torch.equal(made.voxels, torch.from_numpy(values).float()) and np.array_equal(made.affine, np.eye(4))
    assert transforms.as_scan(array, spacing=(3, 2, 1)).spacing == (3, 2, 1)
    assert np.array_equal(transforms.as_scan(array, AFFINE, axes="spr").affine, AFFINE)


SETTINGS = [
    {},
    {"window": (0.2, 0.7)},
    {"window": "10%,90%", "spacing": 1.5},
    {"fit": "resize", "spacing": "3,1.1,2.2"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_prepare_is_its_steps(settings):
    source = scan(4, 21, 35)
    given = pcf.prepare(source, (4, 6), **settings)
    image = transforms.window(source, settings.get("window", "0.5%,99.5%"))
    if settings.get("fit") == "resize":
        depth, height, width = given.image.shape
        image = transforms.resize(image, (depth, height, width))
    else:
        if "spacing" in settings:
            image = transforms.resample(image, settings["spacing"])
        image = transforms.pad(image, multiple=(1, 4, 6), where="end", value=0)
    assert torch.equal(given.image, image.voxels) and np.array_equal(given.affine, image.affine)
    assert torch.equal(given.pixels, transforms.channels(image))


def test_a_lifted_model_says_what_it_takes():
    lifted = pcf.lift(BY_NAME["timm-dinov3-s"].make())
    lifted.adapter.model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "input_size": (3, 32, 32)}
    source = scan(2, 20, 30)
    given = pcf.prepare(source, lifted)
    expected = pcf.prepare(source, (16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.equal(given.pixels, expected.pixels) and given.patch_size == (16, 16)
    assert np.array_equal(given.feature_affine(), expected.feature_affine((16, 16)))
    half = lifted.to(torch.bfloat16)
    assert pcf.prepare(source.voxels.numpy(), half).pixels.dtype == torch.bfloat16
    half(pcf.prepare(source, half).pixels)


COMMANDS = [
    ([], {}),
    (["--window", "60,150", "--fit", "resize"], {"window": (60, 150), "fit": "resize"}),
    (["--spacing", "2,1.5,1", "--window", "10%,90%", "--dtype", "bf16"], {"spacing": (2, 1.5, 1), "window": "10%,90%"}),
]


@pytest.mark.parametrize("arguments, settings", COMMANDS)
def test_equal_to_the_command_lines_features_to_the_bit(run, model, tmp_path, arguments, settings):
    noise = np.random.default_rng(0).normal(100, 30, size=(40, 50, 6)).astype(np.float32)
    path = write_nifti(tmp_path / "scan.nii", noise, np.diag([1.2, 1.0, 3.0, 1.0]))
    assert run(path, "--out", "f.npz", *arguments)[0] == 0
    tensors, metadata = pcf.load_features("f.npz")
    lifted = pcf.lift(pcf.load_model(model)[0])
    if "bf16" in arguments:
        lifted.to(torch.bfloat16)
    given = pcf.prepare(pcf.load_scan(path), lifted, **settings)
    with torch.inference_mode():
        features = lifted(given.pixels)
    assert torch.equal(tensors["patches"], features.patches[0].float())
    assert torch.equal(tensors["pooled"], features.pooled()[0].float())
    assert metadata["affine"] == given.feature_affine().tolist() and metadata["padding"] == list(given.padding)


def test_statistics_are_found_from_another_folder(model, tmp_path, monkeypatch):
    copy = shutil.copytree(model, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    lifted = pcf.lift(pcf.load_model("copy")[0])
    monkeypatch.chdir("/")
    source, statistics = scan(2, 20, 30), {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    assert torch.equal(pcf.prepare(source, lifted).pixels, pcf.prepare(source, [16, 16], **statistics).pixels)
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match="mean and std must be given: folder .*copy.* is there no more"):
        pcf.prepare(source, lifted)
    pcf.prepare(source, lifted, **statistics)


def test_models_that_do_not_say_what_their_pixels_are():
    dino = pcf.lift(BY_NAME["hf-dinov2"].make())
    assert torch.equal(
        pcf.prepare(scan(2, 14, 14), dino).pixels,
        pcf.prepare(scan(2, 14, 14), (14, 14), mean=IMAGENET_MEAN, std=IMAGENET_STD).pixels,
    )
    clip = pcf.lift(BY_NAME["hf-clip"].make())
    with pytest.raises(ValueError, match="mean and std must be given for a .*, which does not say what they are"):
        pcf.prepare(scan(2, 64, 64), clip)
    pcf.prepare(scan(2, 64, 64), clip, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="mean and std must be given for a ToyViT"):
        pcf.prepare(scan(2, 4, 4), toy_lift(ToyViT()))


def test_images_in_0_to_1_need_no_window():
    image = transforms.window(scan(2, 9, 11), (0.1, 0.9))
    assert torch.equal(
        pcf.prepare(image, (4, 4), window=None).pixels, pcf.prepare(scan(2, 9, 11), (4, 4), (0.1, 0.9)).pixels
    )
    with pytest.raises(ValueError, match=r"scan must be in \[0, 1\] where window is None, got 0 to 5"):
        pcf.prepare(np.arange(6).reshape(1, 2, 3), (4, 4), window=None)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("step", [name for name in STEPS if "re" not in name and name != "nearest"])
def test_what_was_padded_or_cropped_comes_back_exactly(step, mode):
    source = scan(6, 20, 22)
    moved = STEPS[step](source)
    back = pcf.to_scan(moved.voxels, moved.affine, source, mode, fill=-1)
    stayed = back != -1
    assert torch.equal(back[stayed], source.voxels[stayed])
    assert stayed.sum() == source.voxels.numel() if "pad" in step and step != "pad or crop" else not stayed.all()


def test_masks_and_channels_come_back():
    source = scan(6, 20, 22)
    mask = (source.voxels > 0.5).to(torch.uint8)
    finer = transforms.resize(pcf.Scan(mask.float(), AFFINE), (12, 60, 66), mode="nearest")
    assert torch.equal(pcf.to_scan(finer.voxels.to(torch.uint8), finer.affine, source, "nearest"), mask)
    given = pcf.prepare(source, (4, 6), spacing=2.0)
    cells = tuple(n // p for n, p in zip(given.image.shape, (1, 4, 6)))
    values = torch.rand(*cells, 3)
    nearest = pcf.to_scan(values, given.feature_affine(), source, "nearest")
    for index in ((0, 0, 0), (5, 19, 21), (3, 7, 11)):
        place = np.linalg.inv(given.feature_affine()) @ source.affine @ (*index, 1)
        cell = [min(int(np.rint(p)), n - 1) for p, n in zip(place, cells)]
        assert torch.equal(nearest[index], values[tuple(cell)])


def test_linear_values_are_read_off_between_cells():
    """A linear function of place, at patches, is that function at voxels."""
    source = scan(6, 20, 24)
    given = pcf.prepare(source, (4, 6), (0, 1))
    affine = given.feature_affine()
    indices = np.stack(np.meshgrid(*map(np.arange, (6, 5, 4)), indexing="ij"), -1)
    values = torch.from_numpy(indices @ affine[:3, :3].T + affine[:3, 3])  # (6, 5, 4, 3) mm
    back = pcf.to_scan(values, affine, source)
    voxels = np.stack(np.meshgrid(*map(np.arange, (6, 20, 24)), indexing="ij"), -1) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    np.testing.assert_allclose(back[:, 2:-2, 3:-3].numpy(), voxels[:, 2:-2, 3:-3], atol=1e-9)


BAD = [
    (lambda: transforms.as_scan("scan.nii"), TypeError, "scan must be a Scan, or an array or tensor of real numbers"),
    (lambda: transforms.as_scan(np.zeros(3, complex)), TypeError, "got complex128"),
    (lambda: transforms.as_scan(torch.ones(1, 1, 1, requires_grad=True)), TypeError, "needs a gradient; detach it"),
    (lambda: transforms.as_scan(np.zeros((2, 2))), ValueError, r"scan must have shape \(D, H, W\)"),
    (lambda: transforms.as_scan(np.zeros((0, 2, 2))), ValueError, "not be empty"),
    (lambda: transforms.as_scan(np.zeros((2, 2, 2)), np.zeros((4, 4))), ValueError, "affine must be"),
    (lambda: transforms.as_scan(np.zeros((2, 2, 2)), np.eye(4), 2.0), ValueError, "affine and spacing must not both"),
    (lambda: transforms.window(scan(1, 2, 2), (2, 1)), ValueError, "window must have LOW below HIGH"),
    (lambda: transforms.window(scan(1, 2, 2), 3), ValueError, "window must be"),
    (lambda: transforms.resample(scan(1, 2, 2), (1, 2)), ValueError, "spacing must be millimetres"),
    (lambda: transforms.resample(scan(1, 2, 2), -1), ValueError, "spacing must be millimetres"),
    (lambda: transforms.resize(scan(1, 2, 2), 0), ValueError, "size must be one whole number of at least 1"),
    (lambda: transforms.resize(scan(1, 2, 2), 4, "cubic"), ValueError, "mode must be one of linear, nearest"),
    (lambda: transforms.pad(scan(1, 2, 2)), ValueError, "one of size and multiple must be given"),
    (lambda: transforms.pad(scan(1, 2, 2), 4, where="left"), ValueError, "where must be one of centre, end"),
    (lambda: transforms.crop(scan(1, 2, 2), multiple=4), ValueError, "multiple must be no larger than the scan"),
    (lambda: transforms.crop(scan(1, 2, 2), 2, where=(0, 0, 1)), ValueError, "where and size must lie within"),
    (lambda: pcf.prepare(scan(1, 4, 4), (2, 2), mean=(0.5,)), ValueError, "mean and std must both be given"),
    (lambda: pcf.prepare(scan(1, 4, 4), ToyViT()), TypeError, "lifted must be a model made by lift"),
    (lambda: pcf.to_scan(torch.zeros(2, 2), AFFINE, scan(2, 2, 2)), ValueError, "values must have shape"),
    (lambda: pcf.to_scan(torch.zeros(2, 2, 2).int(), AFFINE, scan(2, 2, 2)), TypeError, "values must be a floating"),
    (lambda: pcf.to_scan(torch.zeros(2, 2, 2), np.eye(4), scan(4, 4, 4)), ValueError, "axes along the scan's"),
    (lambda: pcf.to_scan(torch.zeros(2, 2, 2), np.zeros((4, 4)), scan(4, 4, 4)), ValueError, "affine must be an inv"),
    (lambda: pcf.to_scan(torch.zeros(2, 2, 2, 9), AFFINE, scan(4, 4, 4), max_bytes=99), ValueError, "at most .* GiB"),
]


@pytest.mark.parametrize("call, error, words", BAD, ids=[words for _, _, words in BAD])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_windows_and_spacings_in_all_their_forms():
    source = scan(2, 4, 4)
    by_text = transforms.window(source, "0.1,0.9").voxels
    for form in ((0.1, 0.9), [0.1, 0.9], Window(0.1, 0.9)):
        assert torch.equal(transforms.window(source, form).voxels, by_text)
    for form in (1.5, (1.5, 1.5, 1.5), "1.5"):
        assert torch.equal(transforms.resample(source, form).voxels, transforms.resample(source, [1.5] * 3).voxels)


def test_importing_the_package_imports_no_monai():
    code = """import sys, planecycle_fast
assert "monai" not in sys.modules and "nibabel" not in sys.modules
sys.modules["monai"] = None  # as where it is not installed
import planecycle_fast.scans.monai_transforms"""
    out = subprocess.run([sys.executable, "-c", code], timeout=300, capture_output=True, text=True)
    assert "package 'monai' is not installed; it comes with: pip install 'planecycle-fast[monai]'" in out.stderr
