"""`planecycle-fast features`: from scans to files of features, and where each feature lies."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.scans import extraction as extract
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.preprocess import parse_window, prepare
from planecycle_fast.weights.load import load_model

from ..pages import block_with
from ..scan_writers import turned_affine, write_dicom, write_nifti, write_nrrd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.normal(100, 30, size=(40, 50, 6)).astype(np.float32)


def features_of_the_api(model, path, spacing=None, fit="pad", window="0.5%,99.5%", axes=None, layers=None, **settings):
    lifted = pcf.lift(load_model(model)[0], **settings)
    given = prepare(load_scan(path, axes), (16, 16), parse_window(window), spacing, fit, MEAN, STD)
    with torch.no_grad():
        return lifted.intermediate(given.pixels, layers or [3])


def assert_equal_to_the_api(tensors, features, prefix=""):
    assert torch.equal(tensors[prefix + "patches"], features.patches[0])
    assert torch.equal(tensors[prefix + "cls"], features.cls[0])
    assert torch.equal(tensors[prefix + "registers"], features.registers[0])
    assert torch.equal(tensors[prefix + "pooled"], features.pooled()[0])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_features_reload_and_equal_the_apis(run, model, tmp_path, suffix):
    affine = turned_affine("LPS", True)
    write_nifti(tmp_path / "scan.nii.gz", NOISE, affine)
    status, out, err = run("scan.nii.gz", "--out", f"f.{suffix}")
    assert (status, err) == (0, []) and out == [f"f.{suffix}  6 x 4 x 3 patches"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"f.{suffix}", "scan.nii.gz"]
    tensors, metadata = load_features(tmp_path / f"f.{suffix}")
    assert set(tensors) == {"patches", "cls", "registers", "pooled"}
    assert tensors["patches"].shape == (6, 4, 3, 64) and tensors["patches"].dtype == torch.float32
    assert_equal_to_the_api(tensors, features_of_the_api(model, "scan.nii.gz")[0])
    assert metadata["axes"] == "SPR" and metadata["model"] == model
    settings = metadata["settings"]
    assert settings["mode"] == "planecycle" and settings["cycle_order"] == ["HW", "DW", "DH", "HW"]
    assert settings["window"] == "0.5%,99.5%" and settings["spacing"] is None
    assert (
        metadata["mean"] == list(MEAN)
        and metadata["std"] == list(STD)
        and metadata["weights"] == f"weights from {model}"
    )
    assert metadata["spacing"] == pytest.approx([3, 2 * 16, 1.5 * 16], abs=1e-4)
    assert metadata["scan_spacing"] == pytest.approx([3, 2, 1.5], abs=1e-5) and metadata["scan_size"] == [6, 50, 40]
    assert metadata["padding"] == [14, 8] and metadata["scan"] == "scan.nii.gz"
    assert metadata["planecycle_fast"] == pcf.__version__ and len(metadata["scan_sha256"]) == 64


CHANGES = {
    "slice2d": (["--mode", "slice2d"], {"mode": "slice2d"}),
    "flatten3d": (["--mode", "flatten3d"], {"mode": "flatten3d"}),
    "cycle": (
        ["--cycle-order", "DW,HW", "--pool-method", "PCm", "--globals-at", "plane"],
        {"cycle_order": ("DW", "HW"), "pool_method": "PCm", "globals_at": "plane"},
    ),
    "window": (["--window", "80,120"], {"window": "80,120"}),
    "percentiles": (["--window", "10%,90%"], {"window": "10%,90%"}),
    "axes": (["--axes", "ras"], {"axes": "RAS"}),
    "spacing": (["--spacing", "2,1.5,1"], {"spacing": (2, 1.5, 1)}),
    "one spacing": (["--spacing", "2.5"], {"spacing": (2.5, 2.5, 2.5)}),
    "resize": (["--fit", "resize"], {"fit": "resize"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_is_the_apis(run, model, tmp_path, change):
    arguments, settings = CHANGES[change]
    write_nifti(tmp_path / "scan.nii", NOISE, np.diag([1.2, 1.0, 3.0, 1.0]))
    assert run("scan.nii", "--out", "f.npz", *arguments)[0] == 0
    tensors = load_features("f.npz").tensors
    assert_equal_to_the_api(tensors, features_of_the_api(model, "scan.nii", **settings)[0])
    plain = features_of_the_api(model, "scan.nii")[0].patches[0]
    assert tensors["patches"].shape != plain.shape or not torch.allclose(tensors["patches"], plain)


def test_layers_and_pooling(run, model, tmp_path):
    write_nifti(tmp_path / "scan.nii", NOISE)
    assert run("scan.nii", "--out", "f.npz", "--layers", "0,-1,2")[0] == 0
    tensors = load_features("f.npz").tensors
    names = ("patches", "cls", "registers", "pooled")
    assert set(tensors) == {f"layer{i}.{name}" for i in (0, 2, 3) for name in names}
    for i, features in zip((0, 2, 3), features_of_the_api(model, "scan.nii", layers=[0, 2, 3])):
        assert_equal_to_the_api(tensors, features, f"layer{i}.")
    assert run("scan.nii", "--out", "p.safetensors", "--pool")[0] == 0
    pooled, metadata = load_features("p.safetensors")
    assert list(pooled) == ["pooled"] and torch.equal(pooled["pooled"], tensors["layer3.pooled"])
    assert metadata["settings"]["pool"] is True and metadata["size"] == [6, 4, 3]


def cube_at(affine, shape, mm, value):
    """Voxels that are bright where they lie within 1.6 mm of a place, along each axis of space."""
    indices = np.vstack([np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape)))])
    near = (abs((affine @ indices)[:3].T - mm) <= 1.6).all(1)
    return np.where(near.reshape(shape), value, 0).astype(np.float32)


def write(kind, folder, array, affine):
    if kind == "dicom":
        return write_dicom(folder, array.astype(np.int16), affine)
    return {"nii": write_nifti, "nrrd": write_nrrd}[kind](folder.with_suffix("." + kind), array, affine)


PLACES = [(code, kind) for code in ("RAS", "LPS", "PIR", "SRA", "oblique LAS") for kind in ("nii", "nrrd", "dicom")]
OPTIONS = [[], ["--spacing", "2,1.3,0.9"], ["--fit", "resize", "--axes", "IAL"]]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("codes, kind", PLACES)
def test_a_bright_cube_is_in_the_feature_that_the_affine_says(run, tmp_path, codes, kind, options):
    affine = turned_affine(codes[-3:], codes.startswith("oblique"))  # voxels of 1.5, 2 and 3 mm
    mm = (affine @ (23, 25, 10, 1))[:3]  # far enough from the edges of the features' cells, for all options
    scans = []
    for name, value in (("bright", 100), ("dark", 10)):
        array = cube_at(affine, (60, 55, 40), mm, value)
        scans.append(write(kind, tmp_path / name, array, affine))
    status, _, err = run(*scans, "--out", "out", "--window", "0,100", "--layers", "0", *options)
    assert status == 0, err
    bright, dark = (load_features(tmp_path / "out" / f"{name}.safetensors") for name in ("bright", "dark"))
    assert bright.metadata["affine"] == dark.metadata["affine"]
    change = (bright.tensors["layer0.patches"] - dark.tensors["layer0.patches"]).norm(dim=-1)  # (D, H, W)
    place = (np.linalg.inv(bright.metadata["affine"]) @ (*mm, 1))[:3]
    cell = np.unravel_index(change.argmax().item(), change.shape)
    assert [int(n) for n in cell[1:]] == np.rint(place[1:]).tolist()
    along_depth = change[:, cell[1], cell[2]].numpy()  # the cube may lie in several slices
    assert along_depth @ np.arange(len(along_depth)) / along_depth.sum() == pytest.approx(place[0], abs=0.3)


def test_many_scans_with_bad_ones_among_them(run, tmp_path):
    for name in "acd":
        write_nifti(tmp_path / f"{name}.nii.gz", NOISE + ord(name))
    (tmp_path / "b.nii.gz").write_bytes(b"hello")
    scans = ["a.nii.gz", "b.nii.gz", "c.nii.gz", "no.nii", "d.nii.gz"]
    status, out, err = run(*scans, "--out", "deep/out")
    assert status == 1
    assert [line.split()[0] for line in out] == [f"deep/out/{name}.safetensors" for name in "acd"]
    assert len(err) == 2 and "volume b.nii.gz" in err[0] and "volume no.nii" in err[1]
    assert sorted(p.name for p in (tmp_path / "deep/out").iterdir()) == [f"{name}.safetensors" for name in "acd"]


def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    scans = [write_nifti(tmp_path / f"{name}.nii", NOISE + ord(name)).name for name in "abc"]
    loaded = []

    def load(path, **options):
        loaded.append(path.name)
        if loaded == ["a.nii", "b.nii"]:
            raise KeyboardInterrupt
        return load_scan(path, **options)

    monkeypatch.setattr(extract, "load_scan", load)
    status, out, err = run(*scans, "--out", "out")
    assert status == 130 and err == ["planecycle-fast: interrupted"] and len(out) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.safetensors"]
    done = (tmp_path / "out/a.safetensors").stat().st_mtime_ns
    status, out, err = run(*scans, "--out", "out")
    assert (status, err) == (0, []) and loaded == ["a.nii", "b.nii", "b.nii", "c.nii"]
    assert out[0] == "out/a.safetensors  was there already" and len(out) == 3
    assert (tmp_path / "out/a.safetensors").stat().st_mtime_ns == done


def test_what_is_there_is_kept_unless_told_otherwise(run, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    assert run("a.nii", "--out", "f.npz")[0] == 0
    before = (tmp_path / "f.npz").read_bytes()
    message = (
        "planecycle-fast: volume a.nii: out must be new, or hold the same features already, got f.npz; --overwrite"
    )
    for arguments in (["--mode", "slice2d"], ["--layers", "3"], ["--window", "0,9"], ["--pool"], ["--spacing", "2"]):
        status, out, err = run("a.nii", "--out", "f.npz", *arguments)
        assert status == 1 and out == [] and len(err) == 1 and err[0].startswith(message)
    write_nifti(tmp_path / "a.nii", NOISE * 2)  # another scan of the same name
    assert run("a.nii", "--out", "f.npz")[0] == 1
    assert (tmp_path / "f.npz").read_bytes() == before
    assert run("a.nii", "--out", "f.npz", "--overwrite", "--mode", "slice2d")[0] == 0
    assert load_features("f.npz").metadata["settings"]["mode"] == "slice2d"
    (tmp_path / "g.npz").write_bytes(b"something else")
    assert run("a.nii", "--out", "g.npz")[0] == 1
    assert (tmp_path / "g.npz").read_bytes() == b"something else"


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


def test_pictures(run, tmp_path):
    write_nifti(tmp_path / "a.nii", NOISE)
    np.save(tmp_path / "b.npy", NOISE)
    assert run("a.nii", "b.npy", "--out", "out")[0] == 0
    status, _, err = run("a.nii", "b.npy", "--out", "out", "--picture", "--pool")
    assert status == 1 and len(err) == 2  # other settings
    status, _, err = run("a.nii", "b.npy", "--out", "out", "--picture")
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{n}.safetensors{e}" for n in "ab" for e in ("", ".png")
    ]
    assert is_png(tmp_path / "out/a.safetensors.png") and is_png(tmp_path / "out/b.safetensors.png")
    assert load_features("out/b.safetensors").metadata["axes"] == "unknown"


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_files_have_the_permissions_of_new_files(run, tmp_path, suffix):
    write_nifti(tmp_path / "a.nii", NOISE)
    assert run("a.nii", "--out", f"f.{suffix}", "--pool")[0] == 0
    (tmp_path / "new").touch()
    assert (tmp_path / f"f.{suffix}").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_random_weights_if_one_insists(tmp_path):
    np.save(tmp_path / "a.npy", NOISE)
    arguments = [
        "features",
        "a.npy",
        "--out",
        "f.safetensors",
        "--model",
        "vit_small_patch16_dinov3",
        "--pool",
        "--random-weights",
    ]
    command = [sys.executable, "-m", "planecycle_fast", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "f.safetensors  40 x 4 x 1 patches\n"
    metadata = load_features(tmp_path / "f.safetensors").metadata
    assert metadata["weights"].startswith("RANDOM weights") and metadata["mean"] == [0.485, 0.456, 0.406]


def test_the_way_to_read_features_in_docs(run, tmp_path):
    code = block_with("load_features")
    write_nifti(
        tmp_path / "scan.nii", NOISE, np.diag([3.0, 3.0, 20.0, 1.0]) + np.array([[0, 0, 0, -50]] * 3 + [[0] * 4])
    )
    assert run("scan.nii", "--out", "scan.safetensors")[0] == 0
    names = {}
    exec(code, names)
    place = names["metadata"]["affine"] @ np.array([names["d"], names["h"], names["w"], 1])
    assert (abs(place[:3] - (10, -20, 35)) <= (24, 24, 10)).all() and names["tensors"]["patches"].shape == (6, 4, 3, 64)
