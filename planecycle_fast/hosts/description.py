"""What a block consists of, and which of its parts the host's own code runs: read once, for everybody.

`engine.block` runs what a description says, `report` prints it, `packing` makes of it what csrc takes. Parts follow
every module, its class's forward, hook, parameter, buffer and setting of a block. Reading them takes hundreds of
calls; seeing that everything is still the same object as before is one comparison (`Reading`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import Norm
from .known import HOOKS, LINEAR, why_called
from .packing import Packed, pack
from .parts import Attention, BlockParts, Mlp, Scale

_FORWARD = attrgetter("__class__.forward")  # which somebody may replace in a class
_END = object()  # of what was seen: nothing equals it but itself


class NormPart(NamedTuple):
    """norm1 or norm2."""

    module: nn.Module  # the host's own
    known: Norm | None  # as operations take it; None: it is called
    cast: bool  # whether all linear layers after it would cast it under autocast


@dataclass(frozen=True)
class BlockDescription:
    """A block of a host, taken apart as it is now."""

    parts: BlockParts | None  # None of a block that cannot be taken apart
    kept: Mapping[str, str]  # by part, why the host's own code runs it; "block": all of it, and nothing else is there
    norm1: NormPart | None = None
    attention: Attention | None = None
    scale1: Scale | None = None
    norm2: NormPart | None = None
    mlp: Mlp | None = None
    scale2: Scale | None = None
    plain_qkv: bool = False  # whether what these layers return is x @ weight + bias, and nobody else's
    plain_first: bool = False
    plain_last: bool = False  # both last layers, the attention's output and the MLP's

    @property
    def whole(self) -> str | None:
        """Why the block as a whole must be called, or None."""
        return self.kept.get("block")

    @property
    def why_not_attention(self) -> str | None:
        """Why attention is not taken apart, or None."""
        return self.kept.get("block") or self.kept.get("attention")

    @cached_property
    def packed(self) -> Packed | None:
        """For csrc/blocks.cpp, or None."""
        return pack(self)


def describe(parts: BlockParts | str) -> BlockDescription:
    """What a block consists of now. `parts` is a reason where the block is of an unknown kind."""
    whole = parts if isinstance(parts, str) else parts.why_not()
    if whole is not None:
        return BlockDescription(None if isinstance(parts, str) else parts, {"block": whole})
    attention, mlp, scale1, scale2 = parts.attention(), parts.mlp(), parts.scale(1), parts.scale(2)
    norms, reasons = zip(parts.norm_or_reason(1), parts.norm_or_reason(2))
    found = {
        "norm1": reasons[0],
        "attention": attention.part.why_not(),
        "scale1": scale1.part.why_not(),
        "norm2": reasons[1],
        "mlp": mlp.part.why_not(),
        "scale2": scale2.part.why_not(),
    }
    kept = {name: reason for name, reason in found.items() if reason is not None}
    plain_qkv = "attention" not in kept and all([is_plain(linear) for linear in attention.qkv])
    plain_first = "mlp" not in kept and all([is_plain(linear) for linear in mlp.first])
    lasts = () if "attention" in kept or "mlp" in kept else (attention.output, mlp.last)
    return BlockDescription(
        parts, kept,
        norm1=_norm_part(parts.norm(1), norms[0], plain_qkv), attention=attention, scale1=scale1,
        norm2=_norm_part(parts.norm(2), norms[1], plain_first), mlp=mlp, scale2=scale2,
        plain_qkv=plain_qkv, plain_first=plain_first,
        plain_last=len(lasts) > 0 and all([is_plain(linear) for linear in lasts]),
    )  # fmt: skip


def _norm_part(module: nn.Module, known: Norm | None, plain: bool) -> NormPart:
    return NormPart(module, known, plain and known is not None and known.weight is not None)


def is_plain(linear: Any) -> bool:
    """Whether a linear layer may be replaced by its weight and bias; what is no module says so itself."""
    return why_called(linear, *LINEAR) is None if isinstance(linear, nn.Module) else linear.is_plain


class Reading:
    """Describes a block when something has changed since it did so last.

    Other threads may change the block, or read it, meanwhile: what was read is exchanged as one, and never changed.
    """

    def __init__(self, parts: BlockParts | str) -> None:
        self.parts = parts  # or the reason why there are none
        self._last: tuple[_Watched, list[Any], BlockDescription] | None = None  # and what it was read from

    def now(self) -> BlockDescription:
        """The block as it is at this moment, all of it."""
        if isinstance(self.parts, str) or torch.compiler.is_compiling():  # its guards are for what is read
            return describe(self.parts)
        last = self._last
        if last is not None and all(map(is_, last[0].look(), last[1])):
            return last[2]
        while True:
            # What is scripted has no dictionaries to look at, and nothing of it changes.
            block, error, found = self.parts.block, None, None
            watched = _Watched([m for m in block.modules() if not isinstance(m, torch.jit.ScriptModule)], self.parts)
            seen = [*watched.look()]
            try:
                found = describe(self.parts)
            except Exception as reason:  # of a block that is half changed, or stays so
                error = reason
            if all(map(is_, watched.look(), seen)):  # else a hook came, or a module was replaced, in between
                if error is not None:
                    raise error
                self._last = watched, seen, found
                return found

    def anew(self) -> BlockDescription:
        """The block read once more, whatever has been kept."""
        return describe(self.parts)

    def __reduce__(self) -> tuple:  # copies look for themselves
        return Reading, (self.parts,)


class _Watched:
    """The modules of a block, and where to look for changes of them."""

    def __init__(self, modules: list[nn.Module], parts: BlockParts) -> None:
        self._parts, self._modules = parts, modules
        self._attributes = attributes = [m.__dict__ for m in modules]
        children = [found[name] for found in attributes for name in ("_modules", "_parameters", "_buffers")]
        self._children = [some for some in children if some]
        self._empty = [none for none in children if not none]
        self._empty += [found[name] for found in attributes for name in HOOKS]  # most of them

    def look(self) -> Iterator[Any]:
        """Everything that parts are read from, as objects."""
        return chain(
            map(len, self._attributes),
            map(type, self._modules),
            map(_FORWARD, self._modules),
            chain.from_iterable(map(dict.values, self._attributes)),
            chain.from_iterable(map(dict.values, self._children)),
            chain(map(bool, self._empty), *map(dict.values, self._empty)) if any(self._empty) else (),
            (_has_any_global_hook(), *self._parts.settings(), _END),
        )
