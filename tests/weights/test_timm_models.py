"""Models in timm's layout, and its local cache: weights that are not the model's are refused."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from planecycle_fast.commands.cli import main
from planecycle_fast.weights.load import load_model, model_without_weights

from ..saved_models import cached, edit, timms


@pytest.mark.parametrize(
    "name, more",
    [("vit_small_patch16_dinov3", {}), ("vit_small_patch16_224", {"num_classes": 5}), ("vit_small_patch16_224", {})],
)
def test_folders_of_timm(tmp_path, name, more):
    model = timms(tmp_path / "m", name, **more)
    loaded, note = load_model(str(tmp_path / "m"))
    assert note == f"weights from {tmp_path / 'm'}" and loaded.num_classes == 0 and not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    bare = model_without_weights(str(tmp_path / "m"))
    assert all(p.is_meta for p in bare.parameters()) and bare.state_dict().keys() == loaded.state_dict().keys()


def test_timm_written_by_itself(tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model("vit_small_patch16_224", depth=2, embed_dim=64, num_heads=2, num_classes=3)
    save_for_hf(model, tmp_path, model_args=dict(depth=2, embed_dim=64, num_heads=2), safe_serialization="both")
    loaded, _ = load_model(str(tmp_path))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in loaded.state_dict().items())


TIMM_FAULTS = {
    "prefix": (lambda s: {f"backbone.{k}": v for k, v in s.items()}, "strip the prefix 'backbone.'"),
    "no layer 1": (lambda s: {k: v for k, v in s.items() if ".1." not in k}, r"lacking 1\d \(blocks\.1\."),
    "one more": (lambda s: s | {"extra.weight": torch.ones(2)}, r"with unknown 1 \(extra.weight\)"),
    "shape": (lambda s: s | {"norm.weight": torch.ones(3)}, r"shapes for 1 \(norm.weight \(3,\) for \(64,\)\)"),
}


@pytest.mark.parametrize("fault", TIMM_FAULTS)
@pytest.mark.parametrize("classes", [0, 5])  # timm itself skips what does not fit where heads differ
def test_folders_of_timm_with_other_weights(tmp_path, fault, classes):
    change, message = TIMM_FAULTS[fault]
    timms(tmp_path / "m", "vit_small_patch16_224", change, num_classes=classes)
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=rf"model .* of a VisionTransformer, .*{message}"):
            load(str(tmp_path / "m"))


def test_a_head_that_is_not_there_is_not_missed(tmp_path):
    for name, classes, change in (
        ("a", 5, lambda s: {k: v for k, v in s.items() if "head" not in k}),
        ("b", 0, lambda s: s | {"head.weight": torch.ones(2, 64), "head.bias": torch.ones(2)}),
    ):
        model = timms(tmp_path / name, "vit_small_patch16_224", change, num_classes=classes)
        loaded, _ = load_model(str(tmp_path / name))
        assert all(torch.equal(model.state_dict()[k], v) for k, v in loaded.state_dict().items())


def test_timms_local_cache(tmp_path, monkeypatch):
    """A checkpoint with a head of 1,000 classes: timm loads it without asking for all keys."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    (tmp_path / "m").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m" / "model.safetensors")
    snapshot = cached(tmp_path / "cache", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", tmp_path / "m")
    loaded, note = load_model("vit_tiny_patch16_224")
    assert note == "weights of timm vit_tiny_patch16_224 from the local cache" and loaded.num_classes == 0
    assert all(torch.equal(model.state_dict()[k], v) for k, v in loaded.state_dict().items())
    edit(snapshot, lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.7.")})
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=r"model vit_tiny_patch16_224 must .* lacking 12 \(blocks.7.attn.proj"):
            load("vit_tiny_patch16_224")


def of_training(folder):
    """As training scripts write it: DistributedDataParallel's names, in a dictionary of other things."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "pytorch_model.bin")


LAYOUTS = {
    "module.": lambda folder: edit(folder, lambda s: {f"module.{k}": v for k, v in s.items()}),
    "_orig_mod.": lambda folder: edit(folder, lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}),
    "of a training script": of_training,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_timm_makes_of_names_is_planned_too(tmp_path, monkeypatch, layout):
    model = timms(tmp_path / "m")
    LAYOUTS[layout](tmp_path / "m")
    loaded, _ = load_model(str(tmp_path / "m"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in loaded.state_dict().items())
    monkeypatch.setattr("socket.create_connection", lambda *args: pytest.fail("the hub was asked"))
    bare = model_without_weights(str(tmp_path / "m"))
    assert all(p.is_meta for p in bare.parameters()) and bare.state_dict().keys() == loaded.state_dict().keys()


def test_a_folder_without_weights(tmp_path, monkeypatch, capsys):
    timms(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model-00001-of-00002.safetensors")
    np.save(tmp_path / "a.npy", np.ones((2, 32, 32)))
    monkeypatch.chdir(tmp_path)
    for words in (
        ["features", "a.npy", "--model", "m", "--out", "f.npz", "--random-weights"],
        ["verify", "m", "--volume", "1x2x32", "--device", "cpu"],
        ["demo", "--volume", "a.npy", "--out", "p.png", "--size", "32", "--model", "m"],
    ):
        assert main(words) == 1
        expected = "model m must have weights beside its config.json: model.safetensors or pytorch_model.bin"
        assert capsys.readouterr() == ("", f"planecycle-fast: {expected}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "m"]
