"""The residual stream between two blocks, and where a block stands: what it needs to know besides the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry.planes import Plane, Sizes
from ..geometry.pooling import Transition
from ..geometry.rope import PlaneAngles
from ..hosts.adapter import SinCos
from ..ops import Norm
from ..ops.choice import Choice
from ..ops.plane_change.plane_switch import check_switch, switch_on
from ..ops.residual.norm import add_ref
from ..runtime.tracing import may_fill
from .embedding import Embedded

MOST_KINDS = 1024  # of layers that are told apart at a time

_kinds: dict[tuple[Any, ...], int] = {}
_numbers = count()


class Stream(NamedTuple):
    """Tokens between two blocks: ``residual + scale * branch``, rows in the order of one plane."""

    residual: Tensor  # (B*P, g + L, C)
    branch: Tensor | None = None  # (B*P, g + L, C)
    scale: Tensor | None = None  # (C,)

    def tokens(self) -> Tensor:  # (B*P, g + L, C)
        """The sum."""
        return add_ref(*self)


class Own(Stream):
    """A stream that nobody else has seen: its shape is right, and it may be written to."""

    __slots__ = ()


@dataclass(frozen=True)
class Layer:
    """Where a block stands: what it needs to know besides the stream."""

    old: Plane  # of the stream that comes in
    new: Plane  # of the stream that goes out
    sizes: Sizes  # (D, H, W) in tokens
    num_globals: int
    transition: Transition  # of the globals from old to new
    choice: Choice  # what runs this pass
    angles: PlaneAngles | None = None  # RoPE of the new plane
    look: Callable[[Stream], None] | None = None  # is shown the stream that a block gets, within its call

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the new plane's axes."""
        return self.new.grid(self.sizes)

    @property
    def sincos(self) -> SinCos | None:
        """RoPE tables of the new plane, (L, hd) each."""
        return None if self.angles is None else self.angles.sincos()

    @cached_property
    def via(self) -> int:
        """Slices between the two steps of the transition, as operations take it; 0 where rows and globals stay."""
        m = self.transition
        if self.old == self.new and (self.num_globals == 0 or m.is_identity):
            return 0
        return m.num_prev if m.via is None else m.via

    @cached_property
    def kind(self) -> int:
        """The same number of layers that are alike, but for angles."""
        known = (self.old, self.new, self.sizes, self.num_globals, self.transition, self.choice)
        if len(_kinds) >= MOST_KINDS and known not in _kinds:
            _kinds.clear()
        return _kinds.setdefault(known, next(_numbers))

    def switch(self, stream: Stream, norm: Norm | None = None, norm_dtype: torch.dtype | None = None) -> Any:
        """The stream's tokens (B*P, g + L, C) in the new plane's order; with a norm: and their norm."""
        args = (self.old, self.new, self.sizes, self.num_globals, self.transition, *stream[1:], norm, None, norm_dtype)
        if type(stream) is not Own:
            check_switch(stream.residual, *args)
        in_full = norm is not None or stream.branch is not None
        chosen = self.choice.add_norm if in_full else self.choice.plane_switch
        return switch_on(chosen, stream.residual, *args)

    def here(self, stream: Stream) -> Layer:
        """The same within a block's call: for a stream on its device, in the mode that is on now."""
        residual = stream.residual
        angles = None if self.angles is None else self.angles.on(residual.device)
        choice = self.choice.here(residual)
        if angles is self.angles and choice is self.choice:
            return self
        return replace(self, angles=angles, choice=choice)

    def one(self, stream: Stream, plane: Plane) -> Stream:
        """A stream in this plane's order as one tensor: nothing of it is a parameter, whose owner may free it."""
        if stream.branch is None:
            return Stream(stream.residual)
        count = plane.slices(self.sizes)
        return Stream(replace(self, old=plane, new=plane, transition=Transition(count, count)).switch(stream))


def enter(
    embedded: Embedded,
    layer: Layer,  # from canonical order to the first block's plane
) -> Stream:
    """The stream of embedded slices, in the first block's plane order."""
    patches, globals_, stream = embedded
    args = (layer.old, layer.new, layer.sizes, layer.num_globals, layer.transition)
    check_switch(patches, *args, None, None, None, globals_)
    own = stream is not None and may_fill() and torch.promote_types(stream.dtype, globals_.dtype) == stream.dtype
    entered: Any
    if stream is not None and own:
        if layer.num_globals:
            stream[:, : layer.num_globals] = globals_
        entered = switch_on(layer.choice.plane_switch, stream, *args)
    else:
        entered = switch_on(layer.choice.plane_switch, patches, *args, None, None, None, globals_)
    return Own(entered) if (own or entered is not patches) and layer.choice.writes else Stream(entered)
