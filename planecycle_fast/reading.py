"""The parts of a block as they were read last, for as long as nothing in the block changes.

Parts are what a pass may rely on, so they follow every module, hook, parameter and setting of a block. Reading them
takes hundreds of calls; seeing that everything is still the same object as before is one comparison of lists.
"""

from __future__ import annotations

from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .parts import BlockParts, Snapshot

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UNREAD = {name for name in vars(nn.Module()) if name.startswith("_")} - {*_HOOKS, "_modules", "_parameters"}


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
        if self._snapshot is not None:
            seen = self._look()
            if len(seen) == len(self._seen) and all(map(is_, seen, self._seen)):
                return self._snapshot
        self._watch(list(self.parts.block.modules()))
        self._seen, self._snapshot = self._look(), Snapshot(self.parts)
        return self._snapshot

    def _watch(self, modules: list[nn.Module]) -> None:
        attributes = [m.__dict__ for m in modules]
        self._modules, self._attributes = modules, attributes
        self._values = [itemgetter(*[name for name in found if name not in _UNREAD]) for found in attributes]
        children = [found[name] for found in attributes for name in ("_modules", "_parameters")]
        self._children = [some for some in children if some]
        self._empty = [none for none in children if not none]
        self._empty += [found[name] for found in attributes for name in _HOOKS]  # most of them

    def _look(self) -> list[Any]:
        """Everything that parts are read from, as objects."""
        try:
            values = [values(found) for values, found in zip(self._values, self._attributes)]
        except KeyError:  # an attribute is gone
            return []
        return [
            *map(type, self._modules),
            *map(len, self._attributes),
            *chain.from_iterable(values),
            *chain.from_iterable(map(dict.values, self._children)),
            *(map(bool, self._empty) if any(self._empty) else ()),
            _has_any_global_hook(),
            *self.parts.settings(),
        ]

    def __reduce__(self) -> tuple:  # copies look for themselves
        return Reading, (self.parts,)
