"""Hugging Face transformers (version 5): DINOv3ViTModel, Dinov2Model, Dinov2WithRegistersModel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..parts import (
    Attention,
    BlockParts,
    Contents,
    Mlp,
    Part,
    Scale,
    comes_from,
    consists_of,
    contents,
    kind_of,
    known_activation,
    watched,
)
from ..rope import Rope
from .base import Adapter, SinCos, is_instance_of, pair

_OWN = tuple(f"transformers.models.{family}." for family in ("dinov2", "dinov2_with_registers", "dinov3_vit"))
# Names and contents of parts have changed since transformers 5.0. Within these models contents say what a part is.
_BLOCK = contents("norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2")
_SCALE = contents("lambda1")
_ATTENTION = contents("q_proj k_proj v_proj o_proj")
_NESTED = contents("attention output"), contents("query key value"), contents("dense dropout")  # DINOv2 in 5.17
_ACTIVATIONS = ("act_fn", "activation_fn", "activation")
_GATED = contents("gate_proj up_proj down_proj", " ".join(_ACTIVATIONS))
_PLAIN = [(first, last, contents(f"{first} {last}", " ".join(_ACTIVATIONS)))
          for first, last in (("up_proj", "down_proj"), ("fc1", "fc2"))]  # fmt: skip
_PACKED = contents("weights_in weights_out")  # gate and value in one, SiLU as a function
_DINOV2_EMBEDDINGS = contents("cls_token patch_embeddings position_embeddings dropout", "mask_token register_tokens")
_DINOV3_EMBEDDINGS = contents("cls_token patch_embeddings register_tokens", "mask_token")
_DROPS = ("dropout", "attention_dropout", "dropout_prob")  # of attention's weights


def _made_of(module: nn.Module, known: Contents) -> bool:
    """Whether a module is one of these models' own, and consists of just this."""
    return comes_from(module, _OWN) and consists_of(module, known)


class HuggingFaceBlock(BlockParts):
    """`DINOv3ViTLayer` and the layers of both DINOv2s, of transformers 5."""

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        settings = {} if sincos is None else {"position_embeddings": sincos[::-1]}
        out = self.block.attention(normed, **settings)
        return out[0] if isinstance(out, tuple) else out

    def _within(self) -> nn.Module:
        """The module that attends: DINOv2's was inside another, beside the projection, up to transformers 5.17."""
        return getattr(self.block.attention, "attention", self.block.attention)

    def attention(self) -> Attention:
        found, within = self.block.attention, self._within()
        if _made_of(found, _ATTENTION):
            qkv, output, part = (found.q_proj, found.k_proj, found.v_proj), found.o_proj, Part([found])
        elif _made_of(found, _NESTED[0]) and _made_of(within, _NESTED[1]) and _made_of(found.output, _NESTED[2]):
            qkv, output = (within.query, within.key, within.value), found.output.dense
            part = Part([found, within, found.output], [found.output.dropout])
        else:
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        drop = next((p for p in (getattr(within, name, None) for name in _DROPS) if p is not None), 0)
        if (chosen := within.config._attn_implementation) != "sdpa":
            part = Part(unknown=f"the model's attention is {chosen!r}; only 'sdpa' is replaced")
        elif getattr(within, "is_causal", False):
            part = Part(unknown="it is causal")
        elif within.training and drop:
            part = Part(unknown=f"it drops {drop:g} of its weights in training")
        heads = getattr(within, "num_heads", None) or within.num_attention_heads
        return Attention(found, part, qkv, heads, scale=within.scaling, output=output)

    def mlp(self) -> Mlp:
        found = self.block.mlp
        if _made_of(found, _PACKED):
            return Mlp(found, Part([found]), "swiglu", (found.weights_in,), found.weights_out)
        act = next((m for m in (getattr(found, name, None) for name in _ACTIVATIONS) if m), None)
        if act is not None and _made_of(found, _GATED) and known_activation(act, "silu"):
            return Mlp(found, Part([found, act]), "swiglu", (found.gate_proj, found.up_proj), found.down_proj)
        for first, last, known in _PLAIN:
            if act is not None and _made_of(found, known) and known_activation(act, "gelu"):
                return Mlp(found, Part([found, act]), "gelu", (getattr(found, first),), getattr(found, last))
        with_act = "" if act is None else f" with {kind_of(act)}"
        return Mlp(found, Part(unknown=f"{kind_of(found)}{with_act} is of an unknown kind"))

    def settings(self) -> Sequence[Any]:
        return (getattr(getattr(self._within(), "config", None), "_attn_implementation", None),)

    def scale(self, number: int) -> Scale:
        found, drop = getattr(self.block, f"layer_scale{number}"), self.block.drop_path
        unknown = None if _made_of(found, _SCALE) else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "lambda1", None), Part([found], [drop], unknown), (found, drop))


class _HuggingFace(Adapter):
    """What both families have in common."""

    def parts(self, block: nn.Module) -> BlockParts | str:
        return HuggingFaceBlock(block) if _made_of(block, _BLOCK) else f"{kind_of(block)} is of an unknown kind"

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
        if not _made_of(found, _DINOV3_EMBEDDINGS) or watched(found) is not None:
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
        known = _made_of(found, _DINOV2_EMBEDDINGS)
        if not known or Part([found], [found.dropout]).why_not() or not hasattr(found.patch_embeddings, "projection"):
            return super().embed_parts(images)
        images = images.to(found.patch_embeddings.projection.weight.dtype)  # the embeddings' to do in transformers 5.0
        patches = found.patch_embeddings(images)  # (N, L, C)
        cls = found.cls_token
        counted = torch.cat([cls, patches[:1]], dim=1)  # one slice: the method wants to see its length
        positions = found.interpolate_pos_encoding(counted, *images.shape[2:])  # (1, 1 + L, C)
        patches, cls = patches + positions[:, 1:], cls + positions[:, :1]
        registers = getattr(found, "register_tokens", None)
        return patches, cls if registers is None else torch.cat([cls, registers], dim=1)

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.layernorm(tokens)

    def final_norm(self) -> nn.Module:
        return self.model.layernorm
