"""What a recorded pass depends on besides the values of weights, as it was; and whether it still is.

Looked at before every replay, so in few calls: a list of all values of all modules' attributes is compared with the
one of before, where what is the same object counts as equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..hosts.known import HOOKS

_REQUIRES_GRAD = attrgetter("requires_grad")
_STANDARD = {*nn.Module().__dict__, "taps"}  # containers of every module, looked at by themselves; taps are no part


def _all(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    """Their values, in a row."""
    return [*chain.from_iterable(map(dict.values, dictionaries))]


class Snapshot:
    """Of a model: its modules, attributes, hooks, settings, and where its parameters and buffers are."""

    def __init__(self, model: nn.Module) -> None:
        self._named = modules_of(model)
        modules = [*self._named]
        self._modules = modules
        names = [*self._named.values()]
        self._attributes = [m.__dict__ for m in modules]
        owners: dict[int, tuple[str, dict[str, Any]]] = {}  # objects of settings, which modules share
        for m, name in self._named.items():
            for kind in ("config", "adapter"):
                if hasattr(found := m.__dict__.get(kind), "__dict__"):
                    owners.setdefault(id(found), (f"{name}.{kind}", vars(found)))
        self._names = names + [name for name, _ in owners.values()]
        self._attributes += [attributes for _, attributes in owners.values()]
        held: dict[int, Any] = {id(d): d for m in modules for d in (m._parameters, m._buffers) if d}
        self._holders = [*held.values()]
        self._children = [*{id(d): d for d in [m._modules for m in modules] if d}.values()]
        hooks = [m.__dict__[kind] for m in modules for kind in HOOKS]
        self._hooked = [each for each in hooks if each]
        self._empty = [each for each in hooks if not each]
        self._kinds = [*dict.fromkeys([type(m) for m in modules])]
        values = [(d, name, value) for d in self._attributes for name, value in d.items() if name not in _STANDARD]
        self._tensors_aside = [each for each in values if isinstance(each[2], Tensor)]  # `==` would compute
        self._containers = [value for _, _, value in values if isinstance(value, (dict, list, set))]
        self._contents = [_copy(value) for value in self._containers]
        # Strong references: memory that a recorded pass reads stays, whoever replaces a weight.
        self._tensors = _all(self._holders)
        self._present = [t for t in self._tensors if t is not None]
        self._storages = [t.untyped_storage() for t in self._present]
        self._places = [*map(Tensor.data_ptr, self._present)]
        self._requires = [*map(_REQUIRES_GRAD, self._present)]
        self._lengths = [*map(len, self._attributes)]
        self._types = [*map(type, modules)]
        self._forwards = [kind.forward for kind in self._kinds]
        self._values = _all(self._attributes)
        self._in_modules = _all(self._children)
        self._in_hooks = [*map(list, map(dict.values, self._hooked))]
        # Lifted models, and the methods of accelerated ones, say what their passes read besides.
        found = {id(each): each for each in (*modules, *[value for _, _, value in values])}
        self._told = [each.pass_settings for each in found.values() if hasattr(type(each), "pass_settings")]
        self._set = self._settings()

    def moved(self) -> str | None:
        """Which parameter or buffer is another one now, elsewhere, or frozen where it was not; or None."""
        tensors = _all(self._holders)
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            return self._name_of_first("has been replaced", tensors)
        if [*map(Tensor.data_ptr, self._present)] != self._places:
            return self._name_of_first("has moved in memory", None)
        if [*map(_REQUIRES_GRAD, self._present)] != self._requires:
            return "a parameter's requires_grad has changed"
        return None

    def changed(self) -> str | None:
        """What else is not as it was, or None."""
        try:
            return self._changed()
        except Exception:  # of values whose comparison is no bool
            return "attributes of its modules have changed"

    def _changed(self) -> str | None:
        lengths = [*map(len, self._attributes)]
        if lengths != self._lengths:
            i = next(i for i, (one, other) in enumerate(zip(lengths, self._lengths)) if one != other)
            return f"{self._names[i]} has other attributes"
        if [*map(type, self._modules)] != self._types or [kind.forward for kind in self._kinds] != self._forwards:
            return "a module's class has changed"
        values = _all(self._attributes)
        if values != self._values:
            return self._attribute(values)
        if any([d.get(name) is not value for d, name, value in self._tensors_aside]):
            return "a tensor among its modules' attributes has been replaced"
        if _all(self._children) != self._in_modules:
            return "a module has been replaced"
        if any(self._empty) or [*map(list, map(dict.values, self._hooked))] != self._in_hooks or _has_any_global_hook():
            return "hooks have been added or removed"
        if self._containers != self._contents:
            return "a list or dictionary among its modules' attributes has changed"
        return None if self._settings() == self._set else "settings have changed"

    def _settings(self) -> list[Any]:
        return [*chain.from_iterable([told() for told in self._told])]

    def _attribute(self, values: list[Any]) -> str:
        labels = (f"{owner}.{name}" for owner, d in zip(self._names, self._attributes) for name in d)
        for label, one, other in zip(labels, values, self._values):
            if one is not other and one != other:
                return f"{label.removeprefix('.')} has changed"
        return "attributes of its modules have changed"

    def _name_of_first(self, what: str, tensors: list[Any] | None) -> str:
        names = [name for holder in self._holders for name in self._names_in(holder)]
        if tensors is not None:
            if len(tensors) != len(self._tensors):
                return "it has more or fewer parameters or buffers"
            found = [name for name, one, other in zip(names, tensors, self._tensors) if one is not other]
        else:
            present = [name for name, t in zip(names, self._tensors) if t is not None]
            found = [name for name, t, at in zip(present, self._present, self._places) if t.data_ptr() != at]
        return f"{found[0]} {what}"

    def _names_in(self, holder: dict[str, Any]) -> Iterator[str]:
        module = next(m for m in self._modules if holder is m._parameters or holder is m._buffers)
        prefix = self._named[module]
        return (f"{prefix}.{name}".removeprefix(".") for name in holder)


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """All modules that a pass may run, with their names: those of 2D models too, which lifted ones stand for."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(host := module.__dict__.get("host"), nn.Module) and host not in found:
            for inner, part in host.named_modules(prefix=name):
                found.setdefault(part, inner)
        found.setdefault(module, name)
    # What is scripted has no dictionaries to look at, and nothing of it changes.
    return {module: name for module, name in found.items() if not isinstance(module, torch.jit.ScriptModule)}


def _copy(value: Any, depth: int = 3) -> Any:
    """A container with other containers for those within it; equal to it as long as nobody changes them."""
    if depth and isinstance(value, dict):
        return {key: _copy(each, depth - 1) for key, each in value.items()}
    if depth and isinstance(value, list):
        return [_copy(each, depth - 1) for each in value]
    return set(value) if isinstance(value, set) else value
