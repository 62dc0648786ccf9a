"""timm's `Beit` (v1, v2): attention with a bias for every displacement of two patches, made for each plane's size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..geometry.planes import DHW, Plane
from .adapter import SinCos, is_exactly
from .buffers import Computed
from .timm import Timm, call_with_qkv, has_plain_patches
from .wrapped import read

METHOD = "_get_rel_pos_bias"  # of timm's attention, which makes the biases of its own window


class TimmBeit(Timm):
    """`timm.models.Beit`: learned positions in each slice, and biases of relative positions (`relative_bias`)."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return is_exactly(model, "timm.Beit") and has_plain_patches(model)

    def positioned(self, patches: Tensor) -> Tensor:
        tokens = torch.cat([self.model.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.model.pos_drop(tokens if self.model.pos_embed is None else tokens + self.model.pos_embed)

    def embed(self, images: Tensor) -> Tensor:
        return self.positioned(self.model.patch_embed(images))

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return self.run(partial(self._call, block, grid), tokens)

    def _call(
        self,
        block: nn.Module,
        grid: tuple[int, int],
        tokens: Tensor,  # (N, 1 + n0*n1, C)
    ) -> Tensor:  # (N, 1 + n0*n1, C)
        """The block with its own biases where they are for this grid, otherwise with those made for it."""
        shared = self.model.rel_pos_bias
        if tuple(grid) == tuple(read(self.model.patch_embed, "grid_size", ())):
            return call_with_qkv(block, tokens, shared_rel_pos_bias=None if shared is None else shared())
        common = None if shared is None else relative_bias(shared, grid)
        biased = [m for m in block.modules() if hasattr(type(m), METHOD) and m.relative_position_bias_table is not None]
        for attention in biased:  # in place of the class's own, and called where that is: then weights are there
            vars(attention)[METHOD] = lambda of=attention: relative_bias(of, grid)[None]
        try:
            return call_with_qkv(block, tokens, shared_rel_pos_bias=common)
        finally:
            for attention in biased:
                del vars(attention)[METHOD]

    def computed_buffers(self) -> list[Computed]:
        found = [self.model.rel_pos_bias, *[getattr(block, "attn", None) for block in self.blocks]]
        name = "relative_position_index"
        found = [module for module in found if getattr(module, name, None) is not None]
        return [Computed(module, name, partial(_indices, *module.window_size)) for module in found]

    def positions_on_planes(self) -> str | None:
        biased = any([name.endswith("relative_position_bias_table") for name, _ in self.model.named_parameters()])
        return "biases of relative positions" if biased else None

    def check_planes(self, planes: Sequence[Plane]) -> None:
        if DHW in planes and self.positions_on_planes() is not None:
            raise ValueError(
                "model's attention has biases of relative positions along two axes, which say nothing about the third "
                "of DHW (mode 'flatten3d'); expected planes HW, DW and DH"
            )


def _indices(
    rows: int,
    columns: int,
) -> Tensor:  # (1 + L, 1 + L), L = rows * columns
    """Where in a module's table the bias of two tokens is, its own grid's."""
    y, x = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)  # (L,)
    within = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1  # (L, L)
    count = (2 * rows - 1) * (2 * columns - 1)
    indices = torch.full((1 + rows * columns,) * 2, count + 2)
    indices[0, 1:], indices[1:, 0], indices[1:, 1:] = count, count + 1, within
    return indices


def relative_bias(
    module: nn.Module,  # with a table ((2*w0 - 1) * (2*w1 - 1) + 3, heads) for patches in a window (w0, w1)
    grid: Sequence[int],  # (n0, n1)
) -> Tensor:  # (heads, 1 + n0*n1, 1 + n0*n1)
    """Biases of attention for another grid of patches, and a class token before them.

    The table holds one per displacement, row by row, then that from the class token to patches, from patches to it, and
    its own. It is resampled as BEiTs are for fine-tuning at other sizes, by timm's `set_input_size`: see `_between`.
    """
    table, window = module.relative_position_bias_table, module.window_size
    to_patch, to_class, itself = table[-3:]
    heads, length = table.shape[1], grid[0] * grid[1]
    by_displacement = table[:-3].T.unflatten(1, [2 * w - 1 for w in window])  # (heads, 2*w0 - 1, 2*w1 - 1)
    for axis, (w, n) in enumerate(zip(window, grid), 1):  # both: timm resamples along an axis that keeps its size, too
        left, right, share = [t.to(table.device) for t in _between(w, n)]
        share = share.to(table.dtype).view([-1 if a == axis else 1 for a in range(3)])
        lower, upper = [by_displacement.index_select(axis, at) for at in (left, right)]
        by_displacement = lower * (1 - share) + upper * share  # no matrix product: autocast would round it
    steps = [torch.arange(n, device=table.device) for n in grid]
    rows, columns = [at[:, None] - at + n - 1 for at, n in zip(steps, grid)]  # (n, n): where displacements are
    patches = by_displacement[:, rows[:, None, :, None], columns[None, :, None, :]]  # (heads, n0, n1, n0, n1)
    first = torch.cat([itself[:, None], to_patch[:, None].expand(-1, length)], dim=1)  # (heads, 1 + L)
    rest = torch.cat([to_class[:, None, None].expand(-1, length, 1), patches.reshape(heads, length, length)], dim=2)
    return torch.cat([first[:, None], rest], dim=1)


def _between(
    window: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (2*size - 1,) each
    """How a table of displacements within `window` patches gives those within `size`: of each, two entries of the table
    and the share of the second.

    The table's displacements are spread over the new range: neighbours stay 1 apart, steps further out grow by a common
    factor such that the outermost arrive, at least by 1.01: for smaller sizes the outer ones fall away.
    """
    count, reach = window - 1, size - 1
    wanted = torch.arange(-reach, reach + 1, dtype=torch.float64)
    if count == 0:  # a single patch: its bias serves all
        return torch.zeros_like(wanted).long(), torch.zeros_like(wanted).long(), torch.zeros_like(wanted)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        low, high = (low, factor) if (factor**count - 1) / (factor - 1) > reach else (factor, high)
    steps = torch.cumsum(((low + high) / 2) ** torch.arange(count, dtype=torch.float64), 0)  # of 1, 2, ... patches once
    known = torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])
    right = torch.searchsorted(known, wanted).clamp(1, 2 * count)
    left = right - 1
    return left, right, ((wanted - known[left]) / (known[right] - known[left])).clamp(0, 1)
