"""timm's models: by name, from its cache or the hub, and in the layout of its `save_for_hf`, folders or on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..optional import require
from .hub import WEIGHTS, cached, hub_file, hub_reachable, local_file
from .loaded_keys import check_keys, check_plain, keys_of_error, shapes_of

CONFIG = "config.json"


class Source(NamedTuple):
    """What timm builds a model of, and where its weights are."""

    architecture: str
    settings: dict[str, Any]  # arguments of create_model
    num_classes: int  # of the checkpoint's head
    file: str | None  # on this machine
    hub: bool  # whether timm can load the weights from the hub, where it is reached


def timm_config(name: str) -> dict[str, Any] | None:
    """The configuration of a folder, or of a model of the hub, if it is in timm's layout: it names an architecture."""
    file = hub_file(name, CONFIG)
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError):  # whoever loads it says so
        return None
    return config if isinstance(config, dict) and "architecture" in config and "model_type" not in config else None


def by_name(name: str) -> Source:
    """Of a name of timm's. Raises ValueError for an unknown one."""
    timm = require("timm", "timm")
    if not timm.is_model(name):
        raise ValueError(f"model must be a known timm or Hugging Face name or a local folder, got {name!r}")
    config, file = timm.get_pretrained_cfg(name), None
    hub_id = config.hf_hub_id if config is not None else None
    if hub_id:
        file = cached(hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHTS[::2])
    return Source(name, _dynamic(timm, name), config.num_classes if config else 0, file, hub=config is not None)


def by_config(name: str, config: dict[str, Any]) -> Source:
    """Of a folder, or a model of the hub, with this `timm_config`."""
    timm, architecture = require("timm", "timm"), config["architecture"]
    if not timm.is_model(architecture):
        raise ValueError(f"model {name} must be of an architecture of timm {timm.__version__}, got {architecture!r}")
    pretrained = dict(config.get("pretrained_cfg") or {})
    num_classes = config.get("num_classes", pretrained.get("num_classes", 0))
    pretrained |= {"num_classes": num_classes, "file": None, "source": None, "hf_hub_id": name}
    settings = _dynamic(timm, architecture) | dict(config.get("model_args") or {}) | {"pretrained_cfg": pretrained}
    settings.pop("num_classes", None)  # said by the configuration itself
    if config.get("global_pool") is not None:
        settings.setdefault("global_pool", config["global_pool"])
    return Source(architecture, settings, num_classes, local_file(name, WEIGHTS[::2]), hub=not Path(name).is_dir())


def load_timm(name: str, source: Source) -> tuple[nn.Module, str]:
    """The model without its head, and where its weights are from: the hub, a file, or by chance.

    Raises ValueError where they are not this architecture's.
    """
    if Path(name).is_dir() and source.file is None:
        raise ValueError(f"model {name} must have weights beside its {CONFIG}: {' or '.join(WEIGHTS[::2])}")
    if source.file is not None:
        overlay = {"file": source.file, "source": None, "custom_load": source.file.endswith(".npz")}
        return _checked(name, source, overlay), "the local cache"
    if source.hub and hub_reachable():
        return _checked(name, source, {}), "the hub"
    torch.manual_seed(0)
    return _without_head(source, pretrained=False), "random"


def without_weights(name: str, source: Source) -> nn.Module:
    """The model on device "meta". The names and shapes of weights that are on this machine are checked."""
    with torch.device("meta"), _DropRates():
        if source.file is None:
            return _without_head(source, pretrained=False)
        overlay = {"state_dict": _shapes_of(source.file), "file": None, "source": None, "custom_load": False}
        model = _checked(name, source, overlay)
    model.pretrained_cfg.pop("state_dict", None)
    return model


def _shapes_of(file: str) -> dict[str, torch.Tensor]:
    """Under the names that timm gives them: without "module.", out of what a training script has put around."""
    models = require("timm", "timm").models
    if file.endswith(".safetensors"):
        return models.clean_state_dict(shapes_of([file]))
    return models.load_state_dict(file, device="meta")


class _DropRates(TorchFunctionMode):
    """Of the layers: timm 1.0.20 reads them from a linspace, which needs values on "meta" too."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        on = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(on | (kwargs or {})))


def _checked(name: str, source: Source, overlay: dict[str, Any]) -> nn.Module:
    """With the very head of the checkpoint, as timm skips no key then, and says which do not fit."""
    if source.file is not None and not source.file.endswith(".npz"):
        check_plain(name, [source.file])
    try:
        return _without_head(source, True, num_classes=source.num_classes, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        keys = keys_of_error(error)
        if keys is None:
            raise
    check_keys(name, _without_head(source, pretrained=False), *keys)
    # What is left is of the head, which timm drops, and asks for nothing else, where it has other classes.
    others = {"num_classes": -1, "classifier": ("head", "head_dist")}
    return _without_head(source, True, pretrained_cfg_overlay=overlay | others)


def _without_head(source: Source, pretrained: bool, num_classes: int = 0, **settings: Any) -> nn.Module:
    create = require("timm", "timm").create_model
    model = create(source.architecture, pretrained, num_classes=num_classes, **source.settings, **settings)
    if num_classes:
        model.reset_classifier(0)
    return model.eval()


def _dynamic(timm, name: str) -> dict[str, Any]:
    entry = timm.models.model_entrypoint(name.partition(".")[0])
    return {"dynamic_img_size": True} if entry.__module__.endswith(("vision_transformer", "eva")) else {}
