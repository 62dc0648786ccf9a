"""Hugging Face transformers (version 5): DINOv3ViTModel, Dinov2Model, Dinov2WithRegistersModel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..parts import Attention, BlockParts, Mlp, Part, Scale, is_identity, kind_of, known_activation, watched
from ..rope import Rope
from .base import Adapter, SinCos, is_instance_of, pair

_BLOCKS = ("DINOv3ViTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer")
_ATTENTIONS = ("DINOv3ViTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention")
_SCALES = ("DINOv3ViTLayerScale", "Dinov2LayerScale", "Dinov2WithRegistersLayerScale")
_GATED = ("DINOv3ViTGatedMLP", "Dinov2SwiGLUFFN", "Dinov2WithRegistersSwiGLUFFN")
_PLAIN = ("DINOv3ViTMLP", "Dinov2MLP", "Dinov2WithRegistersMLP")


def _is(module: nn.Module, names: tuple[str, ...]) -> bool:
    return kind_of(module) in [f"transformers.{name}" for name in names]


class HuggingFaceBlock(BlockParts):
    """`DINOv3ViTLayer` and the layers of both DINOv2s, of transformers 5 with its renamed projections."""

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        settings = {} if sincos is None else {"position_embeddings": sincos[::-1]}
        out = self.block.attention(normed, **settings)
        return out[0] if isinstance(out, tuple) else out

    def attention(self) -> Attention:
        found = self.block.attention
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        if not _is(found, _ATTENTIONS) or not all([hasattr(found, name) for name in names]):
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        if found.config._attn_implementation != "sdpa":
            chosen = f"the model's attention is {found.config._attn_implementation!r}"
            return Attention(found, Part(unknown=f"{chosen}; only 'sdpa' is replaced"))
        drop = getattr(found, "dropout", getattr(found, "attention_dropout", 0))
        unknown = f"it drops {drop:g} of its weights in training" if found.training and drop else None
        return Attention(
            found,
            Part([found], unknown=unknown),
            (found.q_proj, found.k_proj, found.v_proj),
            heads=getattr(found, "num_heads", None) or found.num_attention_heads,
            scale=found.scaling,
            output=found.o_proj,
        )

    def mlp(self) -> Mlp:
        found = self.block.mlp
        act = next((m for m in (getattr(found, n, None) for n in ("act_fn", "activation_fn", "activation")) if m), None)
        if act is not None and _is(found, _GATED) and known_activation(act, "silu") and hasattr(found, "gate_proj"):
            return Mlp(found, Part([found, act]), "swiglu", (found.gate_proj, found.up_proj), found.down_proj)
        if act is not None and _is(found, _PLAIN) and known_activation(act, "gelu"):
            names = ("up_proj", "down_proj") if hasattr(found, "up_proj") else ("fc1", "fc2")
            first, last = [getattr(found, name) for name in names]
            return Mlp(found, Part([found, act]), "gelu", (first,), last)
        with_act = "" if act is None else f" with {kind_of(act)}"
        return Mlp(found, Part(unknown=f"{kind_of(found)}{with_act} is of an unknown kind"))

    def settings(self) -> Sequence[Any]:
        return (getattr(getattr(self.block.attention, "config", None), "_attn_implementation", None),)

    def scale(self, number: int) -> Scale:
        found, drop = getattr(self.block, f"layer_scale{number}"), self.block.drop_path
        drops = () if is_identity(drop) else (drop,)
        unknown = None if _is(found, _SCALES) else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "lambda1", None), Part([found], drops, unknown), (found, drop))


class _HuggingFace(Adapter):
    """What both families have in common."""

    def parts(self, block: nn.Module) -> BlockParts | str:
        return HuggingFaceBlock(block) if _is(block, _BLOCKS) else f"{kind_of(block)} is of an unknown kind"

    def checkpoint(self, block: nn.Module) -> Callable[..., Any] | None:
        wanted = getattr(block, "gradient_checkpointing", False) and block.training
        return block._gradient_checkpointing_func if wanted else None


class HuggingFaceDINOv3(_HuggingFace):
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

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.embeddings
        if kind_of(found) != "transformers.DINOv3ViTEmbeddings" or watched(found) is not None:
            return super().embed_parts(images)
        patches = found.patch_embeddings(images.to(found.patch_embeddings.weight.dtype)).flatten(2).mT  # (N, L, C)
        return patches, torch.cat([found.cls_token, found.register_tokens], dim=1)

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def final_norm(self) -> nn.Module:
        return self.model.norm

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


class HuggingFaceDinov2(_HuggingFace):
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

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.embeddings
        kinds = ("transformers.Dinov2Embeddings", "transformers.Dinov2WithRegistersEmbeddings")
        drops = found.dropout.training and found.dropout.p
        if kind_of(found) not in kinds or watched(found) is not None or watched(found.dropout) is not None or drops:
            return super().embed_parts(images)
        patches = found.patch_embeddings(images)  # (N, L, C)
        cls = found.cls_token
        if found.position_embeddings is not None:
            counted = torch.cat([cls, patches[:1]], dim=1)  # one slice: the method wants to see its length
            positions = found.interpolate_pos_encoding(counted, *images.shape[2:])  # (1, 1 + L, C)
            patches, cls = patches + positions[:, 1:], cls + positions[:, :1]
        registers = getattr(found, "register_tokens", None)
        return patches, cls if registers is None else torch.cat([cls, registers], dim=1)

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.layernorm(tokens)

    def final_norm(self) -> nn.Module:
        return self.model.layernorm
