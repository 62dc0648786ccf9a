"""`convert_state_dict`: DINOv3 weights between the keys of its four implementations.

    dinov3       facebookresearch/dinov3:   blocks.0.attn.qkv.weight    storage_tokens
    planecycle   the authors', converted:   blocks.0.blk2d.attn.qkv.weight, blocks.0.rope_embed.periods
    timm         `Eva`:                     blocks.0.attn.q_bias        reg_token
    huggingface  `DINOv3ViTModel`:          layer.0.attention.q_proj.weight, embeddings.register_tokens

Every conversion goes through the keys of dinov3. What inference never uses (`mask_token`,
`local_cls_norm`) is dropped where the target has no place for it; anything else that has none is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..inputs import check_one_of
from .checkpoint_keys import (
    KEPT_BLOCKS,
    PERIODS,
    TRAINING_ONLY,
    effective_bias,
    naming,
    to_dinov3,
    to_huggingface,
    to_planecycle,
    to_timm,
)

TARGETS = ("host", "planecycle")


def convert_state_dict(
    state_dict: Mapping[str, Tensor], to: str = "host", model: nn.Module | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """DINOv3 weights under the keys that another implementation expects.

    A checkpoint fine-tuned with the authors' code loads into a lifted timm, Hugging Face or dinov3
    model, and back::

        lifted.load_state_dict(convert_state_dict(theirs, model=lifted))
        theirs.load_state_dict(convert_state_dict(lifted.state_dict(), to="planecycle", model=theirs))

    Args:
        state_dict: tensors under the keys of any of the four implementations, which are recognised.
        to: "host", the keys of a 2D model; or "planecycle", those of a model that PlaneCycleConverter
            converted.
        model: the model, lifted or not, that is to load the result. Needed where keys are those of timm
            or Hugging Face: for "host" their model, for "planecycle" and weights of theirs a model with
            RoPE periods, which they do not store. Default: the plain keys of dinov3, converted or not.
        prefix: take only keys that begin with it, without it: "backbone." for a backbone in a classifier.

    Returns: tensors of their own memory, contiguous, so that safetensors takes them. A key bias masked
        to nothing becomes none, and the other way round; copies of one RoPE buffer become one. Weights
        do not tell the number of heads: that the models agree on it is seen only where periods are there.

    Raises:
        TypeError: state_dict is no mapping of names to tensors, model no nn.Module, or prefix no string.
        ValueError: an unknown `to`, weights of no DINOv3, or weights that the target cannot hold or lacks.
    """
    check_one_of(to, TARGETS, "to")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {type(prefix).__name__}")
    taken = _checked(state_dict, prefix)
    weights = to_dinov3(taken)
    if model is None:
        if naming(taken) != "dinov3" or (to == "planecycle" and PERIODS not in weights):
            raise ValueError(
                f"model must be given, the one that is to load the result, for weights of {naming(taken)}"
                f"{'' if PERIODS in weights else ' without RoPE periods'}, got None"
            )
        converted = to_planecycle(weights) if to == "planecycle" else weights
    else:
        converted = _for_model(weights, to, model)
    return {key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in converted.items()}


def _for_model(weights: dict[str, Tensor], to: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights under dinov3's keys to exactly the keys of `model`."""
    target, name = model.state_dict(), type(model).__name__
    if (to == "planecycle") != any(".blk2d." in key for key in target):
        state = "whose blocks are converted" if to == "host" else "whose blocks no PlaneCycleConverter wrapped"
        raise ValueError(f"model must have the keys asked for, to={to!r}, got a {name} {state}")
    _check_periods(weights, model)
    names = naming(target)
    if names == "timm":
        converted = to_timm(weights, target)
    elif names == "huggingface":
        converted = to_huggingface(weights, target)
    else:
        converted = _fitted(weights, to_dinov3(target))
        if to == "planecycle":
            converted = to_planecycle(converted)
        for key in target:
            if match := KEPT_BLOCKS.fullmatch(key):
                converted[key] = converted[f"blocks.{match[1].replace('.', '.blk2d.', 1)}"]
    _check_fit(converted, target, name)
    return converted


