"""Writing a lifted model to a folder: the 2D model as its own library writes it, the settings of the lift beside it.

The folder is still one of the 2D model's (`AutoModel.from_pretrained`, timm's ``local-dir:``); `SETTINGS` is a file of
its own, as what is added to a library's config.json is lost when that library writes it again. Backend, attention and
`strict` are about the machine, and not recorded. `pretrained` reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..geometry.planes import DEFAULT_CYCLE
from ..hosts import find_adapter
from ..hosts.wrapped import own_class
from ..optional import in_words, require
from ..version import __version__
from .hub import WEIGHTS
from .load import model_without_weights, quiet
from .loaded_keys import check_finite
from .normalisation import preprocessor_file

SETTINGS = "planecycle.json"
DEFAULTS: dict[str, Any] = {  # of `lift`
    "mode": "planecycle",
    "cycle_order": DEFAULT_CYCLE,
    "pool_method": "PCg",
    "globals_at": "depth",
    "depth_position": "none",
    "gelu": "exact",
}
_OF_WEIGHTS = (*WEIGHTS, "model-*.safetensors", "pytorch_model-*.bin")  # with shards
# What may differ between a model of timm's and the one that its folder gives: heads, how it runs, what it drops.
_MAY_DIFFER = {"training", "grad_checkpointing", "fused_attn", "num_classes", "dynamic_img_size", "strict_img_size"}
_MAY_DIFFER |= {"flatten", "output_fmt", "drop_prob", "p", "inplace", "global_pool"}


def save_pretrained(lifted: nn.Module, folder: str | os.PathLike, **options: Any) -> None:
    """Writes the 2D model as its library does, `SETTINGS`, and the preprocessor_config.json it was loaded with.

    Everything is written to a hidden folder within it first, and looked at: what would not come back as this model is
    refused. Then files take their places one by one, each as a whole; files of weights that were there before and are
    not written again go. Other files of the folder stay.

    Args:
        lifted: a `LiftedModel` of a Hugging Face or timm model.
        folder: made if it is not there.
        options: for the library's own `save_pretrained`, or `save_for_hf`: ``max_shard_size``, ``state_dict``,
            ``model_args`` (timm's, for what it does not know that the model was built with). Where a ``state_dict`` is
            given, be it None as transformers' Trainer does, Hugging Face's files have the keys of `state_dict` and not
            those of the hub, by which older versions of transformers read them (``save_original_format=True``).

    Raises:
        TypeError: options that the library does not take.
        ValueError: a model of neither library, or whose weights are not its own (LoRA, quantised, sharded, compiled)
            or not of the class that the folder gives, or a folder that cannot be one of a model.
        OSError: files cannot be written.
    """
    host = lifted.adapter.model
    write, folder = _writer(host, options), _checked_folder(folder)
    if not options.get("is_main_process", True):
        return
    part, is_new = folder / f".{os.getpid()}.part", not folder.exists()  # its place may be a file system of its own
    try:
        part.mkdir(parents=True)
        with in_words("model cannot be saved by its library", OSError, TypeError):
            write(part)
        if not any([(part / file).is_file() for file in WEIGHTS]):
            raise ValueError(f"options must not give files of weights other names than {', '.join(WEIGHTS)}")
        _check_comes_back(host, part)
        kept = _preprocessor(host)
        if kept is not None:
            shutil.copyfile(kept, part / kept.name)
        (part / SETTINGS).write_text(json.dumps(_described(lifted), indent=2) + "\n", encoding="utf-8")
        written = sorted(part.iterdir(), key=lambda file: file.name == SETTINGS)  # that one last
        for file in written:
            if (folder / file.name).is_dir():
                raise ValueError(f"folder must not hold a folder in place of a file, got {folder / file.name}")
        for file in written:
            os.replace(file, folder / file.name)
        is_new = False
        names = {file.name for file in written}
        for old in [old for pattern in _OF_WEIGHTS for old in folder.glob(pattern) if old.name not in names]:
            old.unlink()
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new and folder.exists():
            folder.rmdir()


def _preprocessor(host: nn.Module) -> Path | None:
    """What says how pictures become its input, where it was loaded from. timm's models keep that in config.json."""
    source = getattr(host, "name_or_path", None) or ""
    known = Path(source).is_dir() if source else False
    return preprocessor_file(source) if known or (source.count("/") == 1 and source[0] not in "./~") else None


def _described(lifted: nn.Module) -> dict[str, Any]:
    """The settings that a lift has: in other modes than planecycle only the mode is one."""
    names = [*DEFAULTS] if lifted.mode == "planecycle" else ["mode", "depth_position", "gelu"]
    if lifted.gelu == DEFAULTS["gelu"]:  # older versions read what does not say it
        names.remove("gelu")
    described = {"planecycle_fast": __version__} | {name: getattr(lifted, name) for name in names}
    adapter = type(lifted.adapter)
    with suppress(ValueError):  # of no known class
        if find_adapter(lifted.adapter.model) is adapter:
            return described
    return described | {"adapter": adapter.__name__}


def _writer(host: nn.Module, options: dict[str, Any]) -> Callable[[Path], None]:
    """What writes the weights and the configuration of a model. Raises ValueError where nothing can."""
    if options.get("push_to_hub"):
        raise ValueError("push_to_hub must be left out: upload the folder when it is written, by huggingface_hub")
    adapted = next((name for name, m in host.named_modules() if type(m).__module__.startswith("peft.")), None)
    if adapted is not None:
        raise ValueError(
            f"model must have weights of its own to be saved, got an adapter of PEFT at {adapted}: merge it first "
            "(merge_and_unload), or let PEFT save it"
        )
    if "state_dict" not in options:
        for name, tensor in host.named_parameters():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"model must have plain weights to be saved, got {type(tensor).__name__} at {name}: quantise after "
                    "loading; gather what is sharded and give it as state_dict (Hugging Face)"
                )
        if not any([tensor.is_meta for tensor in host.parameters()]):  # nor offloaded
            check_finite("to be saved", host)
    packages = [cls.__module__.split(".")[0] for cls in type(host).__mro__]
    if "transformers" in packages and hasattr(host, "save_pretrained"):
        if "state_dict" in options:  # under its own keys: Trainer gives it, and resumes by `load_state_dict`
            options = {"save_original_format": False} | options

        def write(folder: Path) -> None:
            with quiet(require("transformers", "hf")):
                host.save_pretrained(folder, **options)

        return write
    if "timm" in packages and hasattr(host, "pretrained_cfg"):
        rest = {name: value for name, value in options.items() if name != "is_main_process"}
        return partial(require("timm", "timm").models.save_for_hf, host, **({"safe_serialization": True} | rest))
    raise ValueError(
        f"model must be of Hugging Face or timm to be saved as a folder, got {type(host).__name__}: save "
        "lifted.state_dict() by safetensors, and load it into a model that your own code builds and lifts"
    )


