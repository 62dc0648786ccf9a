"""facebookresearch/dinov3, and the authors' own variant of it (HINTLab/PlaneCycle, `models/`).

Both are called `DinoVisionTransformer`. The authors' takes volumes and has a `block_type`; its blocks are
the stock ones until a PlaneCycleConverter wraps them in `PlaneCycleBlock`. Neither repository is a
package with a fixed name, so classes are recognised by theirs, and by what they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry.rope import Rope, make_periods
from .adapter import Adapter, SinCos
from .buffers import Computed
from .known import consists_of, contents, is_identity, kind_of, known_activation, why_called
from .parts import Attention, BlockParts, Mlp, Part, Scale
from .projection import known_projection
from .wrapped import read, unwrapped

CLASS = "DinoVisionTransformer"
STOCK = "SelfAttentionBlock"  # of both
BLOCK = "PlaneCycleBlock"  # of the authors' converter, and of ours
_CONTENTS = {  # of modules of both
    STOCK: contents("norm1 attn ls1 norm2 mlp ls2"),
    "SelfAttention": contents("qkv proj proj_drop", "attn_drop"),
    "Mlp": contents("fc1 act fc2 drop"),
    "SwiGLUFFN": contents("w1 w2 w3"),
    "LayerScale": contents("gamma"),
    "PatchEmbed": contents("proj", "norm"),
}
_ATTRIBUTES = ("blocks", "n_storage_tokens", "norm", "patch_embed", "prepare_tokens_with_masks", "rope_embed")


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module's class has this name, and it consists of what that is known to."""
    return type(module).__name__ == name and consists_of(module, _CONTENTS[name])


def is_dinov3(model: object) -> bool:
    """Whether `model` is a DINOv3 of one of the two repositories (facebookresearch/dinov2 has the same name)."""
    named = any(cls.__name__ == CLASS for cls in type(model).__mro__)
    return named and all(hasattr(model, name) for name in _ATTRIBUTES)


def takes_volumes(model: nn.Module) -> bool:
    """Whether a DINOv3 is the authors' variant, made for volumes (B, 3, D, height, width)."""
    return hasattr(model, "block_type")


def holds_converted(blocks: nn.Module) -> bool:
    """Whether any of these is a converted block, of a class made from it (FSDP), or wrapped in something else."""
    return any(cls.__name__ == BLOCK for module in blocks.modules() for cls in type(module).__mro__)


def input_channels(model: nn.Module) -> int:
    """Of the images that a DINOv3 embeds."""
    return read(model.patch_embed, "in_channels", 3)  # its convolution's


def norm_parts(
    model: nn.Module,
    tokens: Tensor,  # (N, g + L, C)
    local: bool = False,
) -> tuple[Tensor, Tensor]:  # (N, g, C), (N, L, C)
    """The final norm of a DINOv3's globals and patches: one for both, or untied ones.

    `local` chooses the norm for the globals of local crops, where the model has one.
    """
    g, untied = model.n_storage_tokens + 1, local and model.untie_global_and_local_cls_norm
    if common_norm(model, local) is None:
        return (model.local_cls_norm if untied else model.cls_norm)(tokens[:, :g]), model.norm(tokens[:, g:])
    normed = model.norm(tokens)
    return normed[:, :g], normed[:, g:]


def common_norm(model: nn.Module, local: bool = False) -> nn.Module | None:
    """The final norm of a DINOv3 where all tokens have one."""
    untied = model.untie_cls_and_patch_norms or (local and model.untie_global_and_local_cls_norm)
    return None if untied else model.norm


class FacebookBlock(BlockParts):
    """`SelfAttentionBlock` of both repositories."""

    def why_not(self) -> str | None:
        drop = self.block.sample_drop_ratio
        if self.block.training and drop:
            return f"it leaves out {drop:g} of the sequences in training"
        return super().why_not()

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        return self.block.attn(normed, rope=sincos)

    def attention(self) -> Attention:
        found = self.block.attn
        if not _is(found, "SelfAttention"):
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        part = Part([found], [found.proj_drop])  # the model's own code leaves attn_drop out as well
        return Attention(found, part, (found.qkv,), found.num_heads, output=found.proj, in_table_dtype=True)

    def mlp(self) -> Mlp:
        found = self.block.mlp
        if _is(found, "SwiGLUFFN"):
            return Mlp(found, Part([found]), "swiglu", (found.w1, found.w2), found.w3)
        if _is(found, "Mlp") and known_activation(found.act, "gelu"):
            return Mlp(found, Part([found, found.act], [found.drop]), "gelu", (found.fc1,), found.fc2)
        return Mlp(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))

    def scale(self, number: int) -> Scale:
        found = getattr(self.block, f"ls{number}")
        known = is_identity(found) or _is(found, "LayerScale")
        unknown = None if known else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "gamma", None), Part([found], unknown=unknown), (found,))


