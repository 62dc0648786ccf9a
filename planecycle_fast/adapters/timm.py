"""timm: DINOv3 (`Eva` with its RoPE; S, S+, B, L, H+, 7B, `_qkvb`) and `VisionTransformer` (DINOv2 ...)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..parts import (
    Attention,
    BlockParts,
    Mlp,
    Part,
    Scale,
    comes_from,
    consists_of,
    contents,
    is_identity,
    kind_of,
    known_activation,
    watched,
)
from ..rope import Rope
from ..wrapped import own_class, read, unwrapped
from .base import Adapter, SinCos, is_exactly, pair

_CONTENTS = {  # of timm's modules; they alone do not tell a GluMlp from an Mlp
    "Block": contents("norm1 attn norm2 mlp", "ls1 drop_path1 ls2 drop_path2"),
    "EvaBlock": contents("norm1 attn norm2 mlp", "gamma_1 drop_path1 gamma_2 drop_path2"),
    "Attention": contents("qkv proj", "q_norm k_norm norm gate attn_drop proj_drop"),
    "EvaAttention": contents("qkv proj", "q_norm k_norm norm gate attn_drop proj_drop q_bias k_bias v_bias"),
    "Mlp": contents("fc1 act fc2", "norm drop1 drop2"),
    "GluMlp": contents("fc1 act fc2", "norm drop1 drop2"),
    "SwiGLU": contents("fc1_g fc1_x act fc2", "norm drop1 drop2"),
    "LayerScale": contents("gamma"),
    "PatchEmbed": contents("proj norm"),
}


def _is(module: nn.Module, *names: str) -> bool:
    """Whether a module is one of timm's of these names, and consists of what that is known to."""
    name = type(module).__name__
    return name in names and comes_from(module, ("timm.",)) and consists_of(module, _CONTENTS[name])


class _TimmBlock(BlockParts):
    """What `Block` and `EvaBlock` have in common."""

    def mlp(self) -> Mlp:
        found = self.block.mlp
        kind = kind_of(found)
        if not _is(found, "Mlp", "GluMlp", "SwiGLU") or not is_identity(found.norm):
            norm = "" if is_identity(getattr(found, "norm", None)) else " with a norm"
            return Mlp(found, Part(unknown=f"{kind}{norm} is of an unknown kind"))
        gated = kind != "timm.Mlp"
        if not known_activation(found.act, "silu" if gated else "gelu") or getattr(found, "gate_last", False):
            return Mlp(found, Part(unknown=f"{kind} with {kind_of(found.act)} is of an unknown kind"))
        part = Part([found, found.act, found.norm], [found.drop1, found.drop2])
        first = (found.fc1_g, found.fc1_x) if kind == "timm.SwiGLU" else (found.fc1,)
        return Mlp(found, part, "swiglu" if gated else "gelu", first, found.fc2)

    def _attention(self, kind: str) -> Attention:
        found = self.block.attn
        if not _is(found, kind):
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        between = (found.q_norm, found.k_norm, found.norm)
        if not is_identity(*between) or getattr(found, "gate", None) is not None:
            return Attention(found, Part(unknown="it has norms or a gate of its own"))
        if not found.fused_attn:
            return Attention(found, Part(unknown="timm's fused attention is off"))
        part = Part([found, *between], [found.attn_drop, found.proj_drop])
        return Attention(found, part, (found.qkv,), found.num_heads, output=found.proj)


class TimmBlock(_TimmBlock):
    """A `Block` of `timm.models.VisionTransformer`."""

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        return self.block.attn(normed)

    def attention(self) -> Attention:
        return self._attention("Attention")

    def scale(self, number: int) -> Scale:
        found, drop = getattr(self.block, f"ls{number}"), getattr(self.block, f"drop_path{number}")
        known = is_identity(found) or _is(found, "LayerScale")
        unknown = None if known else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "gamma", None), Part([found], [drop], unknown), (found, drop))


