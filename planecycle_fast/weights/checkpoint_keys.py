"""The names that four implementations of DINOv3 give to the same weights, for `convert_state_dict`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PERIODS = "rope_embed.periods"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
TRAINING_ONLY = re.compile(r"mask_token|local_cls_norm\..+")
KEPT_BLOCKS = re.compile(r"_blocks_original\.(.+)")  # PlaneCycleConverter(keep_original=True)

# dinov3's names to those of others: of the root, of a block, of its MLP and of a SwiGLU; {} is weight or bias
_NAMES: dict[str, list[dict[str, str]]] = {
    "timm": [
        {"storage_tokens": "reg_token"},
        {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"},
        {},
        {"mlp.w1.{}": "mlp.fc1_g.{}", "mlp.w2.{}": "mlp.fc1_x.{}", "mlp.w3.{}": "mlp.fc2.{}"},
    ],
    "huggingface": [
        {
            "storage_tokens": "embeddings.register_tokens",
            "cls_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "patch_embed.proj.{}": "embeddings.patch_embeddings.{}",
        },
        {
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
            "attn.proj.{}": "attention.o_proj.{}",
        },
        {"mlp.fc1.{}": "mlp.up_proj.{}", "mlp.fc2.{}": "mlp.down_proj.{}"},
        {"mlp.w1.{}": "mlp.gate_proj.{}", "mlp.w2.{}": "mlp.up_proj.{}", "mlp.w3.{}": "mlp.down_proj.{}"},
    ],
}
# Their blocks, and the part of an MLP that only a SwiGLU has: in their keys, in dinov3's.
_BLOCKS = {"timm": _BLOCK, "huggingface": re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)")}
_GATES = (".mlp.fc1_g.", ".mlp.gate_proj.", ".mlp.w1.")


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


def _tables(names: str, keys: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """From dinov3's names to others, of the root and of a block, for weights under either."""
    root, block, mlp, swiglu = _NAMES[names]
    return root, block | (swiglu if any(gate in key for key in keys for gate in _GATES) else mlp)


def _rename(key: str, table: dict[str, str]) -> str:
    stem, _, last = key.rpartition(".")
    return table[f"{stem}.{{}}"].format(last) if f"{stem}.{{}}" in table else table.get(key, key)


# From others to dinov3


def to_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = naming(state)
    if names in _NAMES:
        return _from_others(state, names)
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


def _from_others(state: Mapping[str, Tensor], names: str) -> dict[str, Tensor]:
    root, inner = ({theirs: ours for ours, theirs in table.items()} for table in _tables(names, state))
    weights, attention = {}, {}  # attention: (block, "q" and so on, "weight" or "bias")
    for key, tensor in state.items():
        if (match := _BLOCKS[names].fullmatch(key)) is None:
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


def _to_others(weights: dict[str, Tensor], names: str, block: str) -> dict[str, Tensor]:
    """Everything under the other names, but for the packed qkv bias and its mask."""
    root, inner = _tables(names, weights)
    converted = {}
    for key, tensor in weights.items():
        if key == PERIODS or key.endswith((".qkv.bias", ".qkv.bias_mask")) or key.startswith("local_cls_norm."):
            continue
        match = _BLOCK.fullmatch(key)
        converted[f"{block}.{match[1]}.{_rename(match[2], inner)}" if match else _rename(key, root)] = tensor
    return converted


def _biases(weights: dict[str, Tensor], target: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The q, k and v biases that the target has. `name` has a place for the block and one for q, k or v."""
    every = re.compile(name.format(r"\d+", "[qkv]"))
    converted = {key: torch.zeros_like(tensor) for key, tensor in target.items() if every.fullmatch(key)}
    for key in [key for key in weights if key.endswith("attn.qkv.bias")]:
        block = _BLOCK.fullmatch(key)[1]
        for which, bias in zip("qkv", effective_bias(weights, key).chunk(3)):
            if (theirs := name.format(block, which)) in target:
                converted[theirs] = bias
            elif bias.any():
                raise ValueError(
                    f"model must have a {which} bias to hold {key} of the state_dict, got none at {theirs}; "
                    "timm's models with biases end in _qkvb"
                )
    return converted


def to_timm(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = _to_others(weights, "timm", "blocks")
    converted.pop("mask_token", None)
    return converted | _biases(weights, target, "blocks.{}.attn.{}_bias")


def to_huggingface(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    block = "model.layer" if any(key.startswith("model.layer.") for key in target) else "layer"
    converted = _to_others(weights, "huggingface", block)
    for key in [key for key in converted if key.endswith(".attn.qkv.weight")]:
        stem = key.removesuffix("attn.qkv.weight")
        for which, weight in zip("qkv", converted.pop(key).chunk(3)):
            converted[f"{stem}attention.{which}_proj.weight"] = weight
    registers, mask = "embeddings.register_tokens", "embeddings.mask_token"
    if registers not in converted and target[registers].shape[1] == 0:
        converted[registers] = target[registers]
    converted[mask] = converted[mask][None] if mask in converted else target[mask]
    return converted | _biases(weights, target, block + ".{}.attention.{}_proj.bias")
