"""The names that four implementations of DINOv3 give to the same weights, for `convert_state_dict`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PERIODS = "rope_embed.periods"
Tables = tuple[list[dict[str, str]], list[dict[str, str]]]  # of the root and of a block, see `_rename`
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
TRAINING_ONLY = re.compile(r"mask_token|local_cls_norm\..+")
KEPT_BLOCKS = re.compile(r"_blocks_original\.(.+)")  # PlaneCycleConverter(keep_original=True)

# dinov3's names of one block to those of others; {} is weight or bias
_TIMM_BLOCK = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
_TIMM_SWIGLU = {"mlp.w1.{}": "mlp.fc1_g.{}", "mlp.w2.{}": "mlp.fc1_x.{}", "mlp.w3.{}": "mlp.fc2.{}"}
_TIMM_ROOT = {"storage_tokens": "reg_token"}
_HF_BLOCK = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj.{}": "attention.o_proj.{}",
}
_HF_MLP = {"mlp.fc1.{}": "mlp.up_proj.{}", "mlp.fc2.{}": "mlp.down_proj.{}"}
_HF_SWIGLU = {"mlp.w1.{}": "mlp.gate_proj.{}", "mlp.w2.{}": "mlp.up_proj.{}", "mlp.w3.{}": "mlp.down_proj.{}"}
_HF_ROOT = {
    "storage_tokens": "embeddings.register_tokens",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.{}": "embeddings.patch_embeddings.{}",
}


def naming(keys: Mapping[str, Tensor]) -> str | None:
    """Whose keys these are, the authors' counted as dinov3's; None: nobody's."""
    if any(key.endswith(("pos_embed", "position_embeddings")) for key in keys):  # DINOv3 has no learned positions
        return None
    if "embeddings.cls_token" in keys:
        return "huggingface" if "embeddings.patch_embeddings.weight" in keys else None
    if "cls_token" not in keys or not any(key.startswith("blocks.0.") for key in keys):
        return None
    if "blocks.0.gamma_1" in keys or "reg_token" in keys or "blocks.0.attn.q_bias" in keys:
        return "timm"
    return "dinov3" if any(key.startswith("blocks.0.") and ".attn.qkv.weight" in key for key in keys) else None


def is_planecycle(keys: Mapping[str, Tensor]) -> bool:
    return any(".blk2d." in key for key in keys)


def _rename(key: str, tables: list[dict[str, str]]) -> str:
    stem, _, last = key.rpartition(".")
    for table in tables:
        if key in table:
            return table[key]
        if f"{stem}.{{}}" in table:
            return table[f"{stem}.{{}}"].format(last)
    return key


def _inverse(tables: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{new: old for old, new in table.items()} for table in tables]


# From others to dinov3


def to_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = naming(state)
    if names == "timm":
        return _from_others(state, _timm_tables(any(".mlp.fc1_g." in key for key in state)), _BLOCK.pattern)
    if names == "huggingface":
        tables = _huggingface_tables(any(".mlp.gate_proj." in key for key in state))
        return _from_others(state, tables, r"(?:model\.)?layer\.(\d+)\.(.+)")
    weights = {}
    for key, tensor in state.items():
        if (match := KEPT_BLOCKS.fullmatch(key)) is not None:
            key = f"blocks.{match[1]}"  # the same tensors once more
        key = key.replace(".blk2d.", ".")
        if re.fullmatch(rf"blocks\.\d+\.{re.escape(PERIODS)}", key):
            key = PERIODS  # one module, shared by the model and all of its blocks
        if key in weights and not tensor.is_meta and not torch.equal(weights[key], tensor):
            raise ValueError(f"state_dict must hold one {key}, shared by all blocks, got different ones")
        weights[key] = tensor
    return weights


def _timm_tables(swiglu: bool) -> Tables:
    return [_TIMM_ROOT], [_TIMM_BLOCK, *([_TIMM_SWIGLU] if swiglu else [])]


def _huggingface_tables(swiglu: bool) -> Tables:
    return [_HF_ROOT], [_HF_BLOCK, _HF_SWIGLU if swiglu else _HF_MLP]


