"""`LiftedModel.attention_maps`: where class tokens and a chosen patch look, on the plane of each layer.

Maps are made by plain torch operations from the queries and keys of the model's own linear layers, a row of scores for
each class token and one for the patch: all scores of a sequence are never held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import named_in_programs
from ..geometry.planes import HW, Plane, Sizes, permutation
from ..hosts.description import BlockDescription
from .branches import queries_keys_values
from .stream import Layer, Stream


class AttentionMap(NamedTuple):
    """Weights of one layer, after the softmax, from a query to every patch, in canonical order whatever the plane.

    With the weights on class and register tokens, which are left out, those of one query sum to 1.
    """

    layer: int  # its index, from 0
    plane: str  # the layer's, such as "DW"
    cls: Tensor | None  # (B, heads, D, H, W): from the class token of the patch's own sequence; None without one
    patch: Tensor | None  # (B, heads, D, H, W): from the chosen patch, 0 off its plane; None if not asked for


named_in_programs(AttentionMap)


def check_patch(patch: Sequence[int] | None, sizes: Sizes) -> tuple[int, int, int] | None:
    """The indices (d, h, w) of a patch; negative ones count from the end.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: not three of them, or outside the volume.
    """
    if patch is None:
        return None
    listed = list(patch) if isinstance(patch, Iterable) and not isinstance(patch, str) else [None]
    if not all([hasattr(i, "__index__") and not isinstance(i, bool) for i in listed]):
        raise TypeError(f"patch must be the indices (d, h, w) of a patch, got {patch!r}")
    if len(listed) != 3 or not all([-n <= i < n for i, n in zip(listed, sizes)]):
        raise ValueError(f"patch must be indices (d, h, w) within {tuple(sizes)} patches, got {patch!r}")
    d, h, w = [int(i) + n if i < 0 else int(i) for i, n in zip(listed, sizes)]
    return d, h, w


def attention_map(
    number: int,
    block: BlockDescription,
    stream: Stream,  # that comes into the block
    layer: Layer,
    has_cls: bool,
    patch: tuple[int, int, int] | None,  # (d, h, w)
) -> AttentionMap:
    """The maps of one block. Raises ValueError where its attention cannot be taken apart."""
    if (reason := block.why_not_attention) is not None:
        raise ValueError(f"layers must have attention that can be taken apart, got layer {number}: {reason}")
    plain = replace(layer, choice=layer.choice.plain())
    found, normed = block.attention, block.norm1.module(plain.switch(Stream(*stream)))
    q, k, _ = queries_keys_values(block, normed, plain)  # (B*P, g + L, heads, hd)
    plane, sizes, g = layer.new, layer.sizes, layer.num_globals
    scale = q.shape[-1] ** -0.5 if found.scale is None else found.scale
    q, k = [t.unflatten(0, (-1, plane.slices(sizes))) for t in (q, k)]  # (B, P, g + L, heads, hd)
    cls = _canonical(_weights(q[:, :, 0], k, scale)[..., g:], plane, sizes) if has_cls else None
    if patch is None:
        return AttentionMap(number, plane.name, cls, None)
    sequence, row = _place(patch, plane, sizes)
    within = slice(sequence, sequence + 1)
    weights = _weights(q[:, within].select(2, g + row), k[:, within], scale)[..., g:]  # (B, 1, heads, L)
    before_and_after = (sequence, plane.slices(sizes) - sequence - 1)
    everywhere = F.pad(weights, (0, 0, 0, 0, *before_and_after))  # (B, P, heads, L)
    return AttentionMap(number, plane.name, cls, _canonical(everywhere, plane, sizes))


def _weights(
    q: Tensor,  # (B, P, heads, hd), one query of each sequence
    k: Tensor,  # (B, P, g + L, heads, hd)
    scale: float,
) -> Tensor:  # (B, P, heads, g + L), in at least float32
    scores = torch.einsum("bphc,bprhc->bphr", q, k) * scale
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _canonical(
    weights: Tensor,  # (B, P, heads, L)
    plane: Plane,
    sizes: Sizes,
) -> Tensor:  # (B, heads, D, H, W)
    cells = weights.transpose(1, 2).reshape(weights.shape[0], weights.shape[2], *plane.ordered(sizes))
    return cells.permute(0, 1, *[1 + axis for axis in permutation(plane, HW)[1:4]])


def _place(patch: tuple[int, int, int], plane: Plane, sizes: Sizes) -> tuple[int, int]:
    """The sequence that a patch is in, and its row there, counted without globals."""
    row = 0
    for axis in plane.sequence:
        row = row * sizes[axis] + patch[axis]
    return (patch[plane.batch[0]] if plane.batch else 0), row
