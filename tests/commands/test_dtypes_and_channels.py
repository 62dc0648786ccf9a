"""The command line on checkpoints of every dtype, and on models of one channel and of several."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.preprocess import parse_window, prepare
from planecycle_fast.weights.load import load_model

from ..host_models import BY_NAME
from ..saved_models import timms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A scan, and a place for models."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(3, 32, 48)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def features(capsys, *arguments):
    status = main(["features", "a.npy", "--model", "m", "--out", "f.safetensors", "--overwrite", *arguments])
    out, err = capsys.readouterr()
    assert (status, err) == (0, ""), err
    assert out == "f.safetensors  3 x 2 x 3 patches\n"
    return load_features("f.safetensors")


def of_the_api(dtype, mean=MEAN, std=STD):
    lifted = pcf.lift(load_model("m")[0].to(dtype))
    pixels = prepare(load_scan("a.npy"), (16, 16), parse_window("0.5%,99.5%"), mean=mean, std=std).pixels.to(dtype)
    with torch.no_grad():
        return lifted(pixels).patches[0].float()


@pytest.mark.parametrize("checkpoint", DTYPES)
def test_checkpoints_of_every_dtype_run_in_fp32(folder, capsys, checkpoint):
    BY_NAME["hf-dinov3"].make(num_hidden_layers=2).to(DTYPES[checkpoint]).save_pretrained("m")
    assert next(load_model("m")[0].parameters()).dtype == DTYPES[checkpoint]
    tensors, metadata = features(capsys)
    assert metadata["settings"]["dtype"] == "fp32"
    assert torch.equal(tensors["patches"], of_the_api(torch.float32))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_and_in_the_one_asked_for(folder, capsys, dtype):
    BY_NAME["hf-dinov3"].make(num_hidden_layers=2).save_pretrained("m")
    exact = of_the_api(torch.float64)
    tensors, metadata = features(capsys, "--dtype", dtype)
    assert {t.dtype for t in tensors.values()} == {torch.float32} and metadata["settings"]["dtype"] == dtype
    assert torch.equal(tensors["patches"], of_the_api(DTYPES[dtype]))
    error = (tensors["patches"] - exact).norm() / exact.norm()
    assert 0 <= error < {"bf16": 3e-2, "fp16": 4e-3, "fp64": 1e-7}[dtype] and (error > 1e-5) == (dtype != "fp64")
    # A run in another dtype is another one.
    assert main(["features", "a.npy", "--model", "m", "--out", "f.safetensors"]) == 1
    assert "out must be new, or hold the same features already" in capsys.readouterr().err


def test_other_words_are_refused(folder, capsys):
    BY_NAME["hf-dinov3"].make(num_hidden_layers=2).save_pretrained("m")
    assert main(["features", "a.npy", "--model", "m", "--out", "f.npz", "--dtype", "int8"]) == 1
    assert capsys.readouterr().err == "planecycle-fast: dtype must be one of fp32, bf16, fp16, fp64, got 'int8'\n"


def test_weights_that_a_narrower_dtype_does_not_hold(folder, capsys):
    model = BY_NAME["hf-dinov3"].make(num_hidden_layers=2)
    model.norm.weight.data[5] = 1e6
    model.save_pretrained("m")
    assert main(["features", "a.npy", "--model", "m", "--out", "f.npz", "--dtype", "fp16"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "planecycle-fast: model m in fp16 must have finite weights, got NaN or infinity in 1 of 64 values of "
        "norm.weight (torch.float16)\n"
    )
    features(capsys, "--dtype", "bf16")


@pytest.mark.parametrize("command", ["demo", "verify", "plan"])
def test_other_commands_on_16_bits(folder, capsys, command):
    BY_NAME["hf-dinov2"].make(num_hidden_layers=2).to(torch.bfloat16).save_pretrained("m")
    rest = {
        "demo": ["--model", "m", "--volume", "a.npy", "--size", "28", "--out", "p.png"],
        "verify": ["m", "--volume", "1x2x28", "--device", "cpu"],
        "plan": ["m", "--volume", "1x2x28", "--modes", "slice2d", "--gpu", "h100"],
    }
    assert main([command, *rest[command]]) == 0, capsys.readouterr().err


def save(kind, channels):
    if kind == "timm":
        return timms(Path("m"), in_chans=channels)
    name = {"dinov3": "hf-dinov3", "dinov2": "hf-dinov2"}[kind]
    model = BY_NAME[name].make(num_hidden_layers=2, num_channels=channels, patch_size=16, image_size=64)
    model.save_pretrained("m")
    return model


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", ["dinov3", "dinov2", "timm"])
def test_models_of_other_channels(folder, capsys, kind, channels):
    save(kind, channels)
    if kind == "timm":  # says what it was trained on: three channels
        mean, std = (0.2,) * channels, (0.5,) * channels
    else:
        mean, std = ((sum(values) / 3,) * channels for values in (MEAN, STD))
    tensors, metadata = features(capsys)
    assert metadata["mean"] == pytest.approx(list(mean)) and metadata["std"] == pytest.approx(list(std))
    torch.testing.assert_close(tensors["patches"], of_the_api(torch.float32, mean, std))
    for command in (
        ["plan", "m", "--volume", "1x2x32", "--modes", "slice2d", "--gpu", "h100"],
        ["verify", "m", "--volume", "1x2x32", "--device", "cpu"],
    ):
        status = main(command)
        assert status == 0, capsys.readouterr().err
    capsys.readouterr()


def test_the_demo_on_save(folder, capsys):
    save("dinov3", 1)
    (folder / "m" / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": [0.5]}))
    assert main(["demo", "--model", "m", "--volume", "a.npy", "--size", "32", "--out", "p.png"]) == 0
    capsys.readouterr()
    assert features(capsys).metadata["mean"] == [0.5]


def test_two_channels_each_with_its_own_statistics(folder, capsys):
    save("dinov3", 2)
    (folder / "m" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.9], "image_std": [1, 0.5]})
    )
    tensors, metadata = features(capsys)
    assert metadata["mean"] == [0.1, 0.9]
    torch.testing.assert_close(tensors["patches"], of_the_api(torch.float32, (0.1, 0.9), (1.0, 0.5)))


def test_python_names_the_models_channels():
    lifted = pcf.lift(BY_NAME["hf-dinov3"].make(num_hidden_layers=2, num_channels=4))
    with pytest.raises(
        ValueError, match=r"shape \(B, 4, D, height, width\), got \(1, 1, 2, 16, 16\); .* of a scan to 4$"
    ):
        lifted(torch.randn(1, 1, 2, 16, 16))
