"""Mean and deviation of the pixels that a model was trained on: preprocessor_config.json, and timm's, whole or refused.

Our images are in [0, 1], black to white. transformers' image processors take 8 bits, 0 to 255: white times
`rescale_factor`, where `do_rescale` is true, less `image_mean` and by `image_std`, where `do_normalize` is. All of
that is one mean and one deviation of ours: ``(image - mean) / std``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from . import lora
from .hub import hub_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # mean and std of the DINOv3 sat493m models
FILES = ("preprocessor_config.json", "processor_config.json")  # the second where a model has other processors too
# What true does to a picture that is a slice already, of equal channels: nothing, or its size, which is the scan's.
_OF_PICTURES = ("do_convert_rgb", "do_convert_grayscale", "do_flip_channel_order", "do_grayscale", "do_reduce_labels")
_OF_SIZE = ("do_resize", "do_center_crop", "do_crop", "do_pad", "do_thumbnail", "do_align_long_axis")
_KNOWN = {"do_rescale", "do_normalize", *_OF_PICTURES, *_OF_SIZE}
CONTRAST = (0.05, 100.0)  # from black to white in deviations: ImageNet's is 4.4, in another unit 0.02 or 1,000

Values = tuple[float, ...]  # one number per channel


def normalisation_by_name(model: nn.Module, name: str, channels: int = 3) -> tuple[Values, Values]:
    """Mean and deviation, per channel, of the images in [0, 1] that a model of `load_model` was trained on.

    timm keeps them in the model's configuration, Hugging Face in a file beside the weights (`FILES`). Without either
    they are ImageNet's, as for all DINO models but those trained on satellite images (sat493m). Statistics of one value
    are those of all channels. A model of other than three channels, where nothing but statistics of three is known
    (ImageNet's, or timm's of the architecture), takes their mean in every channel.

    Args:
        model: of `load_model`.
        name: as `load_model` takes it.
        channels: of the model's images.

    Raises ValueError for a file that is no JSON, and for what in it is not followed, by name.
    """
    if (config := getattr(model, "pretrained_cfg", None)) is not None:
        source = f"the pretrained_cfg of model {name}"
        mean, std = _values(config, "mean", source), _values(config, "std", source)
        if mean is not None and std is not None:
            if (config.get("input_size") or (3,))[0] == 3 == len(mean) == len(std) != channels:
                mean, std = _grey(mean, channels), _grey(std, channels)
            return _checked(mean, std, channels, 1.0, source)
    elif (file := preprocessor_file(name)) is not None:
        return _followed(_settings(file), channels, str(file))
    mean, std = SATELLITE if "sat493m" in name else (IMAGENET_MEAN, IMAGENET_STD)
    return (mean, std) if channels == 3 else (_grey(mean, channels), _grey(std, channels))


def normalisation_of(host: nn.Module, channels: int = 3) -> tuple[Values, Values]:
    """`normalisation_by_name` of a model in memory: by what timm keeps in it, or by the name that it was loaded by.

    DINO models by themselves have ImageNet's. Raises ValueError for others that do not say what theirs are.
    """
    name = getattr(host, "name_or_path", None)  # of transformers and `load_model`
    name = name if isinstance(name, str) and name else type(host).__name__
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"mean and std must be given: folder {name}, beside whose weights they were, is there no more")
    known = getattr(host, "pretrained_cfg", None) is not None or "dino" in type(host).__name__.lower()
    if not known and preprocessor_file(name) is None:
        raise ValueError(f"mean and std must be given for a {type(host).__name__}, which does not say what they are")
    return normalisation_by_name(host, name, channels)


def preprocessor_file(name: str) -> Path | None:
    """The file that says how pictures become a model's input: in its folder, the cache or the hub.

    An adapter's, where it has none of its own, is that of the model that it is for.
    """
    if found := hub_file(name, *FILES) if Path(name).is_dir() or "/" in name else None:
        return Path(found)
    return preprocessor_file(lora.base_of(name)) if lora.is_adapter(name) else None


def _settings(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be readable JSON, got: {error}") from error
    if isinstance(read, dict) and file.name == FILES[1]:
        read = read.get("image_processor", read)
    if not isinstance(read, dict):
        raise ValueError(f"{file} must hold an object of settings, got {read!r:.60}")
    return read


def _followed(settings: dict[str, Any], channels: int, source: str) -> tuple[Values, Values]:
    flags = {key: value for key, value in settings.items() if key.startswith("do_")}
    for key, value in flags.items():
        if not isinstance(value, bool) and value is not None:  # null is false, as transformers has it
            raise ValueError(f"{source}: {key} must be true or false, got {value!r}")
    unknown = [key for key, value in flags.items() if value and key not in _KNOWN]
    unknown += [key for key in ("offset", "rescale_offset") if settings.get(key)]
    if unknown:
        raise ValueError(f"{source}: {', '.join(unknown)} must be false or left out: it is not supported here")
    white = 255.0
    if flags.get("do_rescale", True):
        white *= _number(settings.get("rescale_factor", 1 / 255), f"{source}: rescale_factor", above=0)
    if not flags.get("do_normalize", True):
        return (0.0,) * channels, (1 / white,) * channels
    mean, std = _values(settings, "image_mean", source), _values(settings, "image_std", source)
    if mean is None or std is None:
        raise ValueError(f"{source}: image_mean and image_std must both be given, or do_normalize be false")
    return _checked(mean, std, channels, white, source)


def _values(config: dict[str, Any], key: str, source: str) -> Values | None:
    """A number or a list of them; None where there is none."""
    value, what = config.get(key), f"{source}: {key}"
    if value is None:
        return None
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if not listed:
        raise ValueError(f"{what} must be a number, or one per channel, got {value!r}")
    return tuple(_number(each, what, above=0 if key.endswith("std") else None) for each in listed)


def _number(value: Any, what: str, above: float | None = None) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above is not None and value <= above):
        kind = "a finite number" if above is None else f"a finite number above {above}"
        raise ValueError(f"{what} must be {kind}, got {value!r}")
    return float(value)


def _checked(mean: Values, std: Values, channels: int, white: float, source: str) -> tuple[Values, Values]:
    """For pixels from 0 to `white`; of ours, from 0 to 1. Refuses statistics that are of another unit."""
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{source}: the {key} must have one value or one for each of the model's {channels} channels, "
                f"got {len(values)}"
            )
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    contrast = [white / s for s in std]
    if not (CONTRAST[0] <= min(contrast) and max(contrast) <= CONTRAST[1]):
        raise ValueError(
            f"{source}: mean and std must be of pixels from 0 to {white:g}, which do_rescale and rescale_factor leave, "
            f"got {mean} and {std}: black and white are {min(contrast):.3g} to {max(contrast):.3g} deviations apart"
        )
    return tuple(m / white for m in mean), tuple(s / white for s in std)


def _grey(values: Values, channels: int) -> Values:
    return (sum(values) / len(values),) * channels
