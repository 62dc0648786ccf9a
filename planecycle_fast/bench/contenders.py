"""Implementations of one network, ready to run: ours in each form, and the authors' code where PLANECYCLE_REPO is.

All have the weights of one timm DINOv3, random, so that every part of the network shows in what it computes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..authors.accelerate import accelerate
from ..engine import cuda_recorder
from ..engine.graph_store import GraphOptions
from ..lifted import lift
from ..optional import require
from ..weights.checkpoints import convert_state_dict
from .cells import ACCELERATED, AUTHORS, AUTHORS_COMPILED, COMPILED, FAST, GRAPH, MODES, PATCH, REDUCED, REFERENCE

TIMM = {"ViT-S": "small", "ViT-B": "base", "ViT-L": "large", "ViT-7B": "7b"}
REPO = "PLANECYCLE_REPO"  # a checkout of github.com/HINTLab/PlaneCycle at 1a1129c
SHARP = 1.5  # deviation of queries and keys: with 1 attention would be almost the same everywhere
BLOCK_TYPES = {"slice2d": "Slice2D", "PCg": "PlaneCycle", "PCm": "PlaneCycle", "flatten3d": "Flatten3D"}


class NotHereError(Exception):
    """What a contender needs is not on this machine; the message says what."""


def vit(name: str, device: torch.device | str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """A DINOv3 of timm, in eval mode, random weights of seed 0 (on the meta device none).

    Args:
        name: one of `cells.VITS`.
        settings: of timm's constructor, for smaller ones.
    """
    timm = require("timm", "bench")
    with torch.device(device):
        torch.manual_seed(0)
        model = timm.create_model(f"vit_{TIMM[name]}_patch16_dinov3", pretrained=False, num_classes=0, **settings)
    model = model.to(device, dtype).eval()
    return model if torch.device(device).type == "meta" else randomise(model)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Weights that show every part: attention looks somewhere, LayerScale is not tiny, no bias is zero, no norm one."""
    for name, parameter in model.named_parameters():
        if "gamma" in name or "bias" in name or "token" in name:
            parameter.normal_(0.2, 0.1)
        elif "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif parameter.ndim == 2:
            parameter.normal_(0.0, (SHARP if "qkv" in name else 1.0) * parameter.shape[1] ** -0.5)
    return model


