"""The three modes of a lifted ViT-S/16 (DINOv3, random weights) on one small volume.

make bench
"""

import pytest
import timm
import torch

import planecycle_fast as pcf

SHAPE = (1, 3, 16, 256, 256)  # 16 x 16 x 16 tokens


@pytest.mark.parametrize("mode", ["slice2d", "planecycle", "flatten3d"])
def test_forward(benchmark, mode):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0).eval()
    lifted, volume = pcf.lift(model, mode=mode), torch.randn(SHAPE)
    benchmark.group = f"ViT-S/16, volume {SHAPE}, fp32, inference"
    with torch.inference_mode():
        benchmark.pedantic(lifted, (volume,), rounds=3, warmup_rounds=1)
