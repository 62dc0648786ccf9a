"""The real code of others, from checkouts named by PLANECYCLE_REPO and DINOV3_REPO; never part of this repository.

PLANECYCLE_REPO   github.com/HINTLab/PlaneCycle at 1a1129c (folders models and planecycle)
DINOV3_REPO       github.com/facebookresearch/dinov3 (folder dinov3)
"""

import os
import random
import sys
from contextlib import contextmanager
from functools import cache

import pytest
import torch

REASON = "needs {0}, a checkout of {1}"
needs_planecycle = pytest.mark.skipif(
    "PLANECYCLE_REPO" not in os.environ, reason=REASON.format("PLANECYCLE_REPO", "HINTLab/PlaneCycle at 1a1129c")
)
needs_dinov3 = pytest.mark.skipif(
    "DINOV3_REPO" not in os.environ, reason=REASON.format("DINOV3_REPO", "facebookresearch/dinov3")
)


@contextmanager
def _importing_from(variable):
    sys.path.insert(0, os.environ[variable])
    limit = torch._dynamo.config.accumulated_recompile_limit, torch._dynamo.config.automatic_dynamic_shapes
    try:
        yield
    finally:
        sys.path.remove(os.environ[variable])
        # both repositories change these on import, for the whole process
        torch._dynamo.config.accumulated_recompile_limit, torch._dynamo.config.automatic_dynamic_shapes = limit


@cache
def authors():
    """(DinoVisionTransformer, PlaneCycleConverter) of the authors' code."""
    with _importing_from("PLANECYCLE_REPO"):
        from models.vision_transformer import DinoVisionTransformer
        from planecycle.converters.converter import PlaneCycleConverter
    return DinoVisionTransformer, PlaneCycleConverter


@cache
def dinov3():
    """(DinoVisionTransformer, hub's backbones) of facebookresearch/dinov3."""
    with _importing_from("DINOV3_REPO"):
        import dinov3.hub.backbones as backbones
        from dinov3.models.vision_transformer import DinoVisionTransformer
    return DinoVisionTransformer, backbones


def randomise(model):
    """Weights that show every part: nothing zero, nothing tiny, nothing equal."""
    model.init_weights()
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            torch.nn.init.normal_(parameter, 0.3, 0.1)
        elif "bias" in name or "token" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_settings(seed, block_type="PlaneCycle"):
    """Constructor's arguments, converter's arguments and a volume's size (D, height, width) of a random small model."""
    draw = random.Random(seed)
    head_dim = 64 if block_type == "Flatten3D" else draw.choice([16, 32])
    heads, patch = draw.choice([1, 2]), draw.choice([2, 4])
    model = dict(
        embed_dim=heads * head_dim,
        num_heads=heads,
        depth=draw.randint(2, 6),
        patch_size=patch,
        layerscale_init=draw.choice([None, 0.3]),
        n_storage_tokens=draw.choice([0, 4]),
        mask_k_bias=draw.random() < 0.5,
        ffn_layer=draw.choice(["mlp", "swiglu"]),
        norm_layer=draw.choice(["layernormbf16", "rmsnorm"]),
        untie_cls_and_patch_norms=draw.random() < 0.3,
        untie_global_and_local_cls_norm=draw.random() < 0.3,
        pos_embed_rope_dtype="fp32",
        pos_embed_rope_normalize_coords=draw.choice(["separate", "min", "max"]),
        pos_embed_rope_rescale_coords=2.0,
        pos_embed_rope_shift_coords=draw.choice([None, 0.2]),
        pos_embed_rope_jitter_coords=draw.choice([None, 1.3]),
        drop_path_rate=draw.choice([0.0, 0.3, 0.5]),
    )
    cycle = tuple(draw.choice(["HW", "DW", "DH"]) for _ in range(draw.randint(1, 5)))
    converter = dict(cycle_order=cycle, pool_method=draw.choice(["PCg", "PCm"]))
    depth, height, width = (draw.choice([1, 3, 4, 5, 7]) for _ in range(3))
    return model, converter, (depth, height * patch, width * patch)
