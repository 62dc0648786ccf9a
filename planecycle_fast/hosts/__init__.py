"""What we know of each family of 2D models; none of their libraries is imported here.

An `Adapter` says how a model embeds slices, where its blocks are, which globals, RoPE and norm it has; its blocks are
described part by part, so that the stream can run them, and so is what forbids that. What is not known of a model runs
in the model's own code.

May import `ops` and what is below it. `engine` reads blocks through it, `lift` finds the adapter (`find_adapter`).

Start with `adapter.Adapter`, whose docstring shows one; then the family you know: `dinov3.py` (facebookresearch's),
`huggingface.py` and `huggingface_*.py` (transformers), `timm.py` and `timm_*.py`. docs/hosts.md is their table.

| | |
| --- | --- |
| `description.py`, `parts.py`, `known.py`, `huggingface_parts.py` | blocks taken apart |
| `projection.py` | the convolution of a patch embedding, where a product may take its place |
| `wrapped.py`, `placement.py` | modules as frameworks leave them: wrapped, compiled, sharded, offloaded |
| `buffers.py` | buffers that a model computes and does not save, refused where they hold something else |
"""

from __future__ import annotations

from torch import nn

from .adapter import Adapter
from .dinov3 import FacebookDINOv3
from .huggingface_clip import HuggingFaceCLIP, HuggingFaceSiglip
from .huggingface_dino import HuggingFaceDinov2, HuggingFaceDinov2Backbone, HuggingFaceDINOv3
from .huggingface_vit import HuggingFaceIJepa, HuggingFaceMAE, HuggingFaceViT
from .timm import TimmVisionTransformer
from .timm_beit import TimmBeit
from .timm_eva import TimmDINOv3, TimmEva

HUGGING_FACE = (
    HuggingFaceDINOv3,
    HuggingFaceDinov2,
    HuggingFaceDinov2Backbone,
    HuggingFaceViT,
    HuggingFaceMAE,
    HuggingFaceIJepa,
    HuggingFaceCLIP,
    HuggingFaceSiglip,
)
TIMM = (TimmDINOv3, TimmEva, TimmBeit, TimmVisionTransformer)
ADAPTERS = (FacebookDINOv3, *HUGGING_FACE, *TIMM)
_NAMES = [name for adapter in HUGGING_FACE for name in adapter.names]
SUPPORTED = (
    f"transformers {', '.join(name for name in _NAMES if not name.endswith('Transformer'))}; "
    "timm DINOv3 (Eva with RoPE of type 'dinov3'), EVA, EVA02 and Perception Encoder (Eva as well), Beit, "
    "VisionTransformer and VisionTransformerDistilled (DINOv2 with and without registers, CLIP, SigLIP, DeiT); "
    "facebookresearch/dinov3 DinoVisionTransformer"
)
HOW_TO = "for any other ViT subclass planecycle_fast.Adapter and pass it: lift(model, adapter=MyAdapter)"
_WINDOWED = ("SamModel", "SamVisionModel", "SamVisionEncoder", "Sam2Model", "VisionTransformerSAM", "ImageEncoderViT")


def find_adapter(model: nn.Module) -> type[Adapter]:
    """The adapter class for `model`.

    Raises:
        TypeError: not an nn.Module.
        ValueError: no adapter knows this model; the message says what is supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter
    got = f"{type(model).__module__}.{type(model).__name__}"
    if type(model).__name__ in _WINDOWED:
        raise ValueError(
            f"model {got} attends in windows with relative positions of a fixed size (SAM), which cannot be "
            f"moved to another plane; supported: {SUPPORTED}"
        )
    inner = [f"model.{name}" for name in supported_parts(model)]
    hint = f"; {' and '.join(inner)} are supported: lift one of them" if inner else ""
    if len(inner) == 1:
        hint = f"; {inner[0]} is supported: lift that"
    raise ValueError(f"model must be of a supported class, got {got}{hint}; supported: {SUPPORTED}; {HOW_TO}")


def supported_parts(model: nn.Module) -> list[str]:
    """Names of the supported modules in a model that are not within each other; [""] of a model that is one itself."""
    if any(adapter.matches(model) for adapter in ADAPTERS):
        return [""]
    inner = [(name, supported_parts(child)) for name, child in model.named_children()]
    return [f"{name}.{part}".rstrip(".") for name, parts in inner for part in parts]


__all__ = ["ADAPTERS", "Adapter", "find_adapter", "supported_parts"]
