"""The residual stream: what travels from block to block, in plane order, and how a block runs on it.

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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hosts.parts import WHOLE, BlockParts, Plan, Snapshot, plan_of
from ..ops import add_norm
from ..ops.residual.norm import add_ref
from ..runtime.backends import asked_for, pick
from .branches import attention_branch, autocast_dtype, mlp_branch
from .cpu_groups import Following, run_in_groups
from .stream import Layer, Stream

OPERATIONS = ("plane_switch", "add_norm", "rope", "gelu", "swiglu")  # of a block


def run_block(
    parts: BlockParts | str,
    held: list[Stream],
    layer: Layer,
    call: Callable[[Tensor], Tensor],
    following: Iterable[Following] = (),
) -> tuple[Stream | tuple[Tensor, Tensor], int]:
    """A block on the stream: part by part, what `plan` allows by operations, the rest by the host.

    Args:
        parts: the block taken apart, or the reason why it cannot be.
        held: the stream; taken out, so that its memory is free once the planes have changed, if nobody else holds it.
        call: the whole block as the host runs it, (B*P, g + L, C) to the same.
        following: what may run in the same call, see `groups`.

    Returns: the stream, or after a last norm the tokens and their norm; and how many steps that were.
    """
    parts = parts if isinstance(parts, (str, Snapshot)) else Snapshot(parts)
    todo = plan_of(parts)
    if todo.block is not None:
        return Stream(call(layer.switch(held.pop()))), 1
    if (done := run_in_groups(parts, todo, held, layer, following)) is not None:
        return done
    linears = parts.attention().qkv if todo.attention is None else ()
    x, normed = _normed(parts, 1, todo.norm1, linears, lambda *norm: layer.switch(held.pop(), *norm))
    scale = parts.scale(1)
    branch = attention_branch(parts, todo, normed, layer)
    branch, gamma = (branch, scale.gamma) if todo.scale1 is None else (scale.own(branch), None)

    def add(*norm: Any) -> Tensor | tuple[Tensor, Tensor]:
        if not norm:
            return add_ref(x, branch, gamma)
        return add_norm(x, branch, gamma, *norm, backend=layer.backend_for("add_norm", x))

    x, normed = _normed(parts, 2, todo.norm2, parts.mlp().first if todo.mlp is None else (), add)
    branch, scale = mlp_branch(parts, todo, normed, layer), parts.scale(2)
    return (Stream(x, branch, scale.gamma) if todo.scale2 is None else Stream(x, scale.own(branch))), 1


def _normed(
    parts: Snapshot,
    number: int,
    own: str | None,
    linears: Sequence[object],
    add: Callable[..., Tensor | tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Tokens and their norm, for these linear layers: together, ``add(norm, dtype)``, or by the host's norm."""
    if own is None:
        dtype = autocast_dtype(parts.norm(number), linears) if torch._C._is_any_autocast_enabled() else None
        return add(parts.known_norm(number), dtype)
    x = add()
    return x, parts.norm(number)(x)


def check_strict(
    backend: str, attention: str, strict: bool, plans: Callable[[], Sequence[Plan]], device: torch.device
) -> None:
    """Raises ValueError where a backend or attention asked for by name would have to leave parts to the host."""
    backend = asked_for(backend)
    if not strict or (backend == "auto" and attention == "auto"):
        return
    plans = plans()
    for op in OPERATIONS if backend != "auto" and any([found.block is None for found in plans]) else ():
        pick(backend, device, op)
    named = {} if backend in ("auto", "reference") else {f"backend {backend!r}": None}  # the reference replaces nothing
    named |= {} if attention == "auto" else {f"attention {attention!r}": ("block", "attention")}
    for name, needed in named.items():
        for i, found in enumerate(plans):
            for part, reason in found.reasons().items():
                if reason != WHOLE if needed is None else part in needed:  # plane changes go by backends anyway
                    raise ValueError(
                        f"{name} would leave block {i}'s {part} to the model's own code: {reason}; expected a model "
                        "whose parts can be replaced (`report()` lists them), or strict=False"
                    )
