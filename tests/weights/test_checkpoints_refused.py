"""What `convert_state_dict` refuses."""

import pytest
import torch

import planecycle_fast as pcf

from .. import standins
from ..host_models import BY_NAME
from .test_checkpoints import HOSTS, state, theirs, without_biases


def other_periods():
    weights = state()
    return {key: t**1.02 if "periods" in key else t for key, t in weights.items()}  # base 110, not 100


def different_periods():
    return state() | {"blocks.3.rope_embed.periods": torch.ones(8)}


BAD = {
    "to": (lambda: (state(), {"to": "timm"}), ValueError, "to must be one of host, planecycle, got 'timm'"),
    "model": (lambda: (state(), {"model": "timm"}), TypeError, "model must be a torch.nn.Module or None, got str"),
    "list": (lambda: ([1], {}), TypeError, "state_dict must map names to tensors, got list"),
    "checkpoint": (lambda: ({"net": state()}, {}), TypeError, r"must map names to tensors, got 'net' \(OrderedDict\)"),
    "not DINOv3": (
        lambda: (torch.nn.Linear(2, 2).state_dict(), {}),
        ValueError,
        "must hold the weights of a DINOv3 under the prefix '', got keys like weight, bias",
    ),
    "no model for timm": (
        lambda: (HOSTS["timm"]().state_dict(), {"to": "planecycle"}),
        ValueError,
        "model must be given, the one that is to load the result, for weights of timm without RoPE periods",
    ),
    "Flatten3D": (
        lambda: (standins.DinoVisionTransformer("Flatten3D").state_dict(), {"to": "planecycle"}),
        ValueError,
        "for weights of dinov3 without RoPE periods, got None",
    ),
    "timm ViT": (lambda: (BY_NAME["timm-dinov2-s"].make().state_dict(), {}), ValueError, "the weights of a DINOv3"),
    "HF DINOv2": (
        lambda: (BY_NAME["hf-dinov2"].make().state_dict(), {"model": HOSTS["timm"]()}),
        ValueError,
        "the weights of a DINOv3",
    ),
    "empty": (lambda: ({}, {}), ValueError, "got keys like none"),
    "keys": (lambda: ({3: torch.ones(1)}, {}), TypeError, "must map names to tensors, got the key 3"),
    "prefix": (lambda: (state(), {"prefix": 3}), TypeError, "prefix must be a string, got int"),
    "meta": (
        lambda: ({k: t.to("meta") for k, t in state().items()}, {}),
        ValueError,
        "must hold values, got tensors on",
    ),
    "meta model": (
        lambda: (HOSTS["timm"]().state_dict(), {"model": HOSTS["dinov3"]().to("meta")}),
        ValueError,
        "model must hold its mask_token, which the state_dict lacks, got it on the meta device",
    ),
    "biases that the target lacks": (
        lambda: (state(mask_k_bias=False), {"model": without_biases()}),
        ValueError,
        "with no place for 5 of them, blocks.0.attn.qkv.bias",
    ),
    "no model for hf": (
        lambda: (HOSTS["hf"]().state_dict(), {}),
        ValueError,
        "for weights of huggingface",
    ),
    "unconverted": (
        lambda: (state(), {"to": "planecycle", "model": HOSTS["dinov3"]()}),
        ValueError,
        "whose blocks no PlaneCycleConverter wrapped",
    ),
    "converted": (
        lambda: (state(), {"model": theirs()[0]}),
        ValueError,
        "got a .* whose blocks are converted",
    ),
    "depth": (lambda: (state(depth=4), {"model": HOSTS["timm"]()}), ValueError, "that needs 1[0-9] of them, blocks.4"),
    "width": (lambda: (state(embed_dim=32, num_heads=1), {"model": HOSTS["hf"]()}), ValueError, "state_dict's shape"),
    "registers": (
        lambda: (state(n_storage_tokens=2), {"model": HOSTS["timm"]()}),
        ValueError,
        "have reg_token of",
    ),
    "swiglu": (lambda: (state(swiglu=True), {"model": HOSTS["timm"]()}), ValueError, "with no place for .*mlp.fc1_g"),
    "periods": (lambda: (other_periods(), {"model": HOSTS["hf"]()}), ValueError, "must have the RoPE periods of the"),
    "head": (lambda: (state(num_heads=4), {"model": HOSTS["timm"]()}), ValueError, "another head dimension or base"),
    "shared": (lambda: (different_periods(), {}), ValueError, "must hold one rope_embed.periods, shared by all blocks"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind):
    make, error, message = BAD[kind]
    weights, settings = make()
    with pytest.raises(error, match=message):
        pcf.convert_state_dict(weights, **settings)
