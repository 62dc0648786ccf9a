"""`planecycle-fast features` run again, in parallel, on pipes and terminals; its pictures."""

import os
import pty
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from planecycle_fast.scans import extraction as extract
from planecycle_fast.scans import feature_files
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.viz import foreground, pca_colours

from ..scan_writers import write_dicom, write_nifti
from .test_features import NOISE

OTHERS = "planecycle-fast: volume a.nii: out must be new, or hold the same features already"


def test_other_weights_are_other_features(run, model, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    shutil.copytree(model, tmp_path / "m")
    assert run("a.nii", "--out", "f.npz", "--model", "m")[0] == 0
    assert run("a.nii", "--out", "f.npz", "--model", "m")[1] == ["f.npz  was there already"]
    import safetensors.torch

    weights = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    weights["norm.bias"] += 1e-3
    safetensors.torch.save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    status, _, err = run("a.nii", "--out", "f.npz", "--model", "m")
    assert status == 1 and err[0].startswith(OTHERS)


def test_where_weights_came_from_does_not_matter(run, tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii", NOISE)
    assert run("a.nii", "--out", "f.npz")[0] == 0
    load = extract.load_model
    monkeypatch.setattr(extract, "load_model", lambda name: (load(name)[0], "weights from elsewhere"))
    assert run("a.nii", "--out", "f.npz")[1] == ["f.npz  was there already"]


def test_settings_are_compared_to_the_last_digit_but_not_by_their_spelling(run, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    first = ["a.nii", "--out", "f.npz", "--axes", "ras", "--layers", "-1,0", "--window=-0.25,123456.75"]
    assert run(*first)[0] == 0
    assert load_features("f.npz").metadata["settings"]["window"] == "-0.25,123456.75"
    again = ["a.nii", "--out", "f.npz", "--axes", "RAS", "--layers", "0,3", "--window=-.250,123456.75"]
    assert run(*again)[1] == ["f.npz  was there already"]
    assert run(*again[:-1], "--window=-0.25,123457")[0] == 1


def test_a_folder_of_dicom_is_what_its_slices_are(run, tmp_path):
    folder = write_dicom(tmp_path / "dcm", NOISE.astype(np.int16))
    assert run("dcm", "--out", "f.npz")[0] == 0
    (folder / ".DS_Store").write_bytes(b"of a Mac")
    assert run("dcm", "--out", "f.npz")[1] == ["f.npz  was there already"]
    for out in ("dcm", "dcm/f.npz"):
        status, _, err = run("dcm", "--out", out)
        assert status == 1 and "out must not be in the folder of a scan, got dcm/" in err[0]
    slice_ = next(folder.glob("3"))
    slice_.write_bytes(slice_.read_bytes()[:-2] + b"ab")
    assert run("dcm", "--out", "f.npz")[0] == 1
    os.chdir(folder)
    assert run(".", "--out", "../g.npz")[0] == 0 and load_features("../g.npz").metadata["scan"] == "dcm"


def test_every_process_writes_to_a_file_of_its_own(tmp_path):
    with feature_files.whole(tmp_path / "f.npz") as temporary:
        assert str(os.getpid()) in temporary.name and temporary.parent == tmp_path
        assert list(tmp_path.iterdir()) == [temporary]
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(extract.os, "access", lambda path, mode: path != tmp_path)
    for out in (tmp_path / "f.npz", tmp_path / "deep" / "er"):
        with pytest.raises(ValueError, match=f"^out must be in a folder that can be written to, got {out}$"):
            extract.jobs_for([tmp_path / "a.nii"], out)


# Pictures


def test_pictures_belong_to_their_features(run, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    (tmp_path / "f.npz.png").write_bytes(b"mine")
    assert run("a.nii", "--out", "f.npz")[0] == 0 and (tmp_path / "f.npz.png").exists()  # not of any features yet
    (tmp_path / "f.npz").unlink()
    status, _, err = run("a.nii", "--out", "f.npz", "--picture")
    assert status == 1 and "out must leave its picture a new file, got f.npz.png; --overwrite" in err[0]
    assert not (tmp_path / "f.npz").exists() and (tmp_path / "f.npz.png").read_bytes() == b"mine"
    assert run("a.nii", "--out", "f.npz", "--picture", "--overwrite")[0] == 0
    first = (tmp_path / "f.npz.png").read_bytes()
    assert run("a.nii", "--out", "f.npz", "--overwrite", "--mode", "slice2d")[0] == 0
    assert not (tmp_path / "f.npz.png").exists()  # it would show other features
    assert run("a.nii", "--out", "f.npz", "--picture", "--mode", "slice2d")[0] == 0
    assert (tmp_path / "f.npz.png").read_bytes() != first


@pytest.mark.parametrize("name", ["a$x_$y.nii", "\u8166.nii", b"\xff.nii".decode(errors="surrogateescape")])
def test_names_that_are_no_titles(run, tmp_path, name):
    write_nifti(tmp_path / "a.nii", NOISE).rename(tmp_path / name)
    status, _, err = run(name, "--out", "f.npz", "--picture")
    assert (status, err) == (0, []) and (tmp_path / "f.npz.png").exists()


def test_a_picture_that_cannot_be_drawn_leaves_nothing(run, tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii", NOISE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extract, "three_views", full)
    status, out, err = run("a.nii", "--out", "f.npz", "--picture")
    assert status == 1 and out == [] and len(err) == 1 and "No space left on device" in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_a_picture_shows_the_last_layer_where_the_scan_is_bright(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(extract, "three_views", lambda *arguments, **settings: seen.append((arguments, settings)))
    scan = np.zeros((40, 50, 6), np.float32)
    scan[:18, :34, 1:] = NOISE[:18, :34, 1:]
    write_nifti(tmp_path / "a.nii", scan, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert run("a.nii", "--out", "f.npz", "--layers", "0,3", "--picture", "--window", "0,200")[0] == 0
    ((image, colours, path, title), settings) = seen[0]
    patches = load_features("f.npz").tensors["layer3.patches"]
    mask = foreground(image, patches.shape[:3])
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(colours["features"], pca_colours({"features": patches}, mask)["features"])
    assert settings == {"spacing": (3.0, 32.0, 16.0), "axes": "SPR"}
    assert path.name == "f.npz.png" and title.startswith("a.nii\n")


# Pipes and terminals


def command(model, *arguments, **settings):
    quiet = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    whole = [sys.executable, "-m", "planecycle_fast", "features", "--model", model, *arguments]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, env=quiet | {"TERM": "xterm", "COLUMNS": "80"}, **settings)


def test_nothing_but_the_results_is_printed_without_a_terminal(model, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    process = command(model, "a.nii", "no.nii", "--out", "out", cwd=tmp_path, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 1 and out == b"out/a.safetensors  6 x 4 x 3 patches\n"
    assert err.startswith(b"planecycle-fast: volume no.nii must be a file") and err.count(b"\n") == 1


def test_bars_go_to_the_terminal_and_results_to_the_pipe(model, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    master, slave = pty.openpty()
    process = command(model, "a.nii", "--out", "out", cwd=tmp_path, stderr=slave)
    os.close(slave)
    out, shown = process.stdout.read(), b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # Linux, at the end
        pass
    assert process.wait() == 0 and out == b"out/a.safetensors  6 x 4 x 3 patches\n"
    assert b"scans" in shown and b"a.nii" in shown


@pytest.mark.full
def test_a_reader_that_has_enough(model, tmp_path):
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii", NOISE)
    process = command(model, "a.nii", "b.nii", "--out", "out", cwd=tmp_path, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    load_features(tmp_path / "out/a.safetensors")