def _from_others(state: Mapping[str, Tensor], tables: Tables, block: str) -> dict[str, Tensor]:
    root, inner = (_inverse(t) for t in tables)
    weights, attention = {}, {}  # attention: (block, "q" and so on, "weight" or "bias")
    for key, tensor in state.items():
        if (match := re.fullmatch(block, key)) is None:
            name = _rename(key, root)
            if name == "storage_tokens" and tensor.shape[1] == 0:  # Hugging Face keeps none as a tensor
                continue
            weights[name] = tensor[0] if name == "mask_token" and tensor.ndim == 3 else tensor
        elif part := re.fullmatch(r"attention\.([qkv])_proj\.(\w+)|attn\.([qkv])_(bias)", match[2]):
            attention[match[1], part[1] or part[3], part[2] or part[4]] = tensor
        else:
            weights[f"blocks.{match[1]}.{_rename(match[2], inner)}"] = tensor
    for i in dict.fromkeys(key[0] for key in attention):
        parts = {kind: [attention.get((i, which, kind)) for which in "qkv"] for kind in ("weight", "bias")}
        if parts["weight"][0] is not None:
            weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts["weight"])
        if (some := next((b for b in parts["bias"] if b is not None), None)) is not None:
            bias = [torch.zeros_like(some) if b is None else b for b in parts["bias"]]
            mask = [torch.ones_like(some), torch.full_like(some, parts["bias"][1] is not None), torch.ones_like(some)]
            weights[f"blocks.{i}.attn.qkv.bias"] = torch.cat(bias)
            weights[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat(mask)
    return weights


# From dinov3 to others


def thirds(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return t.chunk(3)


def effective_bias(weights: Mapping[str, Tensor], key: str) -> Tensor:
    """A qkv bias as the model adds it: times its mask, where it has one."""
    mask = weights.get(f"{key}_mask")
    return weights[key] if mask is None else torch.where(mask.bool(), weights[key], 0)


def to_planecycle(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted, blocks = {}, set()
    for key, tensor in weights.items():
        if (match := _BLOCK.fullmatch(key)) is not None:
            blocks.add(match[1])
            key = f"blocks.{match[1]}.blk2d.{match[2]}"
        converted[key] = tensor
    if PERIODS in weights:
        converted |= {f"blocks.{i}.{PERIODS}": weights[PERIODS] for i in blocks}
    return converted


def _to_others(weights: dict[str, Tensor], tables: Tables, block: str) -> dict[str, Tensor]:
    """Everything under the other names, but for the packed qkv bias and its mask."""
    root, inner = tables
    converted = {}
    for key, tensor in weights.items():
        if key == PERIODS or key.endswith((".qkv.bias", ".qkv.bias_mask")) or key.startswith("local_cls_norm."):
            continue
        match = _BLOCK.fullmatch(key)
        converted[f"{block}.{match[1]}.{_rename(match[2], inner)}" if match else _rename(key, root)] = tensor
    return converted


def _biases(weights: dict[str, Tensor], target: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The q, k and v biases that the target has. `name` has a place for the block and one for q, k or v."""
    converted = {}
    for key in [key for key in weights if key.endswith("attn.qkv.bias")]:
        block = _BLOCK.fullmatch(key)[1]
        for which, bias in zip("qkv", thirds(effective_bias(weights, key))):
            if (theirs := name.format(block, which)) in target:
                converted[theirs] = bias
            elif bias.any():
                raise ValueError(
                    f"model must have a {which} bias to hold {key} of the state_dict, got none at {theirs}; "
                    "timm's models with biases end in _qkvb"
                )
    return converted


def to_timm(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = _to_others(weights, _timm_tables(any(".mlp.w1." in key for key in weights)), "blocks")
    converted.pop("mask_token", None)
    converted |= _biases(weights, target, "blocks.{}.attn.{}_bias")
    return _zero_biases(converted, target, r"blocks\.\d+\.attn\.[qv]_bias")


def to_huggingface(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    block = "model.layer" if any(key.startswith("model.layer.") for key in target) else "layer"
    converted = _to_others(weights, _huggingface_tables(any(".mlp.w1." in key for key in weights)), block)
    for key in [key for key in converted if key.endswith(".attn.qkv.weight")]:
        stem = key.removesuffix("attn.qkv.weight")
        for which, weight in zip("qkv", thirds(converted.pop(key))):
            converted[f"{stem}attention.{which}_proj.weight"] = weight
    converted |= _biases(weights, target, block + ".{}.attention.{}_proj.bias")
    registers, mask = "embeddings.register_tokens", "embeddings.mask_token"
    if registers not in converted and target[registers].shape[1] == 0:
        converted[registers] = target[registers]
    converted[mask] = converted[mask][None] if mask in converted else target[mask]
    return _zero_biases(converted, target, r".+\.attention\.[qkv]_proj\.bias")


def _zero_biases(converted: dict[str, Tensor], target: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    for key, tensor in target.items():
        if key not in converted and re.fullmatch(name, key):
            converted[key] = torch.zeros_like(tensor)
    return converted
