"""Lifted models that a framework finds by its own base class, such as transformers' `PreTrainedModel`.

A model that holds others asks each child whether it is one of the framework's: those initialise their own parts. A
lifted model of such a host therefore is of that class as well. What the class defines is the host's affair: it is
read from the host, as if the lifted model were not of the class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from ..hosts import Adapter
from .shared_module import OfHost

_MADE = "_planecycle_fast_made"  # in a class that `_with` has made


def class_of(cls: type, adapter: Adapter) -> type:
    """The class of a lifted model: `cls`, or one made of it and of the framework's base class of the adapter's host."""
    if _MADE in vars(cls):
        return cls
    base = next((base for base in type(adapter.model).__mro__ if base.__name__ == adapter.framework), None)
    return cls if base is None else _with(cls, base)


@cache
def _with(cls: type, base: type) -> type:
    """`cls`, which is of class `base` too, and has nothing of it but the name."""
    kept = {name: value for name, value in vars(nn.Module).items() if name not in ("__dict__", "__weakref__")}
    own = {name for found in cls.__mro__ if found not in nn.Module.__mro__ for name in vars(found)}
    theirs = {name for found in base.__mro__ if found not in nn.Module.__mro__ for name in vars(found)}
    members: dict[str, Any] = {}
    for name in theirs - own:
        if name in kept:  # which the framework overrides
            members[name] = kept[name]
        elif not (name.startswith("__") and name.endswith("__")):
            members[name] = OfHost(base, name)
    made = type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    for name, value in members.items():  # after the framework has looked at its new class
        setattr(made, name, value)
    setattr(made, _MADE, True)
    return made


def reduced(model: nn.Module) -> tuple[Any, ...] | None:
    """How to pickle or copy a model of a class that has been made here: it is made again from its state."""
    cls = type(model)
    return (_empty, (cls.__bases__[0],), model.__getstate__()) if _MADE in vars(cls) else None


def _empty(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)
