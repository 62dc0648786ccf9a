"""Hugging Face transformers (version 5): DINOv3ViTModel, Dinov2Model, Dinov2WithRegistersModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..rope import Rope
from .base import Adapter, SinCos, is_instance_of, pair


class HuggingFaceDINOv3(Adapter):
    """`DINOv3ViTModel`: RoPE, class token and `config.num_register_tokens` registers."""

    has_cls = True

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_instance_of(model, "transformers.DINOv3ViTModel")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = model.config
        self.num_globals = 1 + config.num_register_tokens
        self.patch_size, self.in_channels = pair(config.patch_size), config.num_channels

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.model, "model", self.model).layer  # moved into an encoder after transformers 5.0

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embeddings(images)

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        sin, cos = sincos
        return block(tokens, position_embeddings=(cos, sin))

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def rope(self, dtype: torch.dtype) -> Rope:
        embedding, config = self.model.rope_embeddings, self.model.config
        return Rope(
            periods=embedding.inv_freq,
            periods_are_inverse=True,
            base=embedding.base,
            coord_dtype=torch.float32,  # whatever the model's dtype
            table_dtype=dtype,
            shift=config.pos_embed_shift,
            jitter=config.pos_embed_jitter,
            rescale=config.pos_embed_rescale,
        )


class HuggingFaceDinov2(Adapter):
    """`Dinov2Model`, `Dinov2WithRegistersModel`: learned positions in each slice, none along D."""

    has_cls = True

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_instance_of(model, "transformers.Dinov2Model", "transformers.Dinov2WithRegistersModel")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = model.config
        self.num_globals = 1 + getattr(config, "num_register_tokens", 0)
        self.patch_size, self.in_channels = pair(config.patch_size), config.num_channels

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layer

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embeddings(images)

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return block(tokens)

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.layernorm(tokens)
