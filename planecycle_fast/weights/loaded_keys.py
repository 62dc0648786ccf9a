"""Whether the weights of a checkpoint are the model's: what lacks, is left over, or is not finite is refused.

Loaders of Hugging Face and timm leave at random what a checkpoint lacks, and run on. `load.load_model` looks at what
they report; whoever calls them without it can do the same, by `check_keys`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..hosts import supported_parts
from ..optional import require
from .checkpoint_keys import naming

# By family, Hugging Face's model_type or "timm": what a checkpoint may lack, and what it may have more than the model,
# as beginnings of keys. Inference uses none of it: a mask is for training, a pooler comes after our features.
_MASK, _HEADS = "embeddings.mask_token", ("classifier.", "head.")
BY_DESIGN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dinov2": ((_MASK,), (_MASK, *_HEADS)),
    "dinov2_with_registers": ((_MASK,), (_MASK, *_HEADS)),
    "dinov3_vit": ((_MASK,), (_MASK, *_HEADS)),
    "vit": ((_MASK, "pooler."), (_MASK, "pooler.", "decoder.", *_HEADS)),
    "vit_mae": ((), ("decoder.", *_HEADS)),
    "ijepa": ((_MASK, "pooler."), (_MASK, "pooler.", *_HEADS)),
    "clip_vision_model": ((), ("visual_projection.", *_HEADS)),
    "timm": (("head.",), ("mask_token", "head.", "head_dist.")),
}
_OTHERS = ((), _HEADS)
_NAMED = 3  # of each kind, in a message


def check_keys(
    name: str, model: nn.Module, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple] = ()
) -> None:
    """Refuses a checkpoint that is not the model's, but for what `BY_DESIGN` lists, and for what its `part_of` is not.

    Args:
        name: of the model, for the message.
        model: as it was loaded.
        missing, unexpected: keys, as torch's `load_state_dict` or transformers' ``output_loading_info=True`` return.
        mismatched: (key, the checkpoint's shape, the model's shape).

    Raises ValueError with how many, the first few, and what may help.
    """
    part = part_of(model)
    may_lack, may_have = by_design(model.get_submodule(part))
    inner = f"{part}." if part else ""
    within = f"{getattr(model, 'base_model_prefix', '')}."  # of a model with a head, in which this one is the backbone
    needed = [key.removeprefix(inner) for key in missing if key.startswith(inner)]
    missing = _sorted(inner + key for key in needed if not key.startswith(may_lack))
    may_have_here = tuple(start + key for start in ("", inner) for key in may_have)
    unexpected = _sorted(key for key in unexpected if not key.removeprefix(within).startswith(may_have_here))
    mismatched = sorted((str(key), tuple(given), tuple(wanted)) for key, given, wanted in mismatched)
    shapes = [f"{key} {given} for {wanted}" for key, given, wanted in mismatched]
    found = [
        f"{what} {len(keys)} ({', '.join(keys[:_NAMED])}{', ...' if len(keys) > _NAMED else ''})"
        for what, keys in (("lacking", missing), ("with unknown", unexpected), ("with other shapes for", shapes))
        if keys
    ]
    if found:
        raise ValueError(
            f"model {name} must have the weights of a {type(model).__name__}, got a checkpoint "
            f"{' and '.join(found)}{_hint(missing, unexpected, model)}"
        )


def part_of(model: nn.Module) -> str:
    """Name of the part that is lifted: the one supported model inside, of CLIP's two the image's. "" for the model."""
    parts = supported_parts(model)
    return parts[0] if len(parts) == 1 else ""


def check_finite(name: str, model: nn.Module) -> None:
    """Raises ValueError, naming the first tensor, where weights or buffers are not finite."""
    bad = {}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad[key] = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values of {key} ({tensor.dtype})"
    if bad:
        where = next(iter(bad.values())) + (f" and in {len(bad) - 1} more tensors" if len(bad) > 1 else "")
        raise ValueError(f"model {name} must have finite weights, got NaN or infinity in {where}")


def keys_of_error(error: RuntimeError) -> tuple[list[str], list[str], list[tuple]] | None:
    """Missing, unexpected and mismatched keys of a strict `load_state_dict`, out of its error; None: another error."""
    text = str(error)
    if "Error(s) in loading state_dict" not in text:
        return None
    missing, unexpected = [
        re.findall(r'"([^"]+)"', " ".join(re.findall(rf"{kind} key\(s\) in state_dict: (.*)", text)))
        for kind in ("Missing", "Unexpected")
    ]
    shape = r"torch\.Size\(\[([\d, ]*)\]\)"
    found = re.findall(rf"size mismatch for (\S+): copying a param with shape {shape}.*?is {shape}", text)
    sizes = [(key, *[tuple(int(n) for n in s.split(",") if n.strip()) for s in both]) for key, *both in found]
    return missing, unexpected, sizes


def shapes_of(files: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the names and shapes of weights in files, .safetensors or of torch.save, that take no memory.

    Raises whatever their libraries raise for files that are damaged.
    """
    return {key: torch.zeros((), device="cpu").expand(shape) for key, shape, _ in _headers(files)}


