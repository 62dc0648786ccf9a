"""timm's `Eva`: DINOv3 (S, S+, B, L, H+, 7B, `_qkvb`), EVA, EVA02, Perception Encoders and ViTs with their RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.planes import DHW, Plane
from ..geometry.rope import Augmentation, Rope, make_periods, section_sizes
from ..runtime.tracing import recorder
from .adapter import SinCos, is_exactly
from .buffers import Computed
from .known import kind_of, why_called
from .parts import Attention, BlockParts, Part, Scale
from .timm import Timm, TimmParts, call_with_qkv, has_plain_patches, is_timms
from .wrapped import own_class, unwrapped

MIXED = "RotaryEmbeddingMixed"  # of learned frequencies, each head's and each block's own


class TimmEvaBlock(TimmParts):
    """An `EvaBlock`, whose LayerScale is a parameter of its own."""

    def __init__(self, block: nn.Module, adapter: TimmEva) -> None:
        super().__init__(block)
        self.adapter = adapter

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        return call_with_qkv(self.block.attn, normed, rope=self.adapter.table(self.block, sincos))

    def attention(self) -> Attention:
        found = self.fused_attention("EvaAttention")
        if found.part.unknown is not None:
            return found
        if (reason := self.adapter.turns_otherwise()) is not None:
            return Attention(found.module, Part(unknown=reason))
        if found.module.q_bias is None:
            return found
        return replace(found, qkv=(_BiasedQkv(found.module),))

    def scale(self, number: int) -> Scale:
        gamma, drop = getattr(self.block, f"gamma_{number}"), getattr(self.block, f"drop_path{number}")
        return Scale(gamma, Part((), [drop]), (drop,), parameter=gamma)


class _BiasedQkv:
    """qkv of a `_qkvb` model, whose bias is kept in three parts beside it."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    @property
    def is_plain(self) -> bool:
        """See `description.is_plain`."""
        return why_called(self.attention.qkv, nn.Linear) is None

    def __call__(
        self,
        x: Tensor,  # (N, rows, C)
    ) -> Tensor:  # (N, rows, 3*heads*hd)
        return F.linear(x, *self.weight_and_bias()) if self.is_plain else self.attention.qkv(x) + self._bias()

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:  # (3*heads*hd, C), (3*heads*hd,)
        return self.attention.qkv.weight, self._bias()

    def _bias(self) -> Tensor:  # (3*heads*hd,)
        found = self.attention
        return torch.cat((found.q_bias, found.k_bias, found.v_bias))