class Contender(nn.Module):
    """From a volume to (patches (B, D*H*W, C), one vector per volume (B, C)), whatever the model returns."""

    def __init__(self, model: nn.Module, take: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model, self.take = model, take

    def forward(
        self,
        volume: Tensor,  # (B, 3, D, height, width)
    ) -> tuple[Tensor, Tensor]:
        return self.take(self.model(volume), volume)


def make(
    model: nn.Module,
    mode: str,
    code: str,
    volume: Tensor,  # (B, 3, D, height, width)
    training: bool = False,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The implementation `code` of `mode`, with the weights of `model`, for volumes like this one.

    Graphs are captured, with `training` those of backward too. Raises NotHereError for what this machine lacks;
    otherwise whatever making it raises.
    """
    if code in (AUTHORS, AUTHORS_COMPILED, ACCELERATED):
        theirs = authors(model, mode)
        made = Contender(accelerate(theirs) if code == ACCELERATED else theirs, of_authors)
        return torch.compile(made, dynamic=False) if code == AUTHORS_COMPILED else made
    if code not in (FAST, REFERENCE, COMPILED, GRAPH, REDUCED):
        raise ValueError(f"code must be one of cells.CODES, got {code!r}")
    if code in (GRAPH, REDUCED) and not cuda_recorder.RECORDER.takes(volume.device):
        raise NotHereError("CUDA graphs need a CUDA device")
    backend = "reference" if code == REFERENCE else "auto"
    graphs = GraphOptions(limit=2**40, largest=None) if code == GRAPH else False
    made = Contender(lift(model, backend=backend, graphs=graphs, **MODES[mode]), of_lifted)
    if code == GRAPH:
        with torch.set_grad_enabled(training):  # the second pass is captured
            for _ in range(2):
                made(volume)
        if not made.model.graphs.captured:
            raise RuntimeError("; ".join(made.model.graphs.describe(volume.device)))
    if code in (COMPILED, REDUCED):
        return torch.compile(made, dynamic=False, mode="reduce-overhead" if code == REDUCED else None)
    return made


def of_lifted(features: Any, volume: Tensor) -> tuple[Tensor, Tensor]:
    return features.patches.flatten(1, 3), features.pooled()


def of_authors(features: Mapping[str, Tensor], volume: Tensor) -> tuple[Tensor, Tensor]:
    patches, cls = features["x_norm_patchtokens"], features["x_norm_clstoken"]
    return patches.reshape(len(volume), -1, patches.shape[-1]), cls.reshape(len(volume), -1, cls.shape[-1]).mean(1)


_shared: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()  # the authors' copy of a model's


def authors(model: nn.Module, mode: str) -> nn.Module:
    """The authors' model with the weights of timm's `model`; those of all modes share theirs.

    Raises NotHereError without PLANECYCLE_REPO.
    """
    model_class, converter = authors_code()
    if mode == "flatten3d" and model.embed_dim // model.blocks[0].attn.num_heads != 64:
        raise NotHereError("the authors' flatten3d takes heads of 64 channels")
    weight, width, mlp = model.patch_embed.proj.weight, model.embed_dim, model.blocks[0].mlp
    gated, hidden = hasattr(mlp, "fc1_g"), mlp.fc2.in_features / width
    with torch.device("meta"):
        made = model_class(
            patch_size=PATCH, embed_dim=width, depth=len(model.blocks), num_heads=model.blocks[0].attn.num_heads,
            ffn_layer="swiglu64" if gated else "mlp", ffn_ratio=1.5 * hidden if gated else hidden, qkv_bias=False,
            layerscale_init=1e-5, norm_layer="layernormbf16", n_storage_tokens=4, pos_embed_rope_dtype="fp32",
            pos_embed_rope_rescale_coords=2.0, block_type=BLOCK_TYPES[mode],
        )  # fmt: skip
    made.rope_embed.to_empty(device=weight.device)._init_weights()  # float32 whatever the weights, like their hub's
    made.mask_token = nn.Parameter(torch.zeros(1, width, device=weight.device, dtype=weight.dtype))
    periods = {name: buffer.clone() for name, buffer in made.rope_embed.named_buffers()}
    if BLOCK_TYPES[mode] == "PlaneCycle":
        made = converter(pool_method=mode)(made)
    state = convert_state_dict(model.state_dict(), to="planecycle" if mode in ("PCg", "PCm") else "host", model=made)
    made.load_state_dict(state, assign=True)
    for name, buffer in periods.items():
        made.rope_embed.get_buffer(name).data = buffer
    shared = _shared.setdefault(model, {})
    for name, parameter in list(made.named_parameters()):
        path, _, last = name.rpartition(".")
        setattr(made.get_submodule(path), last, shared.setdefault(name.replace(".blk2d.", "."), parameter))
    return made.eval()


def authors_code() -> tuple[type, type]:
    """(DinoVisionTransformer, PlaneCycleConverter) of the authors' code. NotHereError without PLANECYCLE_REPO."""
    if REPO not in os.environ:
        raise NotHereError(f"needs {REPO}, a checkout of github.com/HINTLab/PlaneCycle at 1a1129c")
    with _importing_from(os.environ[REPO]):
        models = importlib.import_module("models.vision_transformer")
        converters = importlib.import_module("planecycle.converters.converter")
    return models.DinoVisionTransformer, converters.PlaneCycleConverter


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    config = torch._dynamo.config
    limit = config.accumulated_recompile_limit, config.automatic_dynamic_shapes
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        config.accumulated_recompile_limit, config.automatic_dynamic_shapes = limit  # theirs, for the whole process
