"""blocks_ on backend "cpu": csrc/blocks.cpp, consecutive blocks for inference. `groups` says when.

It is made of other operations, which whatever watches operations sees: it needs no fake and no derivative of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .activations import swiglu_cpu  # noqa: F401  here and below: so that what it is made of is complete
from .native_ops import NAMESPACE
from .residual import add_norm_cpu  # noqa: F401
from .residual.norm import Norm
from .rotary import rope_cpu  # noqa: F401

OP = getattr(torch.ops, NAMESPACE).blocks_.default


def blocks_in_place(
    x: Tensor,  # (B*P, g + L, C), the residual in the order of the first block's plane; taken, an empty tensor is left
    normed: Tensor,  # like x, its norm1; taken
    tensors: Sequence[Sequence[Tensor | None]],  # of each block: qkv, out, first, last, norm1, gamma, norm2, gamma
    settings: tuple[Any, ...],  # `groups.Settings`
    fused: bool,  # whether oneDNN takes the linear layers
    planes: Sequence[str],  # of each block, and that of the last norm
    sizes: Sequence[int],  # (D, H, W) in tokens
    num_globals: int,  # g
    vias: Sequence[int],  # of each change of planes, see `pooling.Transition`; 0 where rows and globals stay
    means: Sequence[bool],  # like `vias`
    last: Norm | None,  # after the last block
    angles: Sequence[tuple[Tensor, Tensor]],  # of each block, sine and cosine (L, hd/2); or nothing
    group_bytes: int,  # of the widest activations of a group
    most_groups: int,  # that run, 0: all; see `repeats`
) -> tuple[Tensor, Tensor]:  # (B*P, g + L, C) each: the residual and the last MLP's branch; or their sum and its norm
    """Blocks of plain linear layers, all of x's dtype; in bfloat16 with fewer roundings than one by one."""
    weight, bias, eps = (None, None, 0.0) if last is None else last[:3]
    kind = "none" if last is None else "rms" if last.rms else "layer"
    return OP(
        x, normed, [*chain.from_iterable(tensors)], *settings, fused, planes, sizes, num_globals, vias, means,
        weight, bias, kind, eps, [sin for sin, _ in angles], [cos for _, cos in angles], group_bytes, most_groups,
    )  # fmt: skip