class HostTables:
    """Sine and cosine of a plane as timm's own attention takes them, in place of a `Rope`.

    `RotaryEmbeddingCat`, EVA's: an axis owns half of the channels, pair by pair of neighbours; token i turns by
    ``(i + offset) * reference / n / temperature ** (j / pairs)``, without a reference size by ``i + offset``. Of other
    planes likewise: the first of the plane's axes takes the place of the height. Three axes share the channels as
    they do in DINOv3's flatten3d (`section_sizes`), with all temperatures on each.
    `RotaryEmbeddingMixed`: all channels turn by frequencies along both axes, learned for two.
    """

    augments = draw_per_block = False

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding
        self.mixed = own_class(embedding).__name__ == MIXED
        self.head_dim = embedding.dim // embedding.num_heads if self.mixed else embedding.dim

    def sincos(self, grid: Sequence[int], augmentation: Augmentation | None = None) -> SinCos:
        """(L, hd) each, L = n0*n1[*n2]; of mixed frequencies (blocks, heads, L, hd)."""
        found = self.embedding
        if self.mixed:
            return found.get_embed(shape=[*grid]).chunk(2, dim=-1)
        cached = getattr(found, "pos_embed", None)  # of models for one size
        # Comparing sizes would make them constants of what torch.export records.
        if cached is not None and recorder() != "torch.export" and tuple(found.feat_shape) == tuple(grid):
            return cached.chunk(2, dim=-1)
        return self.computed(grid, torch.float32 if cached is None else cached.dtype, getattr(found, "bands", None))

    def computed(
        self,
        grid: Sequence[int],
        dtype: torch.dtype = torch.float32,
        bands: Tensor | None = None,  # (hd/4,): frequencies of an axis, if they are kept
    ) -> SinCos:
        """(L, hd) each, of the embedding's settings."""
        found = self.embedding
        turns = self._turns(grid, bands).flatten(0, -2)  # (L, hd/2)
        turns = turns.tile(2) if getattr(found, "rotate_half", False) else turns.repeat_interleave(2, dim=-1)
        return turns.sin().to(dtype), turns.cos().to(dtype)

    def frequencies(self, count: int | None = None) -> Tensor:  # (count,)
        """Of an axis that has so many, hd/4 by default."""
        count = self.head_dim // 4 if count is None else count
        device = next((b.device for b in self.embedding.buffers()), None)
        return 1.0 / float(self.embedding.temperature) ** (torch.arange(count, device=device).float() / count)

    def _turns(
        self,
        grid: Sequence[int],
        bands: Tensor | None,  # (hd/4,)
    ) -> Tensor:  # (n0, n1[, n2], hd/2)
        found, axes = self.embedding, range(len(grid))
        device = next((b.device for b in found.buffers()), None)
        sections = section_sizes(self.head_dim, len(grid))
        reference = found.ref_feat_shape
        if reference is not None:
            reference = (reference[0], *reference)[-len(grid) :]  # of a depth, that of the height
        tables = []
        for axis, n, count in zip(axes, grid, sections):
            at = torch.arange(n, dtype=torch.float32, device=device) + found.grid_offset
            at = at if reference is None else at / n * reference[axis]
            frequencies = self.frequencies(count) if bands is None or len(bands) != count else bands
            table = at[:, None] * frequencies  # (n, count)
            tables.append(table.view([n if a == axis else 1 for a in axes] + [count]).expand(*grid, -1))
        return torch.cat(tables[::-1] if found.grid_indexing == "xy" else tables, dim=-1)


class TimmEva(Timm):
    """`timm.models.Eva`: learned positions, rotary ones of each plane, or both."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_exactly(model, "timm.Eva") and has_plain_patches(model) and _known_rope(model.rope)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        rope = self._embedding()
        drawn = [n for n in ("shift_coords", "jitter_coords", "rescale_coords") if getattr(rope, n, None) is not None]
        if drawn and self.turns_otherwise() is not None:
            raise ValueError(
                f"model.rope moves its coordinates at random in training ({', '.join(drawn)}), which is not known for "
                "other planes; expected None"
            )

    def _embedding(self) -> nn.Module | None:
        return None if self.model.rope is None else unwrapped(self.model.rope)

    def turns_otherwise(self) -> str | None:
        """Why the operation `rope` does not do what the model's attention does, or None."""
        if self.model.rope is None:
            return None
        return f"it turns by timm's {own_class(self._embedding()).__name__}, in an order of channels of its own"

    def positioned(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)[0]

    def embed(self, images: Tensor) -> Tensor:
        return self.model.norm_pre(self.positioned(self.model.patch_embed(images)))

    def parts(self, block: nn.Module) -> BlockParts | str:
        known = is_timms(block, "EvaBlock")
        return TimmEvaBlock(block, self) if known else f"{kind_of(block)} is of an unknown kind"

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self.run(partial(call_with_qkv, block), tokens, rope=self.table(block, sincos))

    def table(self, block: nn.Module, sincos: SinCos | None) -> Tensor | None:
        """Sine and cosine next to each other, as a block takes them: (L, 2*hd), or (heads, L, 2*hd)."""
        if sincos is not None and sincos[0].ndim == 4:  # of all blocks
            number = next(i for i, each in enumerate(self.blocks) if each is block)
            sincos = [table[number] for table in sincos]
        return None if sincos is None else torch.cat([*sincos], dim=-1)

    def rope(self, dtype: torch.dtype) -> Rope | HostTables | None:
        return None if self.model.rope is None else HostTables(self._embedding())

    def computed_buffers(self) -> list[Computed]:
        found = self._embedding()
        if found is None or own_class(found).__name__ == MIXED:  # whose frequencies are learned
            return []
        made = HostTables(found)
        computed = {"bands": made.frequencies, "pos_embed": lambda: torch.cat(made.computed(found.feat_shape), -1)}
        return [
            Computed(found, name, make, atol=1e-6 if name == "bands" else 2.0**-5)
            for name, make in computed.items()
            if getattr(found, name, None) is not None
        ]

    def check_planes(self, planes: Sequence[Plane]) -> None:
        if DHW in planes and self.model.rope is not None and own_class(self._embedding()).__name__ == MIXED:
            raise ValueError(
                "model's rotary embedding has learned frequencies for two axes (mixed), which say nothing about the "
                "third of DHW (mode 'flatten3d'); expected planes HW, DW and DH"
            )
        super().check_planes(planes)


