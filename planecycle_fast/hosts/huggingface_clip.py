"""Hugging Face transformers: the image models of CLIP and SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .buffers import Computed
from .huggingface import LearnedPositions
from .known import contents, why_called


class HuggingFaceSiglip(LearnedPositions):
    """`SiglipVisionModel`: no class token. Its pooling head is not run; features are what that pools."""

    names = ("SiglipVisionModel", "SiglipVisionTransformer")
    known = contents("patch_embedding position_embedding position_ids")
    projection, cls = "patch_embedding", ""
    block_arguments = (None,)  # no mask

    @property
    def core(self) -> nn.Module:
        return getattr(self.model, "vision_model", self.model)  # the former held the latter in transformers 5.0

    @property
    def blocks(self) -> nn.ModuleList:
        return self.core.encoder.layers

    def _own_positions(self, found: nn.Module) -> Tensor:
        return found.position_embedding(found.position_ids)

    def computed_buffers(self) -> list[Computed]:
        found = self.core.embeddings
        return [Computed(found, "position_ids", lambda: torch.arange(found.position_ids.shape[-1])[None])]

    def final_norm(self) -> nn.Module | None:
        return self.core.post_layernorm


class HuggingFaceCLIP(HuggingFaceSiglip):
    """`CLIPVisionModel`: a norm before the blocks, and none after them, as of its ``last_hidden_state``.

    Its own `post_layernorm` is for the class token only, where it is pooled: ``lifted.post_layernorm(features.cls)``.
    """

    names = ("CLIPVisionModel", "CLIPVisionTransformer")
    known = contents("class_embedding patch_embedding position_embedding position_ids")
    cls = "class_embedding"

    def _before_blocks(self, tokens: Tensor) -> Tensor:
        return self.core.pre_layrnorm(tokens)

    def _is_known(self, found: nn.Module) -> bool:
        return super()._is_known(found) and why_called(self.core.pre_layrnorm) is None

    def final_norm(self) -> None:
        return None
