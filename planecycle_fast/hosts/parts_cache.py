"""The parts of a block as they were read last, for as long as nothing in the block changes.

Parts are what a pass may rely on, so they follow every module, its class's forward, hook, parameter, buffer and
setting of a block. Reading them takes hundreds of calls; seeing that everything is still the same object as before is
one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
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
    """Reads a block's parts when something has changed since it did so last.

    Other threads may change the block, or read it, meanwhile: what was read is exchanged as one, and never changed.
    """

    def __init__(self, parts: BlockParts | str) -> None:
        self.parts = parts  # or the reason why there are none
        self._last: tuple[_Watched, list[Any], Snapshot] | None = None  # with everything that it was read from

    def now(self) -> Snapshot | str:
        """The parts as they are at this moment, all of them."""
        if isinstance(self.parts, str):
            return self.parts
        if torch.compiler.is_compiling():  # its guards are for what is read
            return Snapshot(self.parts)
        last = self._last
        if last is not None and all(map(is_, last[0].look(), last[1])):
            return last[2]
        while True:
            # What is scripted has no dictionaries to look at, and nothing of it changes.
            block = self.parts.block
            watched = _Watched([m for m in block.modules() if not isinstance(m, torch.jit.ScriptModule)], self.parts)
            seen, snapshot = [*watched.look()], Snapshot(self.parts)
            with suppress(Exception):  # which is shown where the plan is asked for
                snapshot.plan()  # reads all that a pass needs, now
            if all(map(is_, watched.look(), seen)):  # else a hook came, or a module was replaced, in between
                self._last = watched, seen, snapshot
                return snapshot

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
        self._empty += [found[name] for found in attributes for name in _HOOKS]  # most of them

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
