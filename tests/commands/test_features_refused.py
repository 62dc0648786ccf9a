"""`planecycle-fast features`: what cannot be done is one line, exit status 1, and no file."""

import os
import re

import numpy as np
import pytest

from planecycle_fast.scans import feature_files
from planecycle_fast.scans.feature_files import load_features

from ..scan_writers import write_nifti
from ..scans.bad_dicom import BAD_DICOM
from ..scans.bad_formats import BAD_FORMATS
from ..scans.bad_scans import SCANS
from .test_features import NOISE

ALL = SCANS | BAD_FORMATS | BAD_DICOM


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_full_disk(run, tmp_path, monkeypatch, suffix, where):
    import safetensors.torch

    write_nifti(tmp_path / "a.nii", NOISE)

    def full(target, *arguments, **settings):
        if where == "writing":
            with open(target, "wb") if isinstance(target, (str, os.PathLike)) else target as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    if where == "renaming":
        monkeypatch.setattr(feature_files.os, "replace", full)
    else:
        monkeypatch.setattr(np, "savez", full)
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, metadata: full(path))
    status, out, err = run("a.nii", "--out", f"f.{suffix}")
    assert status == 1 and out == [] and len(err) == 1
    assert "volume a.nii" in err[0] and "No space left on device" in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.filterwarnings("ignore:(divide|invalid):RuntimeWarning")
@pytest.mark.parametrize("kind", ALL)
def test_bad_scans_are_one_line_and_leave_nothing(run, tmp_path, kind):
    name, make, _ = ALL[kind]
    make(tmp_path / name)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    status, out, err = run(name, "--out", "out")
    assert status == 1 and out == [] and len(err) == 1, err
    assert err[0].startswith("planecycle-fast: volume ") and name in err[0] and len(err[0]) < 500
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_there_are_enough_kinds_of_bad_scans():
    assert len(ALL) >= 20


SCAN_BEYOND = {
    "too large": (["--spacing", "0.001"], "scan must make a volume of at most 8 GiB for the model, got"),
    "window": (["--window", "5000,6000"], "window must overlap the scan's intensities, .*, got 5000,6000"),
    "axes of an array": (["--axes", "SPR"], "must say how its axes lie to be turned to axes 'SPR'"),
}


