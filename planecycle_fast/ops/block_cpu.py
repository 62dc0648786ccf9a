"""block_ on backend "cpu": csrc/block.cpp, all that follows norm1 in a block, for inference. `groups` says when.

It is made of other operations, which whatever watches operations sees: it needs no fake and no derivative of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .add_norm import Norm
from .native_ops import NAMESPACE
from .rope_cpu import OP as _  # noqa: F401  so that the operations it is made of are complete

OP = getattr(torch.ops, NAMESPACE).block_.default
Linear = tuple[Tensor, Tensor | None]  # weight (out, in), bias (out,)


def block_in_place(
    x: Tensor,  # (N, g + L, C), the residual; becomes the sum with attention
    normed: Tensor,  # like x, its norm; written to
    qkv: Sequence[Linear],  # one packed layer, or three
    heads: tuple[int, float | None, int, bool],  # how many, scale of scores, g, `in_table_dtype` of `rope`
    angles: tuple[Tensor, Tensor] | None,  # sine and cosine, (L, hd/2) each
    out: Linear,
    gamma: Tensor | None,  # (C,), of attention
    norm: Norm,  # norm2
    gated: bool,  # SwiGLU instead of GELU
    first: Sequence[Linear],  # one layer; gated two, or one that is twice as wide
    last: Linear,
    sequences: int,  # at a time
    fused: bool,  # whether oneDNN takes these layers
) -> Tensor:  # (N, g + L, C), the MLP's branch; `normed` where there are several groups
    """Attention and MLP of plain linear layers, all of x's dtype; in bfloat16 with fewer roundings than one by one."""
    sin, cos = ([], []) if angles is None else ([angles[0]], [angles[1]])
    weights, biases = zip(*qkv)
    wide, wide_biases = zip(*first)
    made = OP(
        x, normed, weights, biases, *heads, sin, cos, *out, gamma, norm.weight, norm.bias,
        "rms" if norm.rms else "layer", norm.eps, gated, wide, wide_biases, *last, sequences, fused,
    )  # fmt: skip
    return made[0] if made else normed