def check_plain(name: str, files: Iterable[str]) -> None:
    """Raises ValueError for weights of 8 bits and less, which loaders cast in silence: their scales are elsewhere.

    Args:
        name: of the model, for the message.
        files: as `shapes_of` takes them; not of a model whose configuration says how it was quantised.
    """
    quantised = [f"{key} ({dtype})" for key, shape, dtype in _headers(files) if len(shape) > 1 and _is_narrow(dtype)]
    if quantised:
        raise ValueError(
            f"model {name} must have weights of 16 bits or more, or a configuration that says how they were quantised, "
            f"got {quantised[0]}{f' and {len(quantised) - 1} more' if len(quantised) > 1 else ''}"
        )


def _headers(files: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each tensor, as torch or safetensors calls it; values are not read."""
    for file in files:
        if str(file).endswith(".safetensors"):
            with require("safetensors", "hf").safe_open(file, framework="pt") as opened:
                for key in list(opened.keys()):
                    part = opened.get_slice(key)
                    yield key, tuple(part.get_shape()), str(part.get_dtype())
        else:
            read = torch.load(file, map_location="meta", weights_only=True)
            for key, tensor in read.items():
                if isinstance(tensor, Tensor):
                    yield key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _is_narrow(dtype: str) -> bool:
    """Of `_headers`: integers and floats of 8 bits or less, but for booleans."""
    return re.match(r"(?i)(u?int|i|u|float|f)[1-8](_|$|e)", dtype) is not None


def by_design(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a checkpoint may lack, and may have more than a model: beginnings of keys."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__module__.split(".")[0]
    return BY_DESIGN.get(family, _OTHERS)


def _sorted(keys: Iterable[str]) -> list[str]:
    """With numbers in their order: layer 2 before layer 10."""
    return sorted(keys, key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)])


def _hint(missing: list[str], unexpected: list[str], model: nn.Module) -> str:
    wanted = set(missing)
    # A key of the model at the end of one of the checkpoint: what comes before it may come before all.
    parts = [(key, key.split(".")) for key in unexpected]
    ends = [".".join(ps[:i]) + "." for _, ps in parts for i in range(1, len(ps)) if ".".join(ps[i:]) in wanted]
    if ends:
        prefix, count = Counter(ends).most_common(1)[0]
        if 2 * count >= len(missing):
            return f"; strip the prefix {prefix!r} from its keys"
    shared = os.path.commonpath([key.replace(".", "/") for key in unexpected]) if unexpected else ""
    for prefix in ("", shared.replace("/", ".") + "."):
        theirs = naming({key.removeprefix(prefix): None for key in unexpected})
        if theirs not in (None, naming(model.state_dict())):
            given = f", prefix={prefix!r}" if prefix else ""
            convert = f"pcf.convert_state_dict(weights, model=model{given})"
            return f"; its keys are those of {theirs}: {convert} makes them the model's"
    return ""
