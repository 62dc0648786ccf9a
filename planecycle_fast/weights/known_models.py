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
_DINOV3 = {
    "s16": (384, 6, 12, {"intermediate_size": 1536}),
    "s16plus": (384, 6, 12, {"intermediate_size": 1536, "use_gated_mlp": True, "hidden_act": "silu"}),
    "b16": (768, 12, 12, {"intermediate_size": 3072}),
    "l16": (1024, 16, 24, {"intermediate_size": 4096}),
    "h16plus": (1280, 20, 32, {"intermediate_size": 5120, "use_gated_mlp": True, "hidden_act": "silu"}),
    "7b16": (
        4096,
        32,
        40,
        {
            "intermediate_size": 8192,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
}


def known_config(transformers: ModuleType, name: str):
    """Hugging Face's configuration of facebook/dinov2-* and facebook/dinov3-vit*, None for other names."""
    short = name.rsplit("/", 1)[-1]
    if match := re.fullmatch(r"dinov2-(with-registers-)?(small|base|large|giant)", short):
        hidden, heads, layers, more = _DINOV2[match[2]]
        cls = transformers.Dinov2WithRegistersConfig if match[1] else transformers.Dinov2Config
        return cls(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            patch_size=14,
            image_size=518,
            **more,
        )
    if (match := re.match(r"dinov3-vit(\w+?)-pretrain", short)) and match[1] in _DINOV3:
        hidden, heads, layers, more = _DINOV3[match[1]]
        return transformers.DINOv3ViTConfig(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            num_register_tokens=4,
            **more,
        )
    return None
