"""Features are finite, or refused in one line that says where they began; and windows that show nothing warn."""

import nibabel
import numpy as np
import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.commands import demo
from planecycle_fast.engine.finite import check_features
from planecycle_fast.scans.checks import ScanWarning
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.preprocess import PERCENTILES, Window, parse_window, prepare
from planecycle_fast.scans.scan import Scan, in_channels
from planecycle_fast.scans.viz import adjacent_cosine, pca_colours
from planecycle_fast.weights.load import load_model

from ..scan_writers import COUNTS, NOISE, write_nifti

HALVES = (np.random.default_rng(0).uniform(-1, 1, (20, 24, 4)) * 1.99).astype(np.float32)
LARGE = 2.0**127  # times HALVES: up to 3.4e38, where differences are infinite in float32


@pytest.mark.parametrize("window, small", [(None, None), (f"{-LARGE},{LARGE}", "-1,1"), ("5%,95%", "5%,95%")], ids=str)
def test_the_largest_finite_voxels_have_the_features_of_small_ones(run, tmp_path, window, small):
    for name, scale in (("large", LARGE), ("small", 1)):
        write_nifti(tmp_path / f"{name}.nii", HALVES * np.float32(scale))
        chosen = window if name == "large" else small
        status, _, err = run(f"{name}.nii", "--out", f"{name}.npz", *([f"--window={chosen}"] if chosen else []))
        assert (status, err) == (0, [])
    large, small = (load_features(tmp_path / f"{name}.npz").tensors for name in ("large", "small"))
    for name, tensor in small.items():
        assert torch.isfinite(tensor).all() and torch.equal(large[name], tensor)  # a power of two rounds nothing


def with_slope(path):
    image = nibabel.Nifti1Image(COUNTS, np.eye(4))
    image.header.set_slope_inter(1e38, 0)
    nibabel.save(image, path)


