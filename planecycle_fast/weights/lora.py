"""Folders of PEFT: an adapter, LoRA for example, and the name of the model that it is for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..optional import in_words, require
from .loaded_keys import by_design

CONFIG = "adapter_config.json"
ROOT = "base_model.model."  # of every key of an adapter


def is_adapter(folder: str) -> bool:
    """Whether PEFT, or transformers with it, wrote this folder."""
    return Path(folder, CONFIG).is_file()


def base_of(folder: str) -> str:
    """The name of the model that an adapter is for, as `load.load_model` takes it; a folder of this name is here or
    beside the adapter's. Raises ValueError for none.
    """
    file = Path(folder, CONFIG)
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} must be readable JSON, got: {error}") from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file} must name the model that it is for as base_model_name_or_path, got {name!r}")
    beside = Path(folder).parent / name
    return str(beside) if beside.is_dir() and not Path(name).is_dir() else name


def merged(base: nn.Module, folder: str) -> nn.Module:
    """The base model with the adapter's changes in its weights, which are float32 then at least.

    Raises:
        MissingPackageError: PEFT is not installed.
        ValueError: an adapter that is not this model's, or of a kind that does not change weights.
    """
    peft = require("peft", "lora")
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    base = base.to(torch.promote_types(dtype, torch.float32))  # 16 bits would round what is merged
    with in_words(f"adapter {folder} cannot be put into its model", MemoryError):
        config = peft.PeftConfig.from_pretrained(folder)
        given = set(peft.utils.load_peft_weights(folder, device="cpu"))
        within = _within(base, given)
        whole = nn.ModuleDict({within: base}) if within else base  # modules have the names that the adapter has
        names = [name for name, _ in whole.named_modules()]
        config.modules_to_save = [
            save for save in config.modules_to_save or () if any([f".{name}".endswith(f".{save}") for name in names])
        ] or None  # not of a head
        model = peft.PeftModel(whole, config)
        model.load_adapter(folder, model.active_adapter)
        if not isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
            raise ValueError(f"{config.peft_type.value} changes no weights")
        asked = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        changed = model.merge_and_unload(safe_merge=True)
    own = f"{ROOT}{within}." if within else ROOT
    may_lack, may_have = (tuple(start + key for key in keys) for start, keys in zip((own, ROOT), by_design(base)))
    lacking = sorted(key for key in asked - given if not key.startswith(may_lack))
    unknown = sorted(key for key in given - asked if not key.startswith(may_have))
    if lost := lacking + unknown:
        raise ValueError(
            f"adapter {folder} must have the weights that its model and configuration ask for, got "
            f"{len(lacking)} lacking and {len(unknown)} unknown, {', '.join(lost[:3])}"
        )
    changed = changed[within] if within else changed
    return changed.eval()


def _within(base: nn.Module, keys: Iterable[str]) -> str:
    """Name of the base model in the one with a head that was adapted; "" for the base model itself."""
    name = getattr(base, "base_model_prefix", "")
    if not name or name in dict(base.named_children()):
        return ""
    return name if any([key.startswith(f"{ROOT}{name}.") for key in keys]) else ""
