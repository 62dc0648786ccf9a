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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends import asked_for, pick, why_not
from .ops import Axial, Norm, Tables, add_norm, attention, gelu, plane_switch, rope, swiglu
from .ops.add_norm import add_ref
from .parts import WHOLE, BlockParts, Plan, known_norm, plan, watched
from .planes import Plane, Sizes
from .pooling import Transition
from .rope import PlaneAngles

OPERATIONS = ("plane_switch", "add_norm", "rope", "gelu", "swiglu")  # of a block
SinCos = tuple[Tensor, Tensor]  # (L, hd) each


class Stream(NamedTuple):
    """Tokens between two blocks: ``residual + scale * branch``, rows in the order of one plane."""

    residual: Tensor  # (B*P, g + L, C)
    branch: Tensor | None = None  # (B*P, g + L, C)
    scale: Tensor | None = None  # (C,)

    def tokens(self) -> Tensor:  # (B*P, g + L, C)
        """The sum."""
        return add_ref(*self)


@dataclass(frozen=True)
class Layer:
    """Where a block stands: what it needs to know besides the stream."""

    old: Plane  # of the stream that comes in
    new: Plane  # of the stream that goes out
    sizes: Sizes  # (D, H, W) in tokens
    num_globals: int
    transition: Transition  # of the globals from old to new
    angles: PlaneAngles | None = None  # RoPE of the new plane
    backend: str = "auto"
    attention: str = "auto"
    strict: bool = True

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the new plane's axes."""
        return self.new.grid(self.sizes)

    @property
    def sincos(self) -> SinCos | None:
        """RoPE tables of the new plane, (L, hd) each."""
        return None if self.angles is None else self.angles.sincos()

    def switch(
        self, stream: Stream, norm: Norm | None = None, norm_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The stream's tokens (B*P, g + L, C) in the new plane's order; with a norm: and their norm."""
        args = (self.old, self.new, self.sizes, self.num_globals, self.transition, *stream[1:], norm)
        backend = self.backend_for("plane_switch", stream.residual)
        return plane_switch(stream.residual, *args, norm_dtype=norm_dtype, backend=backend)

    def backend_for(self, op: str, x: Tensor) -> str:
        """The backend of an operation, on tensors like x."""
        return choose(self.backend, x.device, op, self.strict)


def choose(backend: str, device: torch.device, op: str, strict: bool) -> str:
    """The backend of an operation; without `strict` the reference where the one asked for lacks it."""
    named = asked_for(backend)
    if not strict and named != "auto" and why_not(named, device, op) is not None:
        return "reference"
    return pick(backend, device, op)


def enter(
    patches: Tensor,  # (B*D, L, C), canonical order, any strides
    globals_: Tensor,  # (B*D, g, C), or (1, g, C): the same in all slices
    layer: Layer,  # from canonical order to the first block's plane
) -> Stream:
    """The stream of embedded slices, in the first block's plane order."""
    backend = layer.backend_for("plane_switch", patches)
    args = (layer.old, layer.new, layer.sizes, layer.num_globals, layer.transition)
    return Stream(plane_switch(patches, *args, globals_=globals_, backend=backend))


def run_block(
    parts: BlockParts | str,
    stream: Stream,
    layer: Layer,
    call: Callable[[Tensor], Tensor],
) -> Stream:
    """A block on the stream: part by part, what `plan` allows by operations, the rest by the host.

    Args:
        parts: the block taken apart, or the reason why it cannot be.
        call: the whole block as the host runs it, (B*P, g + L, C) to the same.
    """
    todo = plan(parts)
    if todo.block is not None:
        return Stream(call(layer.switch(stream)))
    linears = parts.attention().qkv if todo.attention is None else ()
    x, normed = _normed(parts.norm(1), todo.norm1, linears, lambda *norm: layer.switch(stream, *norm))
    scale = parts.scale(1)
    branch = _attention(parts, todo, normed, layer)
    branch, gamma = (branch, scale.gamma) if todo.scale1 is None else (scale.own(branch), None)

    def add(*norm: Any) -> Tensor | tuple[Tensor, Tensor]:
        if not norm:
            return add_ref(x, branch, gamma)
        return add_norm(x, branch, gamma, *norm, backend=layer.backend_for("add_norm", x))

    x, normed = _normed(parts.norm(2), todo.norm2, parts.mlp().first if todo.mlp is None else (), add)
    branch, scale = _mlp(parts, todo, normed, layer), parts.scale(2)
    return Stream(x, branch, scale.gamma) if todo.scale2 is None else Stream(x, scale.own(branch))


def _normed(
    module: nn.Module, own: str | None, linears: Sequence[object], add: Callable[..., Tensor | tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Tokens and their norm, for these linear layers: together, ``add(norm, dtype)``, or by the host's norm."""
    if own is None:
        return add(known_norm(module)[0], _autocast_dtype(module, linears))
    x = add()
    return x, module(x)


def _autocast_dtype(module: nn.Module, linears: Sequence[object]) -> torch.dtype | None:
    """What autocast would make of a norm in each of these layers, so that it is written as that at once; or None."""
    weight = module.weight
    if weight is None or not linears or not all([_is_plain(linear) for linear in linears]):
        return None
    device = weight.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts and weight.dtype != torch.float64 else None


def _attention(
    parts: BlockParts,
    todo: Plan,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    found = parts.attention()
    if todo.attention is not None:
        return parts.call_attention(normed, layer.sincos)
    heads, g = found.heads, layer.num_globals
    projected = [linear(normed) for linear in found.qkv]
    free = _is_free(projected, found.qkv)
    packed = len(projected) == 1  # heads of q, k and v side by side; q and k turn together
    made = [t.unflatten(-1, (3 * heads if packed else heads, -1)) for t in projected]  # (N, rows, heads or 3*heads, hd)
    turned, rest = made[:2], made[2:]
    if packed and not made[0].requires_grad:  # else as a whole, so that its gradient comes as one
        turned, rest = [made[0][:, :, : 2 * heads]], [made[0][:, :, 2 * heads :]]
    if layer.angles is not None:
        backend = layer.backend_for("rope", made[0])
        angles, how = _angles(layer.angles, backend), (free, found.in_table_dtype, backend)
        turned = [rope(t, angles, g, min(t.shape[2], 2 * heads), *how) for t in turned]
    q, k, v = [head for t in (*turned, *rest) for head in t.split(heads, dim=2)]
    out = attention(q, k, v, found.scale, layer.attention)  # (N, rows, heads, hd)
    return found.output(out.flatten(2))


def _angles(angles: PlaneAngles, backend: str) -> Tables | Axial:
    """For kernels the settings, where they are known; else tables, which blocks share."""
    if backend == "triton" and angles.rope is not None:
        return Axial(angles.rope, angles.grid, angles.augmentation)
    return Tables(*[(table[:, : table.shape[1] // 2],) for table in angles.sincos()])  # halves are alike


def _mlp(
    parts: BlockParts,
    todo: Plan,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    found = parts.mlp()
    if todo.mlp is not None:
        return found.module(normed)
    hidden = [linear(normed) for linear in found.first]  # (N, rows, hidden); gate and value in one twice as wide
    free = _is_free(hidden, found.first)
    backend = layer.backend_for(found.activation, normed)
    if found.activation == "gelu":
        activated = gelu(hidden[0], free, backend)
    else:  # gate and value in one: in place would leave rows with gaps, which the next layer would copy
        activated = swiglu(*hidden, inplace=free and len(hidden) == 2, backend=backend)
    return found.last(activated)


def _is_free(
    made: Sequence[Tensor],  # (N, rows, any)
    layers: Sequence[object],
) -> bool:
    """Whether what these layers made may be written to. A compiler plans memory better without being told to."""
    if torch.compiler.is_compiling() or any([t.requires_grad for t in made]):
        return False
    return all([_is_plain(layer) for layer in layers])


def _is_plain(linear: object) -> bool:
    """Whether nobody but us can hold what a layer returned, so that it may be written to."""
    if hasattr(linear, "fresh"):
        return linear.fresh
    return (type(linear) is nn.Linear or type(linear).__name__ == "LinearKMaskedBias") and watched(linear) is None


def check_strict(backend: str, attention: str, strict: bool, plans: Sequence[Plan], device: torch.device) -> None:
    """Raises ValueError where a backend or attention asked for by name would have to leave parts to the host."""
    backend, taken_apart = asked_for(backend), any([found.block is None for found in plans])
    for op in OPERATIONS if taken_apart and strict and backend != "auto" else ():
        pick(backend, device, op)
    named = {} if backend in ("auto", "reference") else {f"backend {backend!r}": None}  # the reference replaces nothing
    named |= {} if attention == "auto" else {f"attention {attention!r}": ("block", "attention")}
    for name, needed in named.items() if strict else ():
        for i, found in enumerate(plans):
            for part, reason in found.reasons().items():
                if reason != WHOLE if needed is None else part in needed:  # plane changes go by backends anyway
                    raise ValueError(
                        f"{name} would leave block {i}'s {part} to the model's own code: {reason}; expected a model "
                        "whose parts can be replaced (`report()` lists them), or strict=False"
                    )
