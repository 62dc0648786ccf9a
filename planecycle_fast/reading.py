"""The parts of a block as they were read last, for as long as nothing in the block changes.

Parts are what a pass may rely on, so they follow every module, its class's forward, hook, parameter, buffer and
setting of a block. Reading them takes hundreds of calls; seeing that everything is still the same object as before is
one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .parts import BlockParts, Snapshot

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = attrgetter("__class__.forward")  # which somebody may replace in a class
_END = object()  # of what was seen: nothing equals it but itself


class Reading:
    """Reads a block's parts when something has changed since it did so last."""

    def __init__(self, parts: BlockParts | str) -> None:
        self.parts = parts  # or the reason why there are none
        self._snapshot: Snapshot | None = None
        self._seen: list[Any] = []

    def now(self) -> Snapshot | str:
        """The parts as they are at this moment."""
        if isinstance(self.parts, str):
            return self.parts
        if torch.compiler.is_compiling():  # its guards are for what is read
            return Snapshot(self.parts)
        if self._snapshot is not None and all(map(is_, self._look(), self._seen)):
            return self._snapshot
        # What is scripted has no dictionaries to look at, and nothing of it changes.
        self._watch([m for m in self.parts.block.modules() if not isinstance(m, torch.jit.ScriptModule)])
        self._seen, self._snapshot = [*self._look()], Snapshot(self.parts)
        return self._snapshot

    def _watch(self, modules: list[nn.Module]) -> None:
        attributes = [m.__dict__ for m in modules]
        self._modules, self._attributes = modules, attributes
        children = [found[name] for found in attributes for name in ("_modules", "_parameters", "_buffers")]
        self._children = [some for some in children if some]
        self._empty = [none for none in children if not none]
        self._empty += [found[name] for found in attributes for name in _HOOKS]  # most of them

    def _look(self) -> Iterator[Any]:
        """Everything that parts are read from, as objects."""
        return chain(
            map(len, self._attributes),
            map(type, self._modules),
            map(_FORWARD, self._modules),
            chain.from_iterable(map(dict.values, self._attributes)),
            chain.from_iterable(map(dict.values, self._children)),
            chain(map(bool, self._empty), *map(dict.values, self._empty)) if any(self._empty) else (),
            (_has_any_global_hook(), *self.parts.settings(), _END),
        )

    def __reduce__(self) -> tuple:  # copies look for themselves
        return Reading, (self.parts,)