def block_parts(block: nn.Module) -> BlockParts | str:
    """A block of a DINOv3 taken apart, or why it cannot be."""
    return FacebookBlock(block) if _is(block, STOCK) else f"{kind_of(block)} is of an unknown kind"


def embed_parts(
    model: nn.Module,
    images: Tensor,  # (N, 3, height, width)
) -> tuple[Tensor, Tensor] | None:  # patches (N, L, C), globals (1, g, C)
    """`prepare_tokens_with_masks` of slices, without masks and without the concatenation; None where it is another."""
    if not _prepares_as_known(model):
        return None
    return model.patch_embed(images).flatten(1, -2), _globals(model)  # from (N, h, w, C)


def _prepares_as_known(model: nn.Module) -> bool:
    name = "prepare_tokens_with_masks"
    owner = next(cls for cls in type(model).__mro__ if name in cls.__dict__)
    return name not in model.__dict__ and owner.__name__ == CLASS


def _globals(model: nn.Module) -> Tensor:  # (1, g, C)
    cls = model.cls_token + 0 * model.mask_token  # so that every parameter has a gradient
    return torch.cat([cls, model.storage_tokens], dim=1) if model.n_storage_tokens else cls


def patch_projection(model: nn.Module) -> nn.Conv2d | None:
    """`Adapter.patch_projection` of a DINOv3."""
    found = model.patch_embed
    known = _prepares_as_known(model) and _is(found, "PatchEmbed") and why_called(found) is None
    return known_projection(found.proj) if known else None


def from_patches(
    model: nn.Module,
    patches: Tensor,  # (N, L, C)
    *_: object,
) -> tuple[Tensor, Tensor]:  # patches (N, L, C), globals (1, g, C)
    """`Adapter.from_patches` of a DINOv3."""
    norm = getattr(model.patch_embed, "norm", None)
    return patches if norm is None else norm(patches), _globals(model)


class FacebookDINOv3(Adapter):
    """`DinoVisionTransformer` (S, S+, B, L, H+, 7B): RoPE, class token, `n_storage_tokens` registers."""

    has_cls = True

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_dinov3(model)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if holds_converted(model.blocks):
            raise ValueError(
                "model has blocks that a PlaneCycleConverter wrapped; use planecycle_fast.accelerate(model) for it, "
                "or lift the model that was converted"
            )
        self.num_globals = 1 + model.n_storage_tokens
        self.patch_size, self.in_channels = (model.patch_size,) * 2, input_channels(model)
        if model.rope_embed is not None and not hasattr(unwrapped(model.rope_embed), "periods"):
            raise ValueError(
                f"model.rope_embed is a {type(model.rope_embed).__name__}, whose angles on other planes are not known; "
                "expected an embedding with periods"
            )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    def embed(self, images: Tensor) -> Tensor:
        volumes = images[:, :, None] if takes_volumes(self.model) else images  # each slice a volume of its own
        return self.model.prepare_tokens_with_masks(volumes)[0]

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return embed_parts(self.model, images) or super().embed_parts(images)

    def patch_projection(self) -> nn.Conv2d | None:
        return patch_projection(self.model)

    def from_patches(self, patches: Tensor, height: int, width: int, inplace: bool) -> tuple[Tensor, Tensor]:
        return from_patches(self.model, patches)

    def parts(self, block: nn.Module) -> BlockParts | str:
        return block_parts(block)

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return block(tokens, sincos)

    def final_norm(self) -> nn.Module | None:
        return common_norm(self.model)

    def norm(self, tokens: Tensor) -> Tensor:
        norm = common_norm(self.model)
        return torch.cat(norm_parts(self.model, tokens), dim=1) if norm is None else norm(tokens)

    def rope(self, dtype: torch.dtype) -> Rope | None:
        if self.model.rope_embed is None:
            return None
        rope = unwrapped(self.model.rope_embed)
        coord_dtype = rope.dtype or torch.get_default_dtype()
        periods = rope.periods
        if hasattr(rope, "sections"):  # the authors' block_type Flatten3D keeps the periods of three axes
            bounds = (rope.base, rope.min_period, rope.max_period)
            periods = make_periods(rope.D_head // 4, *bounds, dtype=coord_dtype, device=periods.device)
        return Rope(
            periods=periods,
            base=rope.base,
            min_period=rope.min_period if rope.base is None else None,
            max_period=rope.max_period if rope.base is None else None,
            normalize=rope.normalize_coords,
            coord_dtype=coord_dtype,
            promote_coords=False,
            shift=rope.shift_coords,
            jitter=rope.jitter_coords,
            rescale=rope.rescale_coords,
            draw_per_block=True,
        )

    def computed_buffers(self) -> list[Computed]:
        found = None if self.model.rope_embed is None else unwrapped(self.model.rope_embed)
        if found is None or hasattr(found, "sections"):  # periods of three axes, which `rope` does not take
            return []
        bounds = (found.base, None, None) if found.base is not None else (None, found.min_period, found.max_period)
        return [Computed(found, "periods", lambda: make_periods(found.D_head // 4, *bounds))]
