"""Sliding windows: what they make of a volume, patch by patch, and how a window is chosen."""

import functools
import itertools
import math

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.bench.costs import peak_bytes
from planecycle_fast.cost.planning import plan
from planecycle_fast.scans.progress import Progress, following
from planecycle_fast.scans.sliding import _axis, _overlaps, parse_tile

from ..host_models import BY_NAME
from ..scan_writers import write_nifti
from ..toy import ToyViT, toy_lift

VOLUME = torch.randn(2, 3, 6, 8, 12, generator=torch.Generator().manual_seed(3))  # 6 x 4 x 6 patches of 2 x 2 pixels
MODES = {
    "planecycle": {},
    "slice2d": {"mode": "slice2d"},
    "flatten3d": {"mode": "flatten3d"},
    "sets along H": {"cycle_order": ("HW", "DW"), "globals_at": "plane"},
    "sets along W": {"cycle_order": ("HW", "DH"), "globals_at": "plane"},
}


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return ToyViT(rope=False)


def of(lifted, volume):
    with torch.no_grad():
        return lifted(volume)


def assert_equal(features, expected, **tolerance):
    for got, want in zip(features, expected):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("mode", MODES)
def test_one_window_is_the_whole(host, mode):
    lifted = toy_lift(host, **MODES[mode])
    assert_equal(pcf.sliding_window(lifted, VOLUME, (6, 8, 12)), of(lifted, VOLUME))
    assert_equal(pcf.sliding_window(lifted, VOLUME, (99, 100, 100), overlap=70), of(lifted, VOLUME))
    layers = pcf.sliding_window(lifted, VOLUME, (6, 8, 12), layers=(0, -1))
    with torch.no_grad():
        for got, want in zip(layers, lifted.intermediate(VOLUME, (0, -1)), strict=True):
            assert_equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2-registers"])