def _checked(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}")
    if odd := [f"{key!r} ({type(t).__name__})" for key, t in state_dict.items() if not isinstance(t, Tensor)]:
        raise TypeError(f"state_dict must map names to tensors, got {', '.join(odd[:3])}")
    if odd := [key for key in state_dict if not isinstance(key, str)]:
        raise TypeError(f"state_dict must map names to tensors, got the key {odd[0]!r}")
    if any(t.is_meta for t in state_dict.values()):
        raise ValueError("state_dict must hold values, got tensors on the meta device")
    taken = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
    if naming(taken) is None:
        begin = ", ".join(list(state_dict)[:3]) or "none"
        raise ValueError(
            f"state_dict must hold the weights of a DINOv3 under the prefix {prefix!r}, got keys like {begin}; "
            "a backbone within another model needs prefix='backbone.' or what it is called there"
        )
    return taken


def _fitted(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with what another dinov3 has or has not: periods, masks, a bias of zero, training's own."""
    weights, device = dict(weights), next(iter(weights.values())).device
    for key, tensor in target.items():
        if key in weights:
            continue
        if key == PERIODS or TRAINING_ONLY.fullmatch(key):
            if tensor.is_meta:
                raise ValueError(f"model must hold its {key}, which the state_dict lacks, got it on the meta device")
            weights[key] = tensor
        elif key.endswith("attn.qkv.bias"):
            weights[key] = torch.zeros_like(tensor, device=device)
        elif key.endswith("attn.qkv.bias_mask"):
            bias, weights[key] = weights.get(key.removesuffix("_mask")), torch.ones_like(tensor, device=device)
            if bias is None or not bias.chunk(3)[1].any():
                weights[key].chunk(3)[1].zero_()
    for key in list(weights):
        if key not in target and (key == PERIODS or TRAINING_ONLY.fullmatch(key)):
            del weights[key]
        elif key not in target and key.endswith("attn.qkv.bias_mask"):
            mask, bias = weights.pop(key), key.removesuffix("_mask")
            weights[bias] = weights[bias] * mask.to(weights[bias].dtype)
        elif key not in target and key.endswith("attn.qkv.bias") and not effective_bias(weights, key).any():
            del weights[key]
    return weights


def _check_periods(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Released periods are rounded to bfloat16; other ones come from another RoPE."""
    if PERIODS not in weights:
        return
    buffers = dict(model.named_buffers())
    own = buffers.get(PERIODS, buffers.get("rope.periods"))
    if own is None and "rope_embeddings.inv_freq" in buffers:
        own = 1 / buffers["rope_embeddings.inv_freq"].double()
    given = weights[PERIODS].double()
    if own is None or own.is_meta or hasattr(getattr(model, "rope_embed", None), "sections"):
        return
    if own.shape != given.shape or not torch.allclose(own.double().to(given.device), given, rtol=2**-7, atol=0):
        raise ValueError(
            f"model must have the RoPE periods of the state_dict, {len(given)} up to {given[-1]:.4g}, "
            f"got {len(own)} up to {own[-1]:.4g}: another head dimension or base"
        )


def _check_fit(converted: Mapping[str, Tensor], target: Mapping[str, Tensor], name: str) -> None:
    lacking, left = [k for k in target if k not in converted], [k for k in converted if k not in target]
    if lacking or left:
        raise ValueError(
            f"model must hold what the state_dict holds, got a {name} "
            + " and ".join(
                f"{what} {len(keys)} of them, {', '.join(keys[:3])}"
                for what, keys in (("with no place for", left), ("that needs", lacking))
                if keys
            )
        )
    for key, tensor in converted.items():
        if tensor.shape != target[key].shape:
            raise ValueError(
                f"model must have {key} of the state_dict's shape {tuple(tensor.shape)}, got {tuple(target[key].shape)}"
            )