class TimmEvaBlock(_TimmBlock):
    """An `EvaBlock`, whose LayerScale is a parameter of its own."""

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        return _call_qkv_module(self.block.attn, normed, torch.cat(sincos, dim=-1))

    def attention(self) -> Attention:
        found = self._attention("EvaAttention")
        if found.part.unknown is not None or found.module.q_bias is None:
            return found
        return Attention(found.module, found.part, (_BiasedQkv(found.module),), found.heads, output=found.output)

    def scale(self, number: int) -> Scale:
        gamma, drop = getattr(self.block, f"gamma_{number}"), getattr(self.block, f"drop_path{number}")
        return Scale(gamma, Part((), [drop]), (drop,), parameter=gamma)


class _BiasedQkv:
    """qkv of a `_qkvb` model, whose bias is kept in three parts beside it."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    @property
    def fresh(self) -> bool:
        """Whether what it returns is nobody else's."""
        return not _is_more_than_linear(self.attention.qkv)

    def __call__(
        self,
        x: Tensor,  # (N, rows, C)
    ) -> Tensor:  # (N, rows, 3*heads*hd)
        return F.linear(x, *self.weight_and_bias()) if self.fresh else self.attention.qkv(x) + self._bias()

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:  # (3*heads*hd, C), (3*heads*hd,)
        return self.attention.qkv.weight, self._bias()

    def _bias(self) -> Tensor:  # (3*heads*hd,)
        found = self.attention
        return torch.cat((found.q_bias, found.k_bias, found.v_bias))


class _Timm(Adapter):
    """What timm's vision transformers have in common."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_globals = model.num_prefix_tokens
        self.has_cls = model.cls_token is not None
        self.patch_size = pair(read(model.patch_embed, "patch_size", None))
        self.in_channels = read(model.patch_embed, "in_channels", 3)  # of its convolution
        if read(model.patch_drop or nn.Identity(), "prob", 0):
            raise ValueError(
                "model drops patches in training (patch_drop_rate > 0), which leaves no planes to attend along; "
                "expected patch_drop_rate=0"
            )
        if not isinstance(self.blocks, (nn.Sequential, nn.ModuleList)):
            raise ValueError(
                f"model.blocks are within a {type(self.blocks).__name__}, whose own code would be left out; "
                "expected a Sequential or ModuleList"
            )

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return unwrapped(self.model.blocks)

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def final_norm(self) -> nn.Module:
        return self.model.norm

    def checkpoint(self, block: nn.Module) -> Callable[..., Any] | None:
        return partial(checkpoint, use_reentrant=False) if self.model.grad_checkpointing else None

    def _patches(
        self,
        images: Tensor,  # (N, in_channels, height, width)
    ) -> Tensor:  # (N, h*w, C), any strides
        embed = self.model.patch_embed
        if not _is(embed, "PatchEmbed") or watched(embed) is not None or embed.dynamic_img_pad:
            return embed(images).flatten(1, -2)  # from NHWC with dynamic sizes
        # Past its forward, which formats sizes into messages: torch.compile would take them for constants.
        return embed.norm(embed.proj(images).flatten(2).transpose(1, 2))

    def _embeds_in_parts(self) -> bool:
        """Whether nothing but positions and globals comes between the patch embedding and the blocks."""
        model = self.model
        idle = Part([model.patch_drop, model.norm_pre], [model.pos_drop])
        return is_identity(model.patch_drop, model.norm_pre) and idle.why_not() is None

    def check_image_size(self, height: int, width: int) -> None:
        super().check_image_size(height, width)
        fixed = tuple(read(self.model.patch_embed, "img_size", None) or ())
        if not self.model.dynamic_img_size and fixed and fixed != (height, width):
            raise ValueError(
                f"volume's slices must have the model's fixed size, {fixed[0]} x {fixed[1]} pixels, got "
                f"{height} x {width}; build the model with dynamic_img_size=True for other sizes"
            )

    def _run(self, call: Callable[..., Tensor], tokens: Tensor, **kwargs: Tensor) -> Tensor:
        if self.model.grad_checkpointing:  # as timm's own forward does
            return checkpoint(call, tokens, use_reentrant=False, **kwargs)
        return call(tokens, **kwargs)


def _plain_patches(model: nn.Module) -> bool:
    """Not a hybrid, whose patches are those of a CNN's feature map."""
    timms = [m for m in model.patch_embed.modules() if own_class(m).__module__.startswith("timm.")]
    return bool(timms) and own_class(timms[0]).__name__ == "PatchEmbed"  # the first: within whatever is around it