def test_slice2d_in_windows_of_whole_slices_is_the_whole_to_the_bit(host, name, backend):
    real = BY_NAME[name]
    lifted = pcf.lift(real.make(), mode="slice2d", backend=backend)
    height, width = (2 * p for p in lifted.adapter.patch_size)
    volume = torch.randn(1, 3, 6, height, 2 * width)
    for depth in (1, 2, 3):
        features = pcf.sliding_window(lifted, volume, (depth, height, 2 * width), overlap=0)
        assert_equal(features, of(lifted, volume))
    lifted = toy_lift(host, mode="slice2d")
    overlapping = pcf.sliding_window(lifted, VOLUME, (4, 8, 12), overlap=(1, 0, 0), blend="gaussian")
    assert_equal(overlapping, of(lifted, VOLUME), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_without_overlap_a_window_is_that_crop(host, mode):
    lifted = toy_lift(host, **MODES[mode])
    features = pcf.sliding_window(lifted, VOLUME, (3, 4, 4), overlap=0, blend="gaussian")
    for d, h, w in itertools.product((0, 3), (0, 4), (0, 4, 8)):
        crop = of(lifted, VOLUME[:, :, d : d + 3, h : h + 4, w : w + 4])
        got = features.patches[:, d : d + 3, h // 2 : h // 2 + 2, w // 2 : w // 2 + 2]
        assert torch.equal(got, crop.patches)


def naive(lifted, volume, window, overlap, blend, sets_along):
    """Patches one by one, globals set by set: {place: [(weight, feature)]}, by the definitions."""
    sizes, patch = (volume.shape[2], volume.shape[3] // 2, volume.shape[4] // 2), (1, 2, 2)
    starts = []
    for size, length, shared in zip(sizes, window, overlap):
        each = [*range(0, size - length, length - shared), size - length]
        starts.append(sorted(set(each)))

    def weight(index, length):
        away = (index + 0.5) / length - 0.5
        return {"constant": 1.0, "linear": 1 - 2 * abs(away), "gaussian": math.exp(-0.5 * (away / 0.125) ** 2)}[blend]

    patches, weights, sets = {}, {}, {}
    runs = []
    for start in itertools.product(*starts):
        cut = tuple(slice(s * p, (s + n) * p) for s, n, p in zip(start, window, patch))
        features = of(lifted, volume[(slice(None), slice(None), *cut)])
        runs.append((start, features))
        for place in itertools.product(*map(range, window)):
            w = math.prod(weight(i, n) for i, n in zip(place, window))
            at = tuple(s + i for s, i in zip(start, place))
            patches[at] = patches.get(at, 0) + w * features.patches[(slice(None), *place)].double()
            weights[at] = weights.get(at, 0) + w
    for start, features in runs:
        for place in itertools.product(*map(range, window)):
            w = math.prod(weight(i, n) for i, n in zip(place, window))
            at = tuple(s + i for s, i in zip(start, place))
            number, own = (0, 0) if sets_along is None else (at[sets_along], place[sets_along])
            in_slice = math.prod(n for axis, n in enumerate(sizes) if axis != sets_along)
            part = w / weights[at] / in_slice * features.cls[:, own].double()
            sets[number] = sets.get(number, 0) + part
    out = torch.stack([patches[at] / weights[at] for at in itertools.product(*map(range, sizes))], 1)
    return out.unflatten(1, sizes), torch.stack([sets[i] for i in sorted(sets)], 1)


SETS = {"planecycle": 0, "slice2d": 0, "flatten3d": None, "sets along H": 1, "sets along W": 2}


@pytest.mark.parametrize("blend", ["constant", "linear", "gaussian"])
@pytest.mark.parametrize("mode", MODES)
def test_overlaps_are_blended_as_defined(host, mode, blend):
    lifted = toy_lift(host, **MODES[mode])
    features = pcf.sliding_window(lifted, VOLUME, (4, 6, 6), overlap=(1, 2, 4), blend=blend, batch=3)
    patches, cls = naive(lifted, VOLUME, (4, 3, 3), (1, 1, 2), blend, SETS[mode])
    torch.testing.assert_close(features.patches.double(), patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.cls.double(), cls, rtol=1e-4, atol=1e-4)


def test_shares_and_pixels_are_rounded_up_to_patches(host):
    lifted = toy_lift(host)
    by_pixels = pcf.sliding_window(lifted, VOLUME, (4, 6, 8), overlap=(1, 1, 1))
    assert_equal(pcf.sliding_window(lifted, VOLUME, (4, 6, 8), overlap=0.25), by_pixels)
    assert_equal(pcf.sliding_window(lifted, VOLUME, (4, 6, 8), overlap=(0.1, 2, 0.01)), by_pixels)


@pytest.mark.parametrize("blend", ["constant", "linear", "gaussian"])
def test_weights_sum_to_one_everywhere(blend):
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        size = int(torch.randint(1, 40, (), generator=generator))
        window = int(torch.randint(1, size + 1, (), generator=generator))
        for share in (0, float(torch.rand((), generator=generator)), 1 - 1e-12):
            [shared, *_] = _overlaps(share, (window,) * 3, (size,) * 3, (1, 1, 1))
            starts, weights = _axis(size, window, shared, blend)
            total = torch.zeros(size, dtype=torch.float64)
            for start, each in zip(starts, weights, strict=True):
                assert (each > 0).all() and 0 <= start <= size - window
                total[start : start + window] += each
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_models_without_globals_and_in_other_dtypes():
    torch.manual_seed(0)
    lifted = toy_lift(ToyViT(num_globals=0, rope=False)).double()
    features = pcf.sliding_window(lifted, VOLUME.double(), (3, 8, 12))
    assert features.cls is None and features.registers is None and features.patches.dtype == torch.float64
    half = toy_lift(ToyViT(rope=False)).to(torch.bfloat16)
    features = pcf.sliding_window(half, VOLUME.bfloat16(), (3, 8, 12))
    assert features.patches.dtype == features.cls.dtype == torch.float32


def test_progress_is_told_and_nothing_is_recorded(host, capsys):
    seen = []
    lifted = toy_lift(host)
    features = pcf.sliding_window(
        lifted, VOLUME, (2, 8, 12), overlap=0, batch=2, progress=lambda *done: seen.append(done)
    )
    assert seen == [(0, 3), (2, 3), (3, 3)] and not features.patches.requires_grad
    pytest.importorskip("rich", reason="needs rich, of the extra scans")
    assert_equal(pcf.sliding_window(lifted, VOLUME, (2, 8, 12), overlap=0, batch=2, progress=True), features)
    assert capsys.readouterr() == ("", "")  # no terminal


@pytest.mark.parametrize("mode", ["slice2d", "planecycle"])
def test_a_window_is_chosen_to_fit(host, mode):
    """slice2d cuts D first; the peak of a pass over what was chosen is within what was allowed."""
    lifted, windows, limit = toy_lift(host, mode=mode), [], 150_000
    hook = lifted.blocks[0].register_forward_pre_hook(lambda module, args: windows.append(args[1].sizes))
    features = pcf.sliding_window(lifted, VOLUME, max_memory=limit)
    hook.remove()
    (chosen,) = set(windows)
    assert chosen != (6, 4, 6) and (mode == "planecycle" or chosen[1:] == (4, 6) or chosen[0] == 1)
    size = tuple(n * p for n, p in zip(chosen, (1, 2, 2)))
    assert_equal(pcf.sliding_window(lifted, VOLUME, size), features)
    planned = plan(host, (2, 3, *size), mode=mode, adapter=type(lifted.adapter))
    assert planned.peak_bytes + planned.volume_bytes + sum(t.nbytes for t in features) < limit


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, dict(mode="slice2d"), dict(depth_position="sincos")], ids=str)
def test_what_is_allowed_is_not_exceeded(settings):
    """By what torch records of all that is allocated, beside weights and volume."""
    lifted = pcf.lift(BY_NAME["timm-dinov2-s"].make(embed_dim=192, num_heads=3, depth=4), **settings)
    volume = torch.randn(1, 3, 48, 168, 168)  # its features take 5 MiB
    for limit, more in itertools.product((48 * 2**20, 16 * 2**20), ({}, dict(layers=2, batch=2))):
        run = functools.partial(pcf.sliding_window, lifted, max_memory=limit, **more)
        run(volume)
        assert 0.25 * limit < peak_bytes(run, volume) <= 1.1 * limit, (limit, more)


def test_bars_of_layers_and_of_windows(host):
    """Steps are told without a hook on any block, which would make it run otherwise."""
    lifted, steps = toy_lift(host), []
    with following(lifted, steps.append):
        assert not any(block._forward_hooks for block in lifted.blocks)
        of(lifted, VOLUME)
    assert sum(steps) in (len(lifted.blocks), len(lifted.blocks) + 1)  # with the last norm, where operations know it
    told = list(steps)
    of(lifted, VOLUME)
    assert steps == told
    rich = pytest.importorskip("rich.progress", reason="needs rich, of the extra scans")
    progress = Progress(rich.Progress(disable=True), 1, 5)
    pcf.sliding_window(lifted, VOLUME, (2, 8, 12), overlap=0, progress=progress.windows)
    [_, task] = progress.bars.tasks
    assert (task.completed, task.total) == (3, 3)


def test_what_cannot_fit_is_refused_in_words(host):
    lifted = toy_lift(host)
    with pytest.raises(ValueError, match=r"max_memory must be at least .* GiB for the smallest window, 1 x 2 x 2"):
        pcf.sliding_window(lifted, VOLUME[:, :, :2, :2, :2], max_memory=1000)
    with pytest.raises(ValueError, match="max_memory must be at least .* for a window of 6 x 8 x 12 pixels"):
        pcf.sliding_window(lifted, VOLUME, (6, 8, 12), max_memory=150_000)


BAD = {
    "window": [dict(window=(2, 3, 4)), dict(window=(0, 2, 2)), dict(window=4), dict(window=(2, 2)), dict(window=None)],
    "overlap": [dict(overlap=o) for o in (1.0, -1, 4, (1, 2), True, "1", float("nan"), (0, 0, 4))],
    "blend": [dict(blend="mean")],
    "batch": [dict(batch=0), dict(batch=1.5), dict(batch=True)],
    "layers": [dict(layers=(9,)), dict(layers=0)],
    "accumulate_on": [dict(accumulate_on="meta"), dict(accumulate_on="nowhere")],
    "max_memory": [dict(max_memory=0), dict(max_memory=1.5e9)],
}


@pytest.mark.parametrize("name, change", [(name, change) for name, changes in BAD.items() for change in changes])
def test_bad_settings(host, name, change):
    with pytest.raises(ValueError, match=rf"{name} must .*got"):
        pcf.sliding_window(toy_lift(host), VOLUME, **({"window": (2, 4, 4)} | change))


def test_bad_volumes_and_models(host):
    lifted = toy_lift(host)
    with pytest.raises(ValueError, match=r"slices must be a multiple of the patch, 2 x 2 pixels, got 7 x 12"):
        pcf.sliding_window(lifted, VOLUME[..., :7, :], (2, 4, 4))
    with pytest.raises(ValueError, match=r"volume must have shape \(B, 3, D, height, width\), got \(3, 6, 8, 12\)"):
        pcf.sliding_window(lifted, VOLUME[0], (2, 4, 4))
    with pytest.raises(ValueError, match="volume must have the model's dtype"):
        pcf.sliding_window(lifted, VOLUME.double(), (2, 4, 4))
    with pytest.raises(TypeError, match="volume must be a torch.Tensor, got list"):
        pcf.sliding_window(lifted, [VOLUME], (2, 4, 4))
    with pytest.raises(ValueError, match="volume must need no gradient"):
        pcf.sliding_window(lifted, VOLUME.clone().requires_grad_(), (2, 4, 4))
    with pytest.raises(TypeError, match="lifted must be a model made by lift"):
        pcf.sliding_window(host, VOLUME, (2, 4, 4))


def test_tiles_as_text():
    assert parse_tile("32x224x196") == (32, 224, 196)
    for text in ("", "32", "32x224", "axbxc", "-1x2x3", "1x2x3x4"):
        with pytest.raises(ValueError, match="tile must be slices x pixels x pixels, such as 32x224x224, got"):
            parse_tile(text)


def test_features_of_the_command_in_tiles(run, model, tmp_path):
    noise = torch.randn(70, 50, 6, generator=torch.Generator().manual_seed(0)).numpy()
    write_nifti(tmp_path / "scan.nii", noise)
    status, out, err = run("scan.nii", "--out", "f.npz", "--tile", "4x32x48", "--layers", "1,-1")
    assert (status, err) == (0, []) and out == ["f.npz  6 x 4 x 5 patches"]
    tensors, metadata = pcf.load_features("f.npz")
    lifted = pcf.lift(pcf.load_model(model)[0])
    given = pcf.prepare(pcf.load_scan("scan.nii"), lifted)
    layers = pcf.sliding_window(lifted, given.pixels, (4, 32, 48), layers=(1, 3))
    for i, features in zip((1, 3), layers, strict=True):
        assert torch.equal(tensors[f"layer{i}.patches"], features.patches[0])
        assert torch.equal(tensors[f"layer{i}.cls"], features.cls[0])
    assert metadata["settings"]["tile"] == [4, 32, 48]
    assert "was there already" in run("scan.nii", "--out", "f.npz", "--tile", "4x32x48", "--layers", "1,-1")[1][0]
    for other in (["--tile", "4x32x32"], []):
        status, out, err = run("scan.nii", "--out", "f.npz", "--layers", "1,-1", *other)
        assert (status, out) == (1, []) and len(err) == 1 and "out must be new" in err[0]
    for tile in ("4x30x32", "4x32", "0x32x32"):
        status, out, err = run("scan.nii", "--out", "g.npz", "--tile", tile)
        assert (status, out) == (1, []) and len(err) == 1 and "tile must be" in err[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "scan.nii"]


def test_features_that_are_not_finite_are_found_in_tiles(run, model, tmp_path, monkeypatch):
    write_nifti(tmp_path / "scan.nii", torch.randn(70, 50, 6).numpy())

    def broken(name, load=pcf.load_model):
        host, note = load(name)
        norm = next(module for name, module in host.named_modules() if name.endswith("layer.2.norm1"))
        norm.register_forward_hook(lambda module, args, out: out * float("inf"))
        return host, note

    monkeypatch.setattr("planecycle_fast.scans.extraction.load_model", broken)
    status, out, err = run("scan.nii", "--out", "f.npz", "--tile", "4x32x48")
    assert (status, out) == (1, []) and "they begin in layer 2 of 0 to 3" in err[0]
