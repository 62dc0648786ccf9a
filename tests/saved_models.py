"""Models in folders and caches, as their libraries write them, and what may be done to their weights."""

import json

import safetensors.torch
import timm
import torch

from .host_models import BY_NAME, hf_dinov3, randomise

HOSTS = {"dinov3": "hf-dinov3", "dinov2": "hf-dinov2", "registers": "hf-dinov2-registers"}


def saved(folder, host="dinov3", **settings):
    torch.manual_seed(1)
    model = BY_NAME[HOSTS[host]].make(num_hidden_layers=3)
    model.save_pretrained(folder, **settings)
    return model


def with_statistics(folder, layers):
    """A small DINOv3, and the statistics of its images; the folder's name."""
    torch.manual_seed(0)
    host = hf_dinov3(num_hidden_layers=layers)
    randomise(host)
    host.save_pretrained(folder)
    statistics = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.25, 0.3)}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return str(folder)


def edit(folder, change):
    """Replaces the weights of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    state = {k: v.contiguous() for k, v in change(safetensors.torch.load_file(file)).items()}
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


def cached(cache, name, folder):
    """A folder as a model of the hub's local cache."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return snapshot


def timms(folder, name="vit_small_patch16_dinov3", change=lambda state: state, **settings):
    """A folder in the layout of timm's save_for_hf."""
    torch.manual_seed(1)
    sizes = dict(depth=3, embed_dim=64, num_heads=2) | settings
    model = timm.create_model(name, **sizes).eval()
    randomise(model)
    folder.mkdir()
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]},
        "model_args": {k: v for k, v in sizes.items() if k != "num_classes"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v.contiguous() for k, v in change(model.state_dict()).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return model