def _known_rope(rope: nn.Module | None) -> bool:
    if rope is None:
        return True
    rope = unwrapped(rope)
    kind = own_class(rope).__name__
    return kind == MIXED or (
        kind == "RotaryEmbeddingCat" and not rope.in_pixels and getattr(rope, "grid_type", "index") == "index"
    )


class TimmDINOv3(TimmEva):
    """`timm.models.Eva` as DINOv3 uses it: axial RoPE in the rotate-half layout, no absolute positions."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        if not is_exactly(model, "timm.Eva") or model.rope is None:
            return False
        rope = unwrapped(model.rope)
        return (
            has_plain_patches(model)
            and own_class(rope).__name__ == "RotaryEmbeddingDinoV3"
            and (rope.rotate_half, rope.grid_offset, rope.grid_indexing) == (True, 0, "ij")
            and model.pos_embed is None
        )

    def embed(self, images: Tensor) -> Tensor:
        # Eva._pos_embed without its RoPE tables: those depend on the plane and are drawn by `lift`.
        patches, globals_ = self.with_positions(self.patches(images), *images.shape[2:], inplace=False)
        if self.num_globals:
            patches = torch.cat([globals_.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.model.norm_pre(self.model.pos_drop(patches))  # drawn in the order of memory

    embed_parts, patch_projection = Timm.embed_parts, Timm.patch_projection

    def with_positions(self, patches: Tensor, height: int, width: int, inplace: bool) -> tuple[Tensor, Tensor]:
        found = [t for t in (self.model.cls_token, self.model.reg_token) if t is not None]
        return patches, torch.cat(found, dim=1) if found else patches.new_empty(1, 0, patches.shape[2])

    def turns_otherwise(self) -> None:
        return None

    def computed_buffers(self) -> list[Computed]:
        found = unwrapped(self.model.rope)
        return [Computed(found, "periods", lambda: make_periods(len(found.periods), *self._bounds()))]

    def _bounds(self) -> tuple[float | None, float | None, float | None]:
        """Base, or least and greatest period."""
        rope = unwrapped(self.model.rope)
        given = rope.min_period is not None and rope.max_period is not None
        return (None, rope.min_period, rope.max_period) if given else (rope.temperature, None, None)

    def rope(self, dtype: torch.dtype) -> Rope:
        rope = unwrapped(self.model.rope)
        base, least, greatest = self._bounds()
        return Rope(
            periods=rope.periods,
            base=base,
            min_period=least,
            max_period=greatest,
            normalize=rope.normalize_coords,
            coord_dtype=torch.float32,
            coords_as_periods=True,  # which up to timm 1.0.30 are cast with the model
            shift=rope.shift_coords,
            jitter=rope.jitter_coords,
            rescale=rope.rescale_coords,
            draw_device=torch.device("cpu"),  # where timm builds its grid
        )
