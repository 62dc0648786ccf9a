"""A lifted model in a folder: the 2D model as its own library writes it, and the settings of the lift beside it.

The folder is still one of the 2D model's (`AutoModel.from_pretrained`, timm's ``local-dir:``); `SETTINGS` is a file of
its own, as what is added to a library's config.json is lost when that library writes it again. Backend, attention and
`strict` are about the machine, and not recorded.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from .geometry.planes import DEFAULT_CYCLE, Plane
from .hosts import Adapter, find_adapter
from .hosts.wrapped import own_class
from .lifting import check_names, lift
from .optional import require
from .version import __version__
from .weights.hub import WEIGHTS, hub_file
from .weights.load import load_model, model_without_weights, quiet
from .weights.loaded_keys import check_finite
from .weights.normalisation import preprocessor_file

if TYPE_CHECKING:
    from .lifted import LiftedModel

SETTINGS = "planecycle.json"
DEFAULTS: dict[str, Any] = {  # of `lift`
    "mode": "planecycle",
    "cycle_order": DEFAULT_CYCLE,
    "pool_method": "PCg",
    "globals_at": "depth",
    "depth_position": "none",
}
_OF_WEIGHTS = (*WEIGHTS, "model-*.safetensors", "pytorch_model-*.bin")  # with shards
# What may differ between a model of timm's and the one that its folder gives: heads, how it runs, what it drops.
_MAY_DIFFER = {"training", "grad_checkpointing", "fused_attn", "num_classes", "dynamic_img_size", "strict_img_size"}
_MAY_DIFFER |= {"flatten", "output_fmt", "drop_prob", "p", "inplace", "global_pool"}


def from_pretrained(
    name: str | os.PathLike[str],
    mode: str | None = None,
    cycle_order: str | Sequence[str | Plane] | None = None,
    pool_method: str | None = None,
    globals_at: str | None = None,
    backend: str = "auto",
    attention: str = "auto",
    strict: bool = True,
    adapter: Callable[[nn.Module], Adapter] | None = None,
    depth_position: str | None = None,
    random_weights: bool = False,
) -> LiftedModel:
    """`lift` of `load_model`, with the settings that `LiftedModel.save_pretrained` recorded, where it did.

    Args:
        name: a folder or a name, as `load_model` takes it.
        mode, cycle_order, pool_method, globals_at, depth_position: as of `lift`; None: what is recorded, or else its
            default.
        backend, attention, strict, adapter: as of `lift`.
        random_weights: take a model whose weights cannot be found, with random ones.

    Raises whatever `load_model` and `lift` raise, and ValueError for weights that cannot be found, unless
    `random_weights`; for a damaged file of settings; and for a model that was lifted by an adapter which is not given.
    """
    name = os.fspath(name)
    host, note = load_model(name)
    if note.startswith("RANDOM") and not random_weights:
        raise ValueError(f"model {name} must have weights, got {note}; random_weights=True takes it anyway")
    given = dict(mode=mode, cycle_order=cycle_order, pool_method=pool_method, globals_at=globals_at)
    settings = settings_of(name, **given, depth_position=depth_position, has_adapter=adapter is not None)
    return lift(host, **settings, backend=backend, attention=attention, strict=strict, adapter=adapter)


def settings_of(name: str, has_adapter: bool = False, **given: Any) -> dict[str, Any]:
    """Arguments of `lift` for a model by name: those given (not None), else those recorded, else its defaults.

    Raises ValueError for a damaged file of settings, and for one of a model that was lifted by an adapter of its own.
    """
    file: str | Path | None
    if Path(name).is_dir():
        file = Path(name, SETTINGS) if Path(name, SETTINGS).exists() else None
    else:
        file = hub_file(name, SETTINGS) if name.count("/") == 1 and not name.startswith("timm/") else None
    recorded = {} if file is None else _recorded(name, Path(file))
    adapter = recorded.pop("adapter", None)
    if adapter is not None and not has_adapter:
        raise ValueError(
            f"model {name} was lifted by an adapter of its own, {adapter}; give it: from_pretrained(name, adapter=...)"
        )
    return DEFAULTS | recorded | {key: value for key, value in given.items() if value is not None}


def _recorded(name: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} must have settings as JSON in {file}: {error}") from error
    found = found if isinstance(found, dict) else {"": found}
    found.pop("planecycle_fast", None)
    for key, value in found.items():
        if key not in (*DEFAULTS, "adapter"):
            raise ValueError(
                f"model {name} must have settings of a lift in {file}, {', '.join(DEFAULTS)}, got "
                f"{key or found[key]!r}; a newer version of planecycle_fast may have written it"
            )
        planes = key == "cycle_order" and isinstance(value, list)
        if not all([isinstance(each, str) for each in (value if planes else [value])]):
            raise ValueError(f"model {name} must have a name as {key} in {file}, got {value!r}")
    if "cycle_order" in found and not isinstance(found["cycle_order"], str):
        found["cycle_order"] = tuple(found["cycle_order"])
    try:
        check_names(**{name: found.get(name, default) for name, default in DEFAULTS.items()})
    except ValueError as error:
        raise ValueError(f"model {name} must have settings of a lift in {file}: {error}") from error
    return found


def save_pretrained(lifted: LiftedModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """Writes the 2D model as its library does, `SETTINGS`, and the preprocessor_config.json it was loaded with.

    Everything is written to a hidden folder within it first, and looked at: what would not come back as this model is
    refused. Then files take their places one by one, each as a whole; files of weights that were there before and are
    not written again go. Other files of the folder stay.

    Args:
        lifted: of a Hugging Face or timm model.
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
        _in_words(write, part)
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


def _described(lifted: LiftedModel) -> dict[str, Any]:
    """The settings that a lift has: in other modes than planecycle only the mode is one."""
    names = DEFAULTS if lifted.mode == "planecycle" else ("mode", "depth_position")
    described = {"planecycle_fast": __version__} | {name: getattr(lifted, name) for name in names}
    adapter = type(lifted.adapter)
    return described if adapter in _own_adapters(lifted.adapter.model) else described | {"adapter": adapter.__name__}


def _own_adapters(host: nn.Module) -> Iterator[type[Adapter]]:
    try:
        yield find_adapter(host)
    except ValueError:  # of no known class
        return


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
        return lambda folder: _write_quietly(host, folder, options)
    if "timm" in packages and hasattr(host, "pretrained_cfg"):
        rest = {name: value for name, value in options.items() if name != "is_main_process"}
        return lambda folder: require("timm", "timm").models.save_for_hf(
            host, folder, **({"safe_serialization": True} | rest)
        )
    raise ValueError(
        f"model must be of Hugging Face or timm to be saved as a folder, got {type(host).__name__}: save "
        "lifted.state_dict() by safetensors, and load it into a model that your own code builds and lifts"
    )


def _write_quietly(host: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    with quiet(require("transformers", "hf")):
        cast(Any, host).save_pretrained(folder, **options)


def _in_words(write: Callable[[Path], None], folder: Path) -> None:
    """What a library raises when it cannot write a model is a ValueError in one line; OSError and TypeError stay."""
    try:
        write(folder)
    except (OSError, TypeError):
        raise
    except Exception as error:
        text = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise ValueError(f"model cannot be saved by its library: {text}") from error


def _checked_folder(given: str | os.PathLike[str]) -> Path:
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
        difference: str | None
        if other is None:
            difference = f"{name} is a {own_class(module).__name__}, there is none there"
        elif own_class(other) is not own_class(module):
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
