"""plane_switch against the transposes and concatenations that it replaces, one volume of ViT-S tokens.

make bench
"""

import pytest
import torch
import torch.nn.functional as F

from planecycle_fast.ops import plane_switch
from planecycle_fast.planes import DH, DW, HW
from planecycle_fast.pooling import transition

SIZES, G, C = (32, 28, 28), 5, 384
MOVED = {"DW": 2, "DH": 3}  # axis of (B, D, H, W, C) that becomes the batch


def separate_passes(x, plane):
    """HW order to `plane` as the authors' operator does it: split, movedim, reshape, pool, cat."""
    depth, height, width = SIZES
    patches = x[:, G:].reshape(-1, depth, height, width, C).movedim(MOVED[plane.name], 1)
    slices = patches.shape[1]
    g = x[:, :G].reshape(-1, depth, G * C).transpose(1, 2)
    g = F.adaptive_avg_pool1d(g, slices).transpose(1, 2).reshape(-1, G, C)
    return torch.cat([g, patches.reshape(len(g), -1, C)], dim=1)


@pytest.mark.parametrize("plane", [DW, DH], ids=str)
@pytest.mark.parametrize("how", ["plane_switch", "separate_passes"])
@torch.inference_mode()
def test_from_hw(benchmark, how, plane):
    x = torch.randn(SIZES[0], G + SIZES[1] * SIZES[2], C)
    m = transition(SIZES[0], plane.slices(SIZES), SIZES[0])
    benchmark.group = f"HW -> {plane}, {SIZES} tokens, C = {C}, fp32"
    benchmark.extra_info["bytes"] = 2 * x.numel() * x.element_size()
    if how == "plane_switch":
        benchmark(lambda: plane_switch(x, HW, plane, SIZES, G, m))
    else:
        benchmark(lambda: separate_passes(x, plane))
