"""How a block runs on the residual stream, which travels from block to block in plane order.

Only attention sees planes. So a block does not return ``residual + scale * branch`` but hands the three on; the next
block adds them, changes planes and normalises in one operation, `ops.plane_switch`, which reads the rows in the old
plane's order and writes them in the new one's. Everything else in a block is an ordinary 2D transformer block:

    stream (residual, branch, scale), old plane
      plane_switch      residual + scale * branch, permute rows, pool globals, norm1
      qkv               the host's linear layers
      rope, attention   `ops.rope`, `ops.attention`
      projection        the host's
      add_norm          residual + ls1 * attention, norm2
      fc1, gelu, fc2    the host's linear layers around `ops.gelu` or `ops.swiglu`
    stream (residual, branch = MLP, scale = ls2), new plane
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..hosts.description import BlockDescription, NormPart
from ..ops.choice import Choice
from ..ops.residual.add_norm import add_norm_on
from ..ops.residual.norm import add_ref, check_stream
from .branches import attention_branch, mlp_branch
from .cpu_groups import Following, run_in_groups
from .prepared_block import preparation
from .stream import Layer, Stream


def run_block(
    block: BlockDescription,
    held: list[Stream],
    layer: Layer,
    call: Callable[[Tensor, Layer], Tensor],
    following: Iterable[Following] = (),
) -> tuple[Stream | tuple[Tensor, Tensor], int]:
    """A block on the stream: part by part, what can be replaced by operations, the rest by the host.

    Args:
        held: the stream; taken out, so that its memory is free once the planes have changed, if nobody else holds it.
        call: the whole block as the host runs it, (B*P, g + L, C) to the same.
        following: what may run in the same call, see `cpu_groups`.

    Returns: the stream, or after a last norm the tokens and their norm; and how many steps that were.
    """
    if block.whole is not None:
        return Stream(call(layer.switch(held.pop()), layer)), 1
    if (done := run_in_groups(block, held, layer, following)) is not None:
        return done
    known = preparation(block, held, layer)
    if known is None or not known.is_new:
        return _run_parts(block, held, layer), 1
    if (prepared := known.found()) is not None:
        return prepared(held, layer), 1
    with known.made():
        return _run_parts(block, held, layer), 1


def _run_parts(block: BlockDescription, held: list[Stream], layer: Layer) -> Stream:
    """One after the other. The stream is taken out of its list."""
    choice = layer.choice
    x, normed = _normed(block.norm1, block.plain_qkv, choice, lambda *norm: layer.switch(held.pop(), *norm))
    branch = attention_branch(block, normed, layer)
    branch, gamma = (branch, block.scale1.gamma) if "scale1" not in block.kept else (block.scale1.own(branch), None)

    def add(*norm: Any) -> Any:  # the sum; with a norm: and its norm
        check_stream(x, branch, gamma, *norm)  # the branch is the host's
        return add_norm_on(choice.add_norm, x, branch, gamma, *norm) if norm else add_ref(x, branch, gamma)

    x, normed = _normed(block.norm2, block.plain_first, choice, add)
    branch = mlp_branch(block, normed, layer)
    return Stream(x, branch, block.scale2.gamma) if "scale2" not in block.kept else Stream(x, block.scale2.own(branch))


def _normed(
    norm: NormPart,
    plain: bool,  # whether all linear layers after it would cast it under autocast
    choice: Choice,
    add: Callable[..., Any],  # the sum; with a norm: and its norm
) -> tuple[Tensor, Tensor]:
    """Tokens and their norm: together, ``add(norm, dtype)``, or by the host's norm."""
    if norm.known is None:
        x = add()
        return x, norm.module(x)
    # What autocast would make of the norm in each of the next linear layers: it is written as that at once.
    weight = norm.known.weight
    casts = plain and choice.autocast is not None and weight is not None and weight.dtype != torch.float64
    return add(norm.known, choice.autocast if casts else None)
