"""Checks that everything which takes a volume, or writes files, makes before any work."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .hosts import find_adapter
from .hosts.placement import running_place, same_device
from .optional import reason

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def dtype_of(name: str, names: Iterable[str] = tuple(DTYPES)) -> torch.dtype:
    """torch's dtype by its short name. Raises ValueError unless it is one of `names`."""
    check_one_of(name, names, "dtype")
    return DTYPES[name]


def check_one_of(value: Any, names: Iterable[str], argument: str) -> None:
    """Raises ValueError for an argument that is not one of these names."""
    if value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {value!r}")


def parse_shape(text: str) -> tuple[int, int, int, int, int]:
    """(B, 3, D, height, width) of "BxDxS" (slices of S x S pixels) or "BxDxHxW". ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise ValueError(f"volume must be like 1x32x256 (batch x slices x pixels) or 1x32x256x192, got {text!r}")
    numbers = [int(part) for part in text.split("x")]
    return numbers[0], 3, numbers[1], numbers[2], numbers[-1]


def with_channels(
    shape: tuple[int, ...],  # (B, 3, D, height, width)
    model: nn.Module,
) -> tuple[int, ...]:  # (B, channels, D, height, width)
    """The shape of a volume for a model, which may have other than three channels."""
    return shape[0], find_adapter(model)(model).in_channels, *shape[2:]


def check_volume(
    volume: Tensor,  # (B, channels, D, height, width), pixels
    channels: int,
    model: nn.Module,
    name: str = "volume",
) -> None:
    """Refuses what a model cannot take as a volume. `name` is that of the argument.

    Device and dtype are those of the first parameter when its module runs, wherever it is kept until then.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank or channels, an empty volume, or another device or dtype than the model's.
    """
    if not isinstance(volume, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(volume).__name__}")
    if not volume.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {volume.dtype}")
    if volume.ndim != 5 or volume.shape[1] != channels:
        many = "three" if channels == 3 else channels
        raise ValueError(
            f"{name} must have shape (B, {channels}, D, height, width), got {tuple(volume.shape)}"
            + (f"; repeat the one channel of a scan to {many}" if volume.ndim == 5 and volume.shape[1] == 1 else "")
        )
    if volume.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(volume.shape)}")
    device, dtype = running_place(model) or (volume.device, volume.dtype)
    if not same_device(volume.device, device):
        raise ValueError(f"{name} must be on the model's device, {device}, got {volume.device}")
    if volume.dtype != dtype and not _autocast_casts(volume.device, volume.dtype, dtype):
        raise ValueError(f"{name} must have the model's dtype, {dtype}, got {volume.dtype}")


def check_folder(path: Path, files: tuple[str, ...] = ()) -> None:
    """Refuses what cannot be a folder to write to: a file, or a new name that looks like one's.

    The name of a file is taken to end in a dot and a word, ``out.h5``, that begins with a letter: ``run.2`` may be a
    folder. One that is there may be called anything.

    Args:
        path: that somebody gave as `out`.
        files: suffixes that `out` could have instead.

    Raises ValueError.
    """
    expected = "out must be a folder" + (f" or end in {', '.join(files)}" if files else "")
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{expected}, got the file {path}")
    if re.fullmatch(r"\.[a-zA-Z][a-zA-Z0-9]*", path.suffix) or path.name.lower() in files:
        raise ValueError(f"{expected}, got {path}; a new folder whose name ends like a file's must be made before")


def usable_device(name: str | torch.device, argument: str = "device") -> torch.device:
    """torch's device of this name, "auto" CUDA where there is one; `argument` is what the caller calls it.

    Raises ValueError for one that cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.device(name)
            torch.ones(1, device=found).item()  # meta has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{argument} must be 'auto' or one that torch can use here, got {str(name)!r}: {reason(error)}"
        ) from error
    return found


def plain(volume: Any) -> Any:
    """A tensor of a class that only watches torch's functions, such as MONAI's MetaTensor, as a plain one.

    Its affine is not that of features. Anything else is itself.
    """
    if type(volume) is Tensor or not isinstance(volume, Tensor):
        return volume
    return volume if type(volume).__torch_dispatch__ is not Tensor.__torch_dispatch__ else volume.as_subclass(Tensor)


def check_others(others: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments of a 2D model's forward, and says what does their work for volumes."""
    if not others:
        return
    name = next(iter(others))
    advice = {
        "output_attentions": "attention_maps(volume, layers) gives attention, on the plane of each layer",
        "output_hidden_states": "intermediate(volume, layers) gives the features of layers",
        "pixel_values": "its argument is a volume (B, channels, D, height, width), called volume",
        "return_dict": "it returns VolumeFeatures",
    }
    instead = advice.get(name, "settings are those of lift")
    raise TypeError(f"a lifted model takes a volume alone, got {name}; {instead}")


def _autocast_casts(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether autocast is on and makes these dtypes equal; it leaves float64 alone."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return on and torch.float64 not in dtypes


def wanted_layers(n: int | Sequence[int], count: int, name: str = "n") -> set[int]:
    """Indices of layers of a model that has `count` of them.

    Args:
        n: how many of the last layers, or the indices of layers (negative ones count from the end).
        name: that of the argument.

    Raises:
        TypeError: neither a number nor a sequence of them.
        ValueError: layers that the model lacks, or none at all.
    """
    if _is_index(n):
        if not 1 <= n <= count:
            raise ValueError(f"{name} must be between 1 and the model's {count} layers, got {n}")
        return set(range(count - n, count))
    listed = list(n) if isinstance(n, Iterable) and not isinstance(n, (str, bytes)) else [n]
    if not all(_is_index(i) for i in listed):
        raise TypeError(f"{name} must be a number of layers or a sequence of indices, got {n!r}")
    indices = [int(i) for i in listed]
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"{name} must hold indices of the model's {count} layers, got {indices}")
    return {i % count for i in indices}


def _is_index(n: Any) -> TypeGuard[int]:
    return hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) and getattr(n, "ndim", 0) == 0
