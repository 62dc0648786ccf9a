"""Hugging Face transformers: DINOv3, DINOv2 and DINOv2 with registers, as models and as backbones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry.rope import Rope, make_periods
from .adapter import SinCos
from .buffers import Computed
from .huggingface import HuggingFace, LearnedPositions
from .huggingface_parts import made_of
from .known import contents, why_called
from .projection import known_projection, projected

_DINOV3_EMBEDDINGS = contents("cls_token patch_embeddings register_tokens", "mask_token")


class HuggingFaceDINOv3(HuggingFace):
    """`DINOv3ViTModel`, `DINOv3ViTBackbone`: RoPE, class token and `config.num_register_tokens` registers.

    Of a backbone `lift` gives what it makes of its last stage, whichever stages it was asked for; stage ``i`` is
    ``LiftedModel.intermediate(volume, [i - 1])``.
    """

    names = ("DINOv3ViTModel", "DINOv3ViTBackbone")
    has_cls = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_globals = 1 + self.config.num_register_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.model, "model", self.model).layer  # moved into an encoder after transformers 5.0

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embeddings(self._cast(images))

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        sin, cos = sincos
        return block(tokens, position_embeddings=(cos, sin))

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_known():
            return super().embed_parts(images)
        patches = projected(self.model.embeddings.patch_embeddings, self._cast(images))
        return self.from_patches(patches, *images.shape[2:], inplace=False)

    def patch_projection(self) -> nn.Conv2d | None:
        return known_projection(self.model.embeddings.patch_embeddings) if self._is_known() else None

    def from_patches(self, patches: Tensor, height: int, width: int, inplace: bool) -> tuple[Tensor, Tensor]:
        found = self.model.embeddings
        return patches, torch.cat([found.cls_token, found.register_tokens], dim=1)

    def _is_known(self) -> bool:
        """Whether the embeddings do what `embed_parts` does, and nobody sees that they are not called."""
        found = self.model.embeddings
        return made_of(found, _DINOV3_EMBEDDINGS) and why_called(found) is None

    def final_norm(self) -> nn.Module:
        return self.model.norm

    def rope(self, dtype: torch.dtype) -> Rope:
        embedding, config = self.model.rope_embeddings, self.config
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

    def computed_buffers(self) -> list[Computed]:
        found = self.model.rope_embeddings
        return [Computed(found, "inv_freq", lambda: 1 / make_periods(len(found.inv_freq), found.base))]


class HuggingFaceDinov2(LearnedPositions):
    """`Dinov2Model`, `Dinov2WithRegistersModel`: registers come after the positions, and have none."""

    names = ("Dinov2Model", "Dinov2WithRegistersModel")
    known = contents("cls_token patch_embeddings position_embeddings dropout", "mask_token register_tokens")
    asked = False
    resampled_in_float32 = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_globals = 1 + getattr(self.config, "num_register_tokens", 0)
        self.antialias = hasattr(self.config, "num_register_tokens")  # those with registers do

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layer


class HuggingFaceDinov2Backbone(HuggingFaceDinov2):
    """`Dinov2Backbone`, `Dinov2WithRegistersBackbone`: the final norm is there if ``config.apply_layernorm``.

    `lift` gives the last stage, whichever stages were asked for; stage ``i`` is
    ``LiftedModel.intermediate(volume, [i - 1])``.
    """

    names = ("Dinov2Backbone", "Dinov2WithRegistersBackbone")

    def final_norm(self) -> nn.Module | None:
        return self.model.layernorm if self.config.apply_layernorm else None
