"""The published configurations of DINOv2 and DINOv3 by name, for machines that no hub can be reached from."""

from __future__ import annotations

import re
from types import ModuleType

# hidden size, heads, layers, further settings of the published configurations
_DINOV2 = {
    "small": (384, 6, 12, {}),
    "base": (768, 12, 12, {}),
    "large": (1024, 16, 24, {}),
    "giant": (1536, 24, 40, {"use_swiglu_ffn": True}),
}
_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
_DINOV3 = {
    "s16": (384, 6, 12, {"intermediate_size": 1536}),
    "s16plus": (384, 6, 12, {"intermediate_size": 1536} | _GATED),
    "b16": (768, 12, 12, {"intermediate_size": 3072}),
    "l16": (1024, 16, 24, {"intermediate_size": 4096}),
    "h16plus": (1280, 20, 32, {"intermediate_size": 5120} | _GATED),
    "7b16": (4096, 32, 40, {"intermediate_size": 8192, "query_bias": False, "value_bias": False} | _GATED),
}


def known_config(transformers: ModuleType, name: str):
    """Hugging Face's configuration of facebook/dinov2-* and facebook/dinov3-vit*, None for other names."""
    short = name.rsplit("/", 1)[-1]
    if match := re.fullmatch(r"dinov2-(with-registers-)?(small|base|large|giant)", short):
        cls = transformers.Dinov2WithRegistersConfig if match[1] else transformers.Dinov2Config
        known, more = _DINOV2[match[2]], {"patch_size": 14, "image_size": 518}
    elif (match := re.match(r"dinov3-vit(\w+?)-pretrain", short)) and match[1] in _DINOV3:
        cls, known, more = transformers.DINOv3ViTConfig, _DINOV3[match[1]], {"num_register_tokens": 4}
    else:
        return None
    hidden, heads, layers, rest = known
    return cls(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, **more, **rest)