@pytest.mark.parametrize("kind", SCAN_BEYOND)
def test_settings_that_do_not_suit_a_scan(run, tmp_path, kind):
    arguments, message = SCAN_BEYOND[kind]
    np.save(tmp_path / "a.npy", NOISE)
    status, out, err = run("a.npy", "--out", "out", *arguments)
    assert status == 1 and out == [] and len(err) == 1
    assert err[0].startswith("planecycle-fast: volume a.npy") and re.search(message, err[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


BAD = [
    (["--out", "f.npz", "--layers", "2,x"], "layers must be indices such as 2,5,8,11, got '2,x'"),
    (["--out", "f.npz", "--layers", "7"], "layers must hold indices of the model's 4 layers, got [7]"),
    (["--out", "f.npz", "--mode", "3d"], "mode must be one of planecycle, slice2d, flatten3d, got '3d'"),
    (["--out", "f.npz", "--cycle-order", "HW,XY"], "cycle_order[1] must be one of HW, DW, DH, DHW, got 'XY'"),
    (["--out", "f.npz", "--pool-method", "max"], "pool_method must be one of PCg, PCm, got 'max'"),
    (["--out", "f.npz", "--window", "1"], "window must be LOW,HIGH such as -160,240 or percentiles"),
    (["--out", "f.npz", "--window", "9,1"], "window must have LOW below HIGH, got '9,1'"),
    (["--out", "f.npz", "--window", "1%,101%"], "window must have LOW below HIGH between 0% and 100%, got"),
    (["--out", "f.npz", "--spacing", "1,2"], "spacing must be millimetres, one number or three for D, H, W, got '1,2'"),
    (["--out", "f.npz", "--spacing", "-1"], "spacing must be millimetres"),
    (["--out", "f.npz", "--axes", "XYZ"], "axes must be one letter each of R/L, A/P and S/I"),
    (["--out", "f.npz", "--fit", "crop"], "fit must be one of pad, resize, got 'crop'"),
    (["--out", "f.npz", "--device", "abacus"], "device must be 'auto' or one that torch can use here, got 'abacus'"),
    (["--out", "f.npz", "--device", "meta"], "device must be 'auto' or one that torch can use here, got 'meta'"),
    (["--out", "no/f.npz"], "out must be in an existing folder, got no/f.npz"),
    (["--out", "a.nii"], "out must be a folder or end in .safetensors, .npz, got the file a.nii"),
    (
        ["--out", "x.h5"],
        "out must be a folder or end in .safetensors, .npz, got x.h5; a new folder whose name ends like",
    ),
    (["--out", "x.pt"], "out must be a folder or end in .safetensors, .npz, got x.pt"),
    (["--out", "features.nii.gz"], "out must be a folder or end in .safetensors, .npz, got features.nii.gz"),
    (["--out", "new/x.zarr"], "out must be a folder or end in .safetensors, .npz, got new/x.zarr"),
    (["--out", "x.npy/"], "out must be a folder or end in .safetensors, .npz, got x.npy"),
    (["--out", "x.CSV"], "out must be a folder or end in .safetensors, .npz, got x.CSV"),
    (["--out", "out", "--format", "csv"], "format must be one of safetensors, npz, got 'csv'"),
    (["b.nii", "--out", "f.npz"], "out must be a folder for 2 scans, got the file f.npz"),
    (["sub/a.nii.gz", "--out", "out"], "scans must have names of their own, got a.nii and sub/a.nii.gz"),
    (["--out", "out", "--model", "dino4"], "model must be a known timm or Hugging Face name"),
    (["--out", "out", "--model", "vit_small_patch16_dinov3"], "must have weights, got RANDOM weights"),
    ([], "Missing option '--out'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a) or "no out" for a, _ in BAD])
def test_bad_arguments_are_one_line_before_any_work(run, tmp_path, arguments, message):
    write_nifti(tmp_path / "a.nii", NOISE)
    status, out, err = run("a.nii", *arguments)
    assert status != 0 and out == [] and len(err) == 1 and message in err[0], err
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_out_never_replaces_the_scan(run, tmp_path):
    np.savez(tmp_path / "a.npz", NOISE)
    before = (tmp_path / "a.npz").read_bytes()
    for out in ("a.npz", "."):
        status, _, err = run("a.npz", "--out", out, "--format", "npz", "--overwrite")
        assert status == 1 and "out must not replace a scan" in err[0]
    assert (tmp_path / "a.npz").read_bytes() == before


@pytest.mark.parametrize("name", ["v1.2", "run.2024-01-01", "plain", "of Dr. Smith", ".hidden", "there.h5"])
def test_folders_may_have_dots(run, tmp_path, name):
    write_nifti(tmp_path / "a.nii", NOISE)
    if name == "there.h5":  # whoever made it knows what it is
        (tmp_path / name).mkdir()
    assert run("a.nii", "--out", name, "--pool")[0] == 0
    assert [p.name for p in (tmp_path / name).iterdir()] == ["a.safetensors"]


DAMAGED = {
    "missing": ("f.npz", lambda p: None),
    "not npz": ("f.npz", lambda p: p.write_bytes(b"hello")),
    "another npz": ("f.npz", lambda p: np.savez(p, a=NOISE)),
    "not safetensors": ("f.safetensors", lambda p: p.write_bytes(b"hello" * 99)),
    "suffix": ("f.pt", lambda p: p.write_bytes(b"hello")),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_are_no_features(tmp_path, kind):
    name, make = DAMAGED[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match="features .*f\\.") as raised:
        load_features(tmp_path / name)
    assert "\n" not in str(raised.value)
