"""timm's vision transformers: what they have in common, and `VisionTransformer` (DINOv2, CLIP, SigLIP, DeiT III)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapter import Adapter, SinCos, is_exactly, pair
from .known import comes_from, consists_of, contents, is_identity, kind_of, known_activation, known_norm, why_called
from .parts import Attention, BlockParts, Mlp, Part, Scale
from .projection import known_projection, plus, projected
from .wrapped import own_class, read, unwrapped

_CONTENTS = {  # of timm's modules; they alone do not tell a GluMlp from an Mlp
    "Block": contents("norm1 attn norm2 mlp", "ls1 drop_path1 ls2 drop_path2"),
    "EvaBlock": contents("norm1 attn norm2 mlp", "gamma_1 drop_path1 gamma_2 drop_path2"),
    "Attention": contents("qkv proj", "q_norm k_norm norm gate attn_drop proj_drop"),
    "EvaAttention": contents(
        "proj", "qkv q_proj k_proj v_proj q_norm k_norm norm gate attn_drop proj_drop q_bias k_bias v_bias"
    ),
    "Mlp": contents("fc1 act fc2", "norm drop1 drop2"),
    "GluMlp": contents("fc1 act fc2", "norm drop1 drop2"),
    "SwiGLU": contents("fc1_g fc1_x act fc2", "norm drop1 drop2"),
    "LayerScale": contents("gamma"),
    "PatchEmbed": contents("proj norm"),
}


def is_timms(module: nn.Module, *names: str) -> bool:
    """Whether a module is one of timm's of these names, and consists of what that is known to."""
    name = type(module).__name__
    return name in names and comes_from(module, ("timm.",)) and consists_of(module, _CONTENTS[name])


class TimmParts(BlockParts):
    """What `Block` and `EvaBlock` have in common."""

    def mlp(self) -> Mlp:
        found = self.block.mlp
        kind = kind_of(found)
        if not is_timms(found, "Mlp", "GluMlp", "SwiGLU") or not is_identity(found.norm):
            norm = "" if is_identity(getattr(found, "norm", None)) else " with a norm"
            return Mlp(found, Part(unknown=f"{kind}{norm} is of an unknown kind"))
        gated = kind != "timm.Mlp"
        if not known_activation(found.act, "silu" if gated else "gelu") or getattr(found, "gate_last", False):
            return Mlp(found, Part(unknown=f"{kind} with {kind_of(found.act)} is of an unknown kind"))
        part = Part([found, found.act, found.norm], [found.drop1, found.drop2])
        first = (found.fc1_g, found.fc1_x) if kind == "timm.SwiGLU" else (found.fc1,)
        return Mlp(found, part, "swiglu" if gated else "gelu", first, found.fc2)

    def fused_attention(self, kind: str) -> Attention:
        found = self.block.attn
        if not is_timms(found, kind):
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        if not is_identity(found.norm) or getattr(found, "gate", None) is not None:
            return Attention(found, Part(unknown="it has a norm of its output or a gate of its own"))
        qk_norm = () if is_identity(found.q_norm, found.k_norm) else (found.q_norm, found.k_norm)
        for norm in qk_norm:
            if (reason := known_norm(norm)[1]) is not None:
                return Attention(found, Part(unknown=f"norm of queries or keys: {reason}"))
        if not found.fused_attn:
            return Attention(found, Part(unknown="timm's fused attention is off"))
        part = Part([found, found.norm], [found.attn_drop, found.proj_drop])
        linears = (found.qkv,) if found.qkv is not None else (found.q_proj, found.k_proj, found.v_proj)
        return Attention(found, part, linears, found.num_heads, output=found.proj, qk_norm=qk_norm)


class TimmBlock(TimmParts):
    """A `Block` of `timm.models.VisionTransformer`."""

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        return self.block.attn(normed)

    def attention(self) -> Attention:
        return self.fused_attention("Attention")

    def scale(self, number: int) -> Scale:
        found, drop = getattr(self.block, f"ls{number}"), getattr(self.block, f"drop_path{number}")
        known = is_identity(found) or is_timms(found, "LayerScale")
        unknown = None if known else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "gamma", None), Part([found], [drop], unknown), (found, drop))