class TimmVisionTransformer(_Timm):
    """`timm.models.VisionTransformer`: learned positions in each slice (before or after the registers)."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_exactly(model, "timm.VisionTransformer") and _plain_patches(model)

    def embed(self, images: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self._embeds_in_parts():
            return super().embed_parts(images)
        patches, g = self._patches(images), self.num_globals
        grid = [n // p for n, p in zip(images.shape[2:], self.patch_size)]
        empty = patches.new_zeros(1, *(grid if self.model.dynamic_img_size else [math.prod(grid)]), patches.shape[2])
        bare = self.model._pos_embed(empty)  # (1, g + L, C): globals and positions
        return patches if self.model.pos_embed is None else patches + bare[:, g:], bare[:, :g]

    def parts(self, block: nn.Module) -> BlockParts | str:
        return TimmBlock(block) if _is(block, "Block") else f"{kind_of(block)} is of an unknown kind"

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self._run(block, tokens)


class TimmDINOv3(_Timm):
    """`timm.models.Eva` as DINOv3 uses it: axial RoPE in the rotate-half layout, no absolute positions."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        if not is_exactly(model, "timm.Eva") or model.rope is None:
            return False
        rope = unwrapped(model.rope)
        return (
            _plain_patches(model)
            and own_class(rope).__name__ == "RotaryEmbeddingDinoV3"
            and (rope.rotate_half, rope.grid_offset, rope.grid_indexing) == (True, 0, "ij")
            and model.pos_embed is None
        )

    def embed(self, images: Tensor) -> Tensor:
        # Eva._pos_embed without its RoPE tables: those depend on the plane and are drawn by `lift`.
        patches, globals_ = self._embedded(images)
        if self.num_globals:
            patches = torch.cat([globals_.expand(len(patches), -1, -1), patches], dim=1)
        return self.model.norm_pre(self.model.pos_drop(patches))  # drawn in the order of memory

    def _embedded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self._patches(images)
        found = [t for t in (self.model.cls_token, self.model.reg_token) if t is not None]
        return patches, torch.cat(found, dim=1) if found else patches.new_empty(1, 0, patches.shape[2])

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._embedded(images) if self._embeds_in_parts() else super().embed_parts(images)

    def parts(self, block: nn.Module) -> BlockParts | str:
        return TimmEvaBlock(block) if _is(block, "EvaBlock") else f"{kind_of(block)} is of an unknown kind"

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self._run(partial(_call_qkv_module, block), tokens, rope=torch.cat(sincos, dim=-1))

    def rope(self, dtype: torch.dtype) -> Rope:
        rope = unwrapped(self.model.rope)
        periods_given = rope.min_period is not None and rope.max_period is not None
        return Rope(
            periods=rope.periods,
            base=None if periods_given else rope.temperature,
            min_period=rope.min_period if periods_given else None,
            max_period=rope.max_period if periods_given else None,
            normalize=rope.normalize_coords,
            coord_dtype=torch.float32,
            coords_as_periods=True,  # which up to timm 1.0.30 are cast with the model
            shift=rope.shift_coords,
            jitter=rope.jitter_coords,
            rescale=rope.rescale_coords,
            draw_device=torch.device("cpu"),  # where timm builds its grid
        )


def _call_qkv_module(block: nn.Module, tokens: Tensor, rope: Tensor) -> Tensor:
    """The block, such that its `qkv` is called where it is more than a linear layer.

    timm's `_qkvb` models pass qkv's bare weight to F.linear, so that LoRA, quantisation or a hook on it
    have no effect. With `qkv_bias_separate` timm calls the module and adds the bias after it.
    """
    changed = [m for m in block.modules() if _ignores_qkv_module(m)]
    for attention in changed:
        attention.qkv_bias_separate = True
    try:
        return block(tokens, rope=rope)
    finally:
        for attention in changed:
            attention.qkv_bias_separate = False


def _ignores_qkv_module(module: nn.Module) -> bool:
    if vars(module).get("qkv_bias_separate", True) or module.q_bias is None:  # True: of another kind, or around one
        return False
    return _is_more_than_linear(module.qkv)


def _is_more_than_linear(module: nn.Module) -> bool:
    return type(module) is not nn.Linear or watched(module) is not None
