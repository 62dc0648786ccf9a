"""timm: DINOv3 (`Eva` with its RoPE; S, S+, B, L, H+, 7B, `_qkvb`) and `VisionTransformer` (DINOv2 ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..rope import Rope
from .base import Adapter, SinCos, is_exactly, pair


class _Timm(Adapter):
    """What timm's vision transformers have in common."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_globals = model.num_prefix_tokens
        self.has_cls = model.cls_token is not None
        self.patch_size, self.in_channels = pair(model.patch_embed.patch_size), model.patch_embed.proj.in_channels
        if getattr(model.patch_drop, "prob", 0):
            raise ValueError(
                "model drops patches in training (patch_drop_rate > 0), which leaves no planes to attend along; "
                "expected patch_drop_rate=0"
            )

    @property
    def blocks(self) -> Iterable[nn.Module]:
        return self.model.blocks

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def check_image_size(self, height: int, width: int) -> None:
        super().check_image_size(height, width)
        fixed = tuple(self.model.patch_embed.img_size or ())
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
    return type(model.patch_embed).__name__ == "PatchEmbed"


class TimmVisionTransformer(_Timm):
    """`timm.models.VisionTransformer`: learned positions in each slice (before or after the registers)."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_exactly(model, "timm.VisionTransformer") and _plain_patches(model)

    def embed(self, images: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(self.model.patch_drop(tokens))

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self._run(block, tokens)


class TimmDINOv3(_Timm):
    """`timm.models.Eva` as DINOv3 uses it: axial RoPE in the rotate-half layout, no absolute positions."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        rope = getattr(model, "rope", None)
        return (
            is_exactly(model, "timm.Eva")
            and _plain_patches(model)
            and type(rope).__name__ == "RotaryEmbeddingDinoV3"
            and (rope.rotate_half, rope.grid_offset, rope.grid_indexing) == (True, 0, "ij")
            and model.pos_embed is None
        )

    def embed(self, images: Tensor) -> Tensor:
        # Eva._pos_embed without its RoPE tables: those depend on the plane and are drawn by `lift`.
        model, patches = self.model, self.model.patch_embed(images)
        patches = patches.flatten(1, -2)  # (N, h*w, C), from NHWC with dynamic sizes
        globals_ = [t.expand(len(patches), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
        tokens = torch.cat([*globals_, patches], dim=1) if globals_ else patches
        return model.norm_pre(model.pos_drop(tokens))

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self._run(partial(_call_qkv_module, block), tokens, rope=torch.cat(sincos, dim=-1))

    def rope(self, dtype: torch.dtype) -> Rope:
        rope = self.model.rope
        periods_given = rope.min_period is not None and rope.max_period is not None
        return Rope(
            periods=rope.periods,
            base=None if periods_given else rope.temperature,
            min_period=rope.min_period if periods_given else None,
            max_period=rope.max_period if periods_given else None,
            normalize=rope.normalize_coords,
            coord_dtype=torch.float32,
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
    if getattr(module, "q_bias", None) is None or module.qkv_bias_separate:
        return False
    qkv = module.qkv
    hooks = (qkv._forward_hooks, qkv._forward_pre_hooks, qkv._backward_hooks, qkv._backward_pre_hooks)
    return type(qkv) is not nn.Linear or any(hooks)