class Timm(Adapter):
    """What timm's vision transformers have in common."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_globals = model.num_prefix_tokens
        self.has_cls = model.cls_token is not None
        self.patch_size = pair(read(model.patch_embed, "patch_size", None))
        self.in_channels = read(model.patch_embed, "in_channels", 3)  # of its convolution
        if read(getattr(model, "patch_drop", None) or nn.Identity(), "prob", 0):
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

    def patches(
        self,
        images: Tensor,  # (N, in_channels, height, width)
    ) -> Tensor:  # (N, h*w, C), any strides
        embed = self.model.patch_embed
        if not self._embeds_as_known():
            return embed(images).flatten(1, -2)  # from NHWC with dynamic sizes
        # Past its forward, which formats sizes into messages: torch.compile would take them for constants.
        return embed.norm(projected(embed.proj, images))

    def _embeds_as_known(self) -> bool:
        """Whether the patch embedding is a projection and a norm, and nobody sees that it is not called."""
        embed = self.model.patch_embed
        return is_timms(embed, "PatchEmbed") and why_called(embed) is None and not embed.dynamic_img_pad

    def embeds_in_parts(self) -> bool:
        """Whether nothing but positions, globals and a norm comes between the patch embedding and the blocks."""
        between = [getattr(self.model, name, None) for name in ("patch_drop", "norm_pre")]
        rows = is_identity(between[1]) or known_norm(between[1])[0] is not None
        return is_identity(between[0]) and rows and Part(between, [self.model.pos_drop]).why_not() is None

    def positioned(
        self,
        patches: Tensor,  # (N, L, C); (N, h, w, C) from models for all sizes
    ) -> Tensor:  # (N, g + L, C)
        """What comes between the patch embedding and the norm before the blocks: positions, globals, dropout."""
        return self.model._pos_embed(patches)

    def positions(self) -> Tensor | None:
        found = self.model.pos_embed
        of_globals = 0 if getattr(self.model, "no_embed_class", False) else self.num_globals
        return None if found is None else found[0, of_globals:]

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.embeds_in_parts():
            return super().embed_parts(images)
        return self.completed(self.patches(images), *images.shape[2:], inplace=False)

    def patch_projection(self) -> nn.Conv2d | None:
        known = self.embeds_in_parts() and self._embeds_as_known()
        return known_projection(self.model.patch_embed.proj) if known else None

    def from_patches(self, patches: Tensor, height: int, width: int, inplace: bool) -> tuple[Tensor, Tensor]:
        return self.completed(self.model.patch_embed.norm(patches), height, width, inplace)

    def completed(
        self,
        patches: Tensor,  # (N, L, C), of the patch embedding
        height: int,
        width: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:  # patches (N, L, C), globals (1, g, C)
        """What comes between the patch embedding and the blocks, of models that embed in parts."""
        patches, globals_ = self.with_positions(patches, height, width, inplace)
        norm = getattr(self.model, "norm_pre", None)
        return (patches, globals_) if is_identity(norm) else (norm(patches), norm(globals_))

    def with_positions(
        self,
        patches: Tensor,  # (N, L, C), of the patch embedding
        height: int,
        width: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:  # patches (N, L, C), globals (1, g, C)
        """Both with their positions."""
        g, grid = self.num_globals, [n // p for n, p in zip((height, width), self.patch_size)]
        empty = patches.new_zeros(1, *(grid if self.takes_all_sizes else [math.prod(grid)]), patches.shape[2])
        bare = self.positioned(empty)  # (1, g + L, C): globals and positions
        return patches if self.model.pos_embed is None else plus(patches, bare[:, g:], inplace), bare[:, :g]

    def check_image_size(self, height: int, width: int) -> None:
        super().check_image_size(height, width)
        fixed = tuple(read(self.model.patch_embed, "img_size", None) or ())
        if not self.takes_all_sizes and fixed and fixed != (height, width):
            any_size = hasattr(self.model, "dynamic_img_size")
            other = "dynamic_img_size=True for other sizes" if any_size else f"img_size=({height}, {width})"
            raise ValueError(
                f"volume's slices must have the model's fixed size, {fixed[0]} x {fixed[1]} pixels, got "
                f"{height} x {width}; build the model with {other}"
            )

    @property
    def takes_all_sizes(self) -> bool:
        """Whether the model was built for slices of any size."""
        return getattr(self.model, "dynamic_img_size", False)

    def run(self, call: Callable[..., Tensor], tokens: Tensor, **kwargs: Tensor) -> Tensor:
        again = self.checkpoint(self.model)  # as timm's own forward does
        return call(tokens, **kwargs) if again is None else again(call, tokens, **kwargs)


def has_plain_patches(model: nn.Module) -> bool:
    """Not a hybrid, whose patches are those of a CNN's feature map."""
    timms = [m for m in model.patch_embed.modules() if own_class(m).__module__.startswith("timm.")]
    return bool(timms) and own_class(timms[0]).__name__ == "PatchEmbed"  # the first: within whatever is around it


class TimmVisionTransformer(Timm):
    """`timm.models.VisionTransformer`: learned positions in each slice (before or after the registers), or none.

    The distillation token of `VisionTransformerDistilled` is its only register.
    """

    @staticmethod
    def matches(model: nn.Module) -> bool:
        known = is_exactly(model, "timm.VisionTransformer") or is_exactly(model, "timm.VisionTransformerDistilled")
        return known and has_plain_patches(model)

    def embed(self, images: Tensor) -> Tensor:
        tokens = self.positioned(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def parts(self, block: nn.Module) -> BlockParts | str:
        return TimmBlock(block) if is_timms(block, "Block") else f"{kind_of(block)} is of an unknown kind"

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self.run(block, tokens)


def call_with_qkv(
    block: nn.Module,
    tokens: Tensor,  # (N, g + L, C)
    **positions: Tensor | None,
) -> Tensor:  # (N, g + L, C)
    """The block, or attention, such that its `qkv` is called where it is more than a linear layer.

    timm's `_qkvb` models, EVA and BEiT pass qkv's bare weight to F.linear, so that LoRA, quantisation or a hook on it
    have no effect. With `qkv_bias_separate` timm calls the module and adds the bias after it.
    """
    changed = [m for m in block.modules() if _ignores_qkv_module(m)]
    for attention in changed:
        attention.qkv_bias_separate = True
    try:
        return block(tokens, **positions)
    finally:
        for attention in changed:
            attention.qkv_bias_separate = False


def _ignores_qkv_module(module: nn.Module) -> bool:
    if vars(module).get("qkv_bias_separate", True) or module.q_bias is None:  # True: of another kind, or around one
        return False
    return why_called(module.qkv, nn.Linear) is not None
