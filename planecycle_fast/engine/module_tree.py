"""The tree of modules of a lifted model: the host's, with lifted blocks in place of the host's own.

There is one tree, whichever way one walks: `Tree` is the `_modules` of a lifted model and of every module on the way
to its blocks (`Mirror`), and follows the host's at each look. Writing to it:

* what stands there already: nothing happens, as of walkers that set whatever they found;
* a lifted block with something around it (checkpointing, FSDP, torch.compile): it stands in the lifted tree alone;
* a lifted block: the host's block is set in the host;
* a module that holds no lifted block: it is set in the host, and so in both;
* anything else that holds lifted blocks: refused.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

from ..hosts import Adapter
from .lifted_block import LiftedBlock
from .shared_module import SharedModule

if TYPE_CHECKING:
    from _collections_abc import dict_items, dict_keys, dict_values


class LiftedTree:
    """What stands in a lifted model for each module of its host."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.hosts: list[nn.Module] = []  # the host's blocks, as seen last
        self.blocks: tuple[LiftedBlock, ...] = ()  # of these
        self.shown: list[nn.Module] = []  # the same, or what has been put around them
        self.changes = 0  # of these lists
        self._lifted: dict[nn.Module, LiftedBlock] = {}  # by host
        self._wrapped: dict[nn.Module, nn.Module] = {}  # by host: what has been put around its lifted block
        self._mirrors: dict[nn.Module, Mirror] = {}  # by host
        self._list: Mirror | None = None  # of blocks that are no container's only children

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mirrors": {}, "_list": None}  # made again in copies, as they are asked for

    def layers(self) -> list[nn.Module]:
        """Lifted blocks, first to last, or what has been put around them."""
        hosts = list(self.adapter.blocks)
        if len(hosts) != len(self.hosts) or not all([host is known for host, known in zip(hosts, self.hosts)]):
            self._lift(hosts)
        return self.shown

    def _lift(self, hosts: list[nn.Module]) -> None:
        for host in hosts:  # setdefault: other threads may be here as well
            host in self._lifted or self._lifted.setdefault(host, LiftedBlock(self.adapter, host))
        inside = {*self.adapter.model.modules()}
        self._lifted = {host: self._lifted[host] for host in hosts}
        self._wrapped = {host: around for host, around in self._wrapped.items() if host in self._lifted}
        self._mirrors = {host: mirror for host, mirror in [*self._mirrors.items()] if host in inside}
        self._list = None
        self.blocks = tuple([self._lifted[host] for host in hosts])
        self._show(hosts)

    def _show(self, hosts: list[nn.Module]) -> None:
        self.shown = [self._wrapped.get(host, self._lifted[host]) for host in hosts]
        self.hosts, self.changes = hosts, self.changes + 1

    def stands_for(self, module: nn.Module | None) -> nn.Module | None:
        """What a module of the host is in the lifted tree."""
        if module in self._lifted:
            return self._wrapped.get(module, self._lifted[module])
        if module in self._mirrors:
            return self._mirrors[module]
        if module is None or not any([inner in self._lifted for inner in module.modules()]):
            return module
        return self._mirrors.setdefault(module, Mirror(module, self))

    def to_host(self, name: str, value: Any, at: nn.Module | None) -> Any:
        """What becomes of the host where `value` is set in the lifted tree, in the place of the host's module `at`.

        Raises TypeError for what cannot stand there.
        """
        if not isinstance(value, nn.Module):
            return value
        found = [m for m in (value, *value.modules()) if isinstance(m, (LiftedBlock, Mirror))]
        if isinstance(value, (LiftedBlock, Mirror)) and value is not self._list:
            return value.host
        if not found:
            return value
        known = [host for host, around in self._wrapped.items() if around is value]
        if known:
            return known[0]
        if at in self._lifted and found[0] is self._lifted[at]:
            return at
        raise TypeError(f"{name} cannot be set to a module that holds lifted blocks; set blocks[i] one by one")

    def put(self, host: nn.Module | None, value: Any) -> None:
        """`value` has been set in place of `host`, which is still the host's."""
        if host not in self._lifted:
            return
        if isinstance(value, LiftedBlock) or value is host:
            self._wrapped.pop(host, None)
        else:
            self._wrapped[host] = value
        self._show(self.hosts)

    def around(self) -> Iterator[nn.Module]:
        """The modules that have been put around lifted blocks."""
        waiting = [*self._wrapped.values()]
        while waiting:
            module = waiting.pop()
            if not isinstance(module, LiftedBlock):
                yield module
                waiting.extend(module.children())

    def block_list(self, tree: Tree) -> Mirror:
        """The container below `tree` whose children are just the layers, or one that is made of them."""
        layers = self.layers()
        waiting = [*tree.values()]
        while waiting:
            module = waiting.pop(0)
            if isinstance(module, Mirror):
                children = [*module._modules.values()]
                if len(children) == len(layers) and all([a is b for a, b in zip(children, layers)]):
                    return module
                waiting.extend(children)
        if self._list is None:
            self._list = Mirror(nn.ModuleList(self.hosts), self, spread=True)
        return self._list

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Sets a module of the host in the place, or places, of another one. Raises TypeError if there is none."""
        places = [(m, n) for m in self.adapter.model.modules() for n, child in m._modules.items() if child is old]
        if not places:
            raise TypeError("blocks cannot be set: the model holds them in no module of its own")
        for module, name in places:
            setattr(module, name, new)


_BY_METHODS: Any = MutableMapping  # with no type of its own: annotations have it that dict is one already


class Tree(_BY_METHODS, dict[str, nn.Module | None]):
    """`_modules` of a lifted model or a mirror. Its own contents are what was shown last: see `_now`."""

    def __init__(self, host: nn.Module, lifted: LiftedTree, spread: bool = False) -> None:
        super().__init__()
        self.host, self.lifted = host, lifted
        self.spread = spread  # whether the host's modules stand elsewhere as well, and are set there
        self._seen: Any = None

    def _now(self) -> Tree:
        """Itself, as the host's modules are now."""
        lifted, theirs = self.lifted, self.host._modules
        with suppress(AttributeError):  # where the container of the blocks has been taken out, to be set again
            lifted.layers()
        seen = (lifted.changes, [*theirs], [*map(id, theirs.values())])
        if seen != self._seen:
            shown = {name: lifted.stands_for(module) for name, module in theirs.items()}
            if [*shown] != [*dict.keys(self)]:  # else in place: somebody may be on the way through it
                dict.clear(self)
            dict.update(self, shown)
            self._seen = seen
        return self

    def __getitem__(self, name: str) -> nn.Module | None:
        return dict.__getitem__(self._now(), name)

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self._now(), name)

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self._now())

    def __len__(self) -> int:
        return dict.__len__(self._now())

    def __reversed__(self) -> Iterator[str]:
        return dict.__reversed__(self._now())

    def keys(self) -> dict_keys[str, nn.Module | None]:
        return dict.keys(self._now())

    def values(self) -> dict_values[str, nn.Module | None]:
        return dict.values(self._now())

    def items(self) -> dict_items[str, nn.Module | None]:
        return dict.items(self._now())

    def copy(self) -> dict[str, nn.Module | None]:
        return {**self}

    def __repr__(self) -> str:
        return repr({**self})

    def __setitem__(self, name: str, value: nn.Module | None) -> None:
        if name in self and dict.__getitem__(self, name) is value:
            return
        theirs = self.host._modules
        old = theirs.get(name)
        new = self.lifted.to_host(name, value, old)
        if new is old and name in theirs:
            self.lifted.put(old, value)
        elif not self.spread:
            theirs[name] = new
        elif old is not None:
            self.lifted.replace(old, new)
        else:
            raise TypeError("blocks cannot be added here: the model holds them in several modules of its own")
        self._now()

    def __delitem__(self, name: str) -> None:
        if self.spread:
            raise TypeError("blocks cannot be taken out here: the model holds them in several modules of its own")
        del self.host._modules[name]
        self._now()

    def set_all(self, modules: dict[str, nn.Module | None]) -> None:
        """In place of everything."""
        theirs = {
            name: self.lifted.to_host(name, value, self.host._modules.get(name)) for name, value in modules.items()
        }
        if self.spread:
            raise TypeError("blocks cannot be exchanged here: the model holds them in several modules of its own")
        self.host._modules = theirs
        self._now()

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (Tree,), {**vars(self), "_seen": None}  # type: ignore[attr-defined]  # typeshed lacks it


class TreeModule(SharedModule):
    """A module with a `Tree`: a lifted model, or a mirror."""

    def __init__(self, host: nn.Module, lifted: LiftedTree, spread: bool = False) -> None:
        SharedModule.__init__(self, host)
        self.__dict__.update(lifted_tree=lifted, _modules=Tree(host, lifted, spread))

    def _share(self, name: str, value: Any) -> None:
        if name == "_modules":
            self.__dict__[name].set_all(value)
        else:
            SharedModule._share(self, name, value)

    def _for_host(self, name: str, value: Any) -> Any:
        return self.lifted_tree.to_host(name, value, None)

    def around(self) -> Iterator[nn.Module]:
        return self.lifted_tree.around()


class Mirror(TreeModule, nn.ModuleList):
    """A host's module on the way to its blocks, usually the list of them, with lifted blocks in their place."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return nn.ModuleList.__getitem__(self, index)

    def around(self) -> Iterator[nn.Module]:
        inside = {*self.modules()}
        return iter([module for module in self.lifted_tree.around() if module in inside])
