"""The authors' code as it is and accelerated, ViT-S/16 with random weights, in turns on the same volume.

PLANECYCLE_REPO=... make bench
"""

import copy
import importlib
import os
import sys

import pytest
import torch

import planecycle_fast as pcf

SHAPES = [(1, 3, 32, 256, 256), (4, 3, 64, 64, 64)]
CODES = ["authors", "accelerated"]


@pytest.fixture(scope="module")
def models():
    if "PLANECYCLE_REPO" not in os.environ:
        pytest.skip("needs PLANECYCLE_REPO, a checkout of HINTLab/PlaneCycle at 1a1129c")
    sys.path.insert(0, os.environ["PLANECYCLE_REPO"])
    backbones = importlib.import_module("models.hub.backbones")
    converter = importlib.import_module("planecycle.converters.converter").PlaneCycleConverter
    torch.manual_seed(0)
    authors = converter()(backbones.dinov3_vits16(pretrained=False)).eval()
    return {"authors": authors, "accelerated": pcf.accelerate(copy.deepcopy(authors))}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark, models, shape, dtype, code):
    model, volume = models[code].to(dtype), torch.randn(shape, dtype=dtype)
    benchmark.group = f"accelerate: ViT-S/16, volume {shape}, {dtype}, inference"
    benchmark.extra_info |= {"contender": code, "ours": code == "accelerated"}
    with torch.inference_mode():
        benchmark.pedantic(model, (volume,), rounds=3, warmup_rounds=1)
