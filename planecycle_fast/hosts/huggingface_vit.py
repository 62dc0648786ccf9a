"""Hugging Face transformers: ViT, and what has its blocks: MAE and I-JEPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .huggingface import LearnedPositions
from .known import contents


class HuggingFaceViT(LearnedPositions):
    """`ViTModel`: a class token."""

    names = ("ViTModel",)
    known = contents("cls_token patch_embeddings position_embeddings dropout", "mask_token")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers if hasattr(self.model, "layers") else self.model.encoder.layer  # transformers 5.0


class HuggingFaceIJepa(HuggingFaceViT):
    """`IJepaModel`: no class token."""

    names = ("IJepaModel",)
    known = contents("patch_embeddings position_embeddings dropout", "mask_token")
    cls = ""


class HuggingFaceMAE(HuggingFaceViT):
    """`ViTMAEModel`: all patches in their order, whatever ``config.mask_ratio`` is.

    The model itself drops that share of the patches (0.75, in evaluation as well) and shuffles the rest.
    """

    names = ("ViTMAEModel",)
    known = contents("cls_token patch_embeddings position_embeddings")

    def _embedded(self, images: Tensor, settings: dict[str, Any]) -> Tensor:
        rows, columns = (n // p for n, p in zip(images.shape[2:], self.patch_size))
        rising = torch.arange(rows * columns, device=images.device).expand(images.shape[0], -1)  # the order of patches
        # PEFT's modules_to_save have copies of the configuration.
        configs = [module.config for module in self.core.embeddings.modules() if hasattr(module, "random_masking")]
        ratios = [config.mask_ratio for config in configs]
        try:
            for config in configs:
                config.mask_ratio = 0.0
            return self.core.embeddings(images, noise=rising, **settings)[0]
        finally:
            for config, ratio in zip(configs, ratios):
                config.mask_ratio = ratio
