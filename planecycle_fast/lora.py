"""Folders of PEFT: an adapter, LoRA for example, and the name of the model that it is for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import nn

from .optional import require

CONFIG = "adapter_config.json"


def is_adapter(folder: str) -> bool:
    """Whether PEFT, or transformers with it, wrote this folder."""
    return Path(folder, CONFIG).is_file()


def base_of(folder: str) -> str:
    """The name of the model that an adapter is for, as `models.load_model` takes it; a folder of this name is here or
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
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is refused below
            model = peft.PeftModel(base, config)
            found = model.load_adapter(folder, model.active_adapter)
        if not isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
            raise ValueError(f"{config.peft_type.value} changes no weights")
        changed = model.merge_and_unload(safe_merge=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"adapter {folder} cannot be put into its model: {' '.join(str(error).split())}") from error
    if lost := [*found.missing_keys, *found.unexpected_keys]:
        raise ValueError(
            f"adapter {folder} must have the weights that its model and configuration ask for, got "
            f"{len(found.missing_keys)} lacking and {len(found.unexpected_keys)} unknown, {', '.join(lost[:3])}"
        )
    return changed.eval()