ONE_BEYOND = NOISE.astype(np.float64)
ONE_BEYOND[1, 2, 3] = -1e39
BEYOND = {
    "float64": (
        "a.npy",
        lambda p: np.save(p, NOISE.astype(np.float64) * 1e300),
        "got 0 NaN and 2184 infinite, or beyond float32",
    ),
    "one float64": ("a.npz", lambda p: np.savez(p, ONE_BEYOND), "0 NaN and 1 inf"),
    "slope": ("a.nii.gz", with_slope, "got 0 NaN and [0-9]+ infinite"),
    "longdouble": ("a.npy", lambda p: np.save(p, NOISE.astype(np.longdouble) * 1e300), "0 NaN and 2184 infinite"),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_voxels_beyond_float32(run, tmp_path, kind):
    name, make, message = BEYOND[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_scan(tmp_path / name)
    status, out, err = run(name, "--out", "out")
    assert status == 1 and out == [] and len(err) == 1 and not (tmp_path / "out").exists()


def test_the_largest_integers_are_read(tmp_path):
    ends = np.full((2, 2, 2), np.iinfo(np.int64).min)
    ends[0] = np.iinfo(np.int64).max
    np.save(tmp_path / "a.npy", ends)
    assert load_scan(tmp_path / "a.npy").voxels.flatten().tolist() == [2.0**63] * 4 + [-(2.0**63)] * 4


def test_windows_are_computed_in_float64():
    voxels = torch.tensor([-3e38, -1.5e38, 0, 3e38]).view(1, 2, 2)
    assert Window(-3e38, 3e38).apply(voxels).flatten().tolist() == pytest.approx([0, 0.25, 0.5, 1])
    assert Window(0, 100, percent=True).apply(voxels).flatten().tolist() == pytest.approx([0, 0.25, 0.5, 1])
    with pytest.warns(ScanWarning):
        assert Window(-1e300, 1e300).apply(voxels).flatten().tolist() == pytest.approx([0.5] * 4)
    tiny = torch.tensor([0, 1e-45]).view(1, 1, 2)
    assert Window(0, 5e-324).apply(tiny).flatten().tolist() == [0, 1]
    values = torch.randn(3, 5, 7)
    low, high = np.percentile(values.double().numpy(), (3, 98.5))
    expected = ((values.double() - low) / (high - low)).clamp(0, 1).float()
    torch.testing.assert_close(Window(3, 98.5, percent=True).apply(values), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("text", ["-1e999,240", "0,1e400", "-1e308,1e308"])
def test_windows_that_are_not_finite(text):
    with pytest.raises(ValueError, match="window must have finite ends, a finite width apart, got"):
        parse_window(text)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_of_a_scan_in_memory(value):
    for window in (PERCENTILES, Window(0, 1)):
        with pytest.raises(ValueError, match="voxels must be finite, got"):
            window.apply(torch.tensor([0.0, 1.0, value]).view(1, 1, 3))
    with pytest.raises(ValueError, match="window must overlap the scan's intensities, 2 to 2, got"):
        PERCENTILES.apply(torch.full((1, 2, 3), 2.0))


@pytest.mark.parametrize(
    "mean, std", [((0.5,) * 3, (0.5, 0, 0.5)), ((0.5,) * 3, (1e-45,) * 3), ((np.nan,) * 3, (1,) * 3)]
)
def test_pixels_that_are_not_finite(mean, std):
    with pytest.raises(ValueError, match="mean and std must make finite pixels, with std above 0, got"):
        in_channels(torch.zeros(1, 4, 4), mean, std)
    with pytest.raises(ValueError, match="mean and std must make finite pixels, with std above 0, got"):
        prepare(Scan(torch.rand(1, 4, 4), np.eye(4)), (4, 4), Window(0, 1), mean=mean, std=std)


def test_a_spacing_without_end(run, tmp_path):
    np.save(tmp_path / "a.npy", NOISE)
    status, _, err = run("a.npy", "--out", "out", "--spacing", "1e-320")
    assert status == 1 and len(err) == 1 and "at most 8 GiB for the model" in err[0]


# The model


def in_a_block(model, i):
    pcf.lift(model).adapter.blocks[i].mlp.up_proj.weight.data.mul_(1e30)
    pcf.lift(model).adapter.blocks[i].mlp.down_proj.weight.data.mul_(1e30)


def in_the_embedding(model):
    for parameter in model.embeddings.patch_embeddings.parameters():
        parameter.data.fill_(3e38)


def in_the_norm(model):
    model.norm.weight.data.mul_(3e38)
    model.norm.bias.data.fill_(3e38)


STAGES = {
    "block 2": (lambda m: in_a_block(m, 2), "in patches: they begin in layer 2 of 0 to 3, in float32"),
    "block 0": (lambda m: in_a_block(m, 0), "they begin in layer 0 of 0 to 3"),
    "embedding": (in_the_embedding, "they begin before layer 0, where patches are embedded"),
    "norm": (in_the_norm, "they begin behind the last layer, in the norm or the mean"),
}


@pytest.fixture(scope="module")
def broken(model, tmp_path_factory):
    """A folder per stage with a model that overflows there."""
    folders = {}
    for stage, (fault, _) in STAGES.items():
        host, folder = load_model(model)[0], tmp_path_factory.mktemp("model")
        fault(host)
        host.save_pretrained(folder)
        folders[stage] = str(folder)
    return folders


@pytest.mark.parametrize("arguments", [[], ["--picture"]], ids=" ".join)
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_overflows(run, broken, tmp_path, stage, arguments):
    write_nifti(tmp_path / "a.nii", HALVES)
    status, out, err = run("a.nii", "--out", "f.safetensors", "--model", broken[stage], *arguments)
    assert status == 1 and out == [] and len(err) == 1
    assert err[0].startswith("planecycle-fast: volume a.nii: features must be finite, got ")
    assert STAGES[stage][1] in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_layers_before_the_overflow_are_written(run, broken, tmp_path):
    write_nifti(tmp_path / "a.nii", HALVES)
    given = ("a.nii", "--out", "f.npz", "--model", broken["block 2"], "--pool")
    status, _, err = run(*given, "--layers", "1,2")
    assert status == 1 and "in layer2.pooled: they begin in layer 2" in err[0] and not (tmp_path / "f.npz").exists()
    assert run(*given, "--layers", "0,1")[0] == 0
    assert all(torch.isfinite(t).all() for t in load_features(tmp_path / "f.npz").tensors.values())


def test_half_precision_overflows_where_float32_does_not(model):
    host, pixels = load_model(model)[0], torch.randn(1, 3, 2, 32, 32)
    pcf.lift(host).adapter.blocks[1].mlp.up_proj.weight.data.mul_(1e3)
    pcf.lift(host).adapter.blocks[1].mlp.down_proj.weight.data.mul_(1e3)
    lifted = pcf.lift(host)
    with torch.no_grad():
        check_features(lifted, pixels, {"patches": lifted(pixels).patches})
        half = pcf.lift(host.half(), backend="reference")
        with pytest.raises(ValueError, match="in patches: they begin in layer 1 of 0 to 3, in float16"):
            check_features(half, pixels.half(), {"patches": half(pixels.half()).patches})


def test_the_demo(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_model", lambda name: load_model(broken["block 2"]))
    np.save(tmp_path / "a.npy", HALVES)
    with pytest.raises(
        ValueError, match="features must be finite, got .* in the patches of slice2d: they begin in layer"
    ):
        demo.run_demo("any", tmp_path / "a.npy", tmp_path / "demo.png", 64)
    assert not (tmp_path / "demo.png").exists()


def test_colours_of_large_features():
    features, mask = torch.randn(3, 4, 5, 8), torch.ones(3, 4, 5, dtype=torch.bool)
    for scale in (2.0**120, 2.0**-120):
        expected, got = (pca_colours({"a": f}, mask)["a"] for f in (features, features * scale))
        torch.testing.assert_close(got, expected)
        assert adjacent_cosine(features * scale, mask) == pytest.approx(adjacent_cosine(features, mask))


# Windows that show nothing


def sparse(share):
    voxels = torch.zeros(1, 100, 100)
    voxels.view(-1)[: int(share * 10_000)] = 1
    return voxels


UNIT = torch.linspace(0, 1, 10_000).view(1, 100, 100)
HOT = torch.linspace(0, 1, 90_000).view(1, 300, 300).clone()
HOT[0, 1, 2] = 3000
EMPTY = {
    "0 to 1": (
        UNIT,
        "-160,240",
        "window -160,240 makes the scan nearly one grey: the scan's values are 0 to 1, 98% of",
    ),
    "z-scores": (torch.randn(1, 100, 100), "-160,240", "nearly one grey: the scan's values are -"),
    "one hot voxel": (HOT, "-160,240", "are 0 to 3000, 98% of them 0[.]01[0-9]* to 0[.]99$"),
    "unsigned CT": (UNIT * 1000 + 900, "890,905", r"leaves 0\.5[0-9]?% of the voxels between its ends: .* 900 to 1900"),
    "between two values": (
        sparse(0.3),
        "0.2,0.8",
        "leaves 0% of the voxels between its ends: the scan's values are 0 to 1",
    ),
    "mask": (sparse(0.001), "0.5%,99.5%", "has no width in this scan: its extremes, 0 and 1, are black and white"),
    "negative mask": (5 * sparse(0.001) - 5, "0.5%,99.5%", "its extremes, -5 and 0, are black and white"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_windows_that_leave_nothing_to_see(kind):
    voxels, window, message = EMPTY[kind]
    with pytest.warns(ScanWarning, match=message) as caught:
        parse_window(window).apply(voxels)
    assert len(caught) == 1


@pytest.mark.filterwarnings("error::planecycle_fast.scans.checks.ScanWarning")
@pytest.mark.parametrize(
    "voxels, window",
    [
        (UNIT, "0.5%,99.5%"),
        (UNIT, "0,1"),
        (UNIT, "-1,2"),
        (sparse(0.01), "0,1"),
        (sparse(0.3), "0.5%,99.5%"),
        (torch.randn(1, 100, 100) * 10, "-160,240"),  # water
        (UNIT * 4000 - 1000, "-160,240"),
        (UNIT * 4000 - 1000, "30,110"),
    ],
)
def test_windows_that_are_fine(voxels, window):
    parse_window(window).apply(voxels)


def test_a_warning_is_one_line_and_the_features_are_written(run, tmp_path):
    write_nifti(tmp_path / "a.nii", ((HALVES - HALVES.min()) / np.ptp(HALVES)))
    status, out, err = run("a.nii", "--out", "f.npz", "--window=-160,240")
    assert status == 0 and out == ["f.npz  4 x 2 x 2 patches"] and len(err) == 1
    assert err[0].startswith(
        "planecycle-fast: volume a.nii: window -160,240 makes the scan nearly one grey: the scan's"
    )
    assert "values are 0 to 1, 98% of them 0.0" in err[0]