def _checked_folder(given: str | os.PathLike) -> Path:
    if not os.fspath(given):
        raise ValueError("folder must be one, or new, got no name")
    folder = Path(os.path.abspath(given))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be one, or new, got the file {folder}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"folder must not hold an adapter of PEFT, which would be taken for the model, got {folder}")
    return folder


def _check_comes_back(host: nn.Module, folder: Path) -> None:
    """Raises ValueError unless a folder gives this model: its class, its weights, of timm's what it was built with."""
    advice = "save lifted.state_dict() instead"
    try:
        back = model_without_weights(str(folder))
    except ValueError as error:
        text = str(error).replace(str(folder), "written")
        raise ValueError(f"model must come back from a folder to be saved: {text}; {advice}") from error
    if own_class(back).__name__ != own_class(host).__name__:
        raise ValueError(
            f"model must come back from a folder to be saved, got a {own_class(host).__name__}, whose folder gives a "
            f"{own_class(back).__name__}; {advice}"
        )
    if not hasattr(host, "pretrained_cfg"):  # its configuration is whole
        return
    found = dict(back.named_modules())
    for name, module in host.named_modules():
        if name.startswith("head"):
            continue
        other = found.get(name)
        if own_class(other) is not own_class(module):
            difference = f"{name} is a {own_class(module).__name__}, there a {own_class(other).__name__}"
        else:
            difference = next(_differences(name, module, other), None)
        if difference is not None:
            raise ValueError(
                f"model must come back from a folder to be saved, got one that timm builds otherwise: {difference}; "
                "give save_pretrained the model_args that it was created with, such as dict(depth=3)"
            )


def _differences(name: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
    for key, value in vars(module).items():
        known = key.startswith("_") or key in _MAY_DIFFER
        if not known and isinstance(value, (int, float, str)) and (there := getattr(other, key, None)) != value:
            yield f"{name}.{key}".lstrip(".") + f" is {value!r}, there {there!r}"
