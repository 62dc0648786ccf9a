"""Models by name, with and without a hub."""

import socket
import sys

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast.optional import MissingPackageError
from planecycle_fast.scans.scan import IMAGENET_MEAN, IMAGENET_STD
from planecycle_fast.weights.hub import hub_reachable
from planecycle_fast.weights.known_models import known_config
from planecycle_fast.weights.load import load_model
from planecycle_fast.weights.normalisation import SATELLITE, normalisation_by_name

from ..host_models import BY_NAME


def test_offline_is_seen_at_once(monkeypatch):
    assert not hub_reachable()  # HF_HUB_OFFLINE, set for all tests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert not hub_reachable(0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()
    assert not hub_reachable(0.5)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert hub_reachable()


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "timm/vit_small_patch14_dinov2"])
def test_timm_names_without_a_hub(name):
    model, note = load_model(name)
    assert note.startswith("RANDOM weights") and "no hub can be reached" in note
    assert not model.training and model.num_classes == 0
    pcf.lift(model)(torch.zeros(1, 3, 2, *[2 * s for s in model.patch_embed.patch_size]))
    again, _ = load_model(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_timm_model_in_the_local_cache(tmp_path, monkeypatch):
    source = timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    folder = tmp_path / "models--timm--vit_small_patch16_dinov3.lvd1689m"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    state = {k: v.contiguous() for k, v in source.state_dict().items()}
    safetensors.torch.save_file(state, folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, note = load_model("vit_small_patch16_dinov3")
    assert note == "weights of timm vit_small_patch16_dinov3 from the local cache"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))


@pytest.mark.parametrize("name, package, extra", [("vit_tiny", "timm", "timm"), ("a/b", "transformers", "hf")])
def test_missing_libraries_name_their_extra(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"'{package}' is not installed; .* 'planecycle-fast\[{extra}\]'"):
        load_model(name)


@pytest.mark.parametrize(
    "name, kind, globals_, layers",
    [
        ("facebook/dinov2-small", "Dinov2Model", 1, 12),
        ("facebook/dinov2-with-registers-base", "Dinov2WithRegistersModel", 5, 12),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3ViTModel", 5, 12),
        ("facebook/dinov3-vits16plus-pretrain-lvd1689m", "DINOv3ViTModel", 5, 12),
    ],
)
def test_hugging_face_names_without_a_hub(name, kind, globals_, layers):
    model, note = load_model(name)
    assert type(model).__name__ == kind and note.startswith(f"RANDOM weights for {name}")
    lifted = pcf.lift(model)
    assert (lifted.adapter.num_globals, len(lifted.blocks)) == (globals_, layers)


PARAMETERS = {"s16": 21.6e6, "s16plus": 28.7e6, "b16": 85.7e6, "l16": 303e6, "h16plus": 840e6, "7b16": 6716e6}


@pytest.mark.parametrize("size", PARAMETERS)
def test_known_configurations_have_the_published_size(size):
    import transformers

    config = known_config(transformers, f"facebook/dinov3-vit{size}-pretrain-lvd1689m")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[size], rel=0.005)


def test_a_local_folder(tmp_path):
    host = BY_NAME["hf-dinov3"]
    saved = host.make()
    saved.save_pretrained(tmp_path / "mine")
    model, note = load_model(str(tmp_path / "mine"))
    assert note == f"weights from {tmp_path / 'mine'}"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a folder written by save_pretrained"):
        load_model(str(tmp_path / "empty"))


def test_unknown_names():
    with pytest.raises(
        ValueError, match="model must be a known timm or Hugging Face name or a local folder, got 'dino4'"
    ):
        load_model("dino4")
    with pytest.raises(ValueError, match="model someone/something is not in the local cache, no hub can be reached"):
        load_model("someone/something")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_small_patch16_dinov3", (IMAGENET_MEAN, IMAGENET_STD)),
        (
            "vit_base_patch16_clip_224.openai",
            ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ),
        ("vit_large_patch16_dinov3.sat493m", SATELLITE),
    ],
)
def test_normalisation_of_timm(name, expected):
    model = timm.create_model(name, pretrained=False, depth=1, num_classes=0)
    assert normalisation_by_name(model, name) == expected


def test_normalisation_of_others(tmp_path):
    model = torch.nn.Linear(1, 1)
    assert normalisation_by_name(model, "facebook/dinov2-small") == (IMAGENET_MEAN, IMAGENET_STD)
    assert normalisation_by_name(model, "facebook/dinov3-vitl16-pretrain-sat493m") == SATELLITE
    assert normalisation_by_name(model, str(tmp_path)) == (IMAGENET_MEAN, IMAGENET_STD)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    assert normalisation_by_name(model, str(tmp_path)) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
