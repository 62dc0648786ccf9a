"""The blocks of a lifted model: modules that are called with the stream, and own nothing that is not the host's.

`LiftedBlock` and `Mirror` share the dictionaries of a host's module (parameters, submodules, hooks of state_dict), so
that both are one: what is loaded, replaced or sharded in one shows in the other. Mirrors stand where the host keeps
its blocks, such that walking through a lifted model meets lifted blocks instead of the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .branches import make_tables
from .groups import Following
from .layer import Layer, Stream
from .ops import Norm
from .parts import Plan, watched
from .placement import TensorsOfHost
from .reading import Reading
from .stream import run_block

SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class SharedModule(nn.Module):
    """A module with the dictionaries and the mode, training or not, of another one, `self.host`."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        # Sharing the dictionaries themselves is what makes both modules one: keys, Parameter objects,
        # replaced submodules (LoRA) and assigned parameters are the same in both, copies included.
        for shared in SHARED:
            self.__dict__[shared] = host.__dict__[shared]
        self.__dict__["host"] = host  # past nn.Module.__setattr__: no child

    @property
    def training(self) -> bool:
        """Shared with the host, like everything else."""
        return self.host.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "host" in self.__dict__:  # not yet while nn.Module.__init__ runs
            self.host.training = mode

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "a lifted model cannot be compiled by torch.jit.script; use torch.export, or torch.jit.trace for one shape"
        )

    def train(self, mode: bool = True) -> SharedModule:
        self.host.train(mode)  # hosts override this, to keep norms frozen for example
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedModule:
        self.host._apply(fn) if recurse else self.host._apply(fn, recurse=False)  # overridden by hosts as well
        return self


class LiftedBlock(TensorsOfHost, SharedModule):
    """One layer of a lifted model: takes a `Stream` and a `Layer`, returns a `Stream`.

    What hooks see: ``args`` is ``(stream, layer)``, the rows of `stream` in the order of the previous layer's plane,
    ``layer.old``; the output's rows are in the order of this layer's plane, ``layer.new``. Both are (B*P, g + L, C),
    see `planecycle_fast.planes`; ``stream.tokens()`` are the features after a block. A hook that changes the stream
    returns ``Stream(tokens)``. Hooks on the host's own block (``unlift(lifted)``) see tokens in the order of this
    layer's plane, before and after, and make it run as a whole.

    FSDP2 (`fully_shard`), activation checkpointing and anything else that wraps modules goes around lifted blocks. What
    a block returns when it is called is a stream of one tensor, its own: what is kept between checkpointed blocks is no
    more than that, and no parameter leaves a block whose owner may free it. Blocks that nobody watches are not called:
    between those streams are ``residual + scale * branch``, which the next one adds.
    """

    def __init__(self, adapter: Adapter, block: nn.Module) -> None:
        super().__init__(block)
        self.__dict__.update(adapter=adapter, reading=Reading(adapter.parts(block)))

    def plan(self) -> Plan:
        """What of the block runs by operations now, and why the rest does not."""
        parts = self.reading.now()
        return Plan(block=parts) if isinstance(parts, str) else parts.plan()

    def forward(self, stream: Stream, layer: Layer) -> Stream:
        """Runs the layer.

        Raises TypeError for a stream that is none: a hook may have returned something else.
        """
        if not isinstance(stream, Stream):
            raise TypeError(
                f"stream must be a planecycle_fast.Stream, got {type(stream).__name__}; hooks must return one"
            )
        layer = layer.on(stream.residual.device)  # hooks that move arguments see a stream, and no tables
        if layer.look is not None:
            layer.look(stream)
        return layer.one(self.take([stream], layer)[0], layer.new)

    def take(
        self, held: list[Stream], layer: Layer, following: Iterable[Following] = ()
    ) -> tuple[Stream | tuple[Tensor, Tensor], int]:
        """`forward` of the stream in a list, which is taken out of it: its memory is free once it has been read.

        With it the steps that are `following` which can run in the same call; and how many steps that were. The stream
        that goes out may hold this block's LayerScale, for a block that follows without being called.
        """

        def call(tokens: Tensor) -> Tensor:  # (B*P, g + L, C) to the same
            return self.adapter.call_block(self.host, tokens, layer.grid, layer.sincos)

        checkpoint = self.adapter.checkpoint(self.host)
        if checkpoint is None or not torch.is_grad_enabled() or self.plan().block is not None:
            out, ran = run_block(self.reading.now(), held, layer, call, following)
        else:  # tensors one by one: some ways of checkpointing see no others
            parts = self.reading.parts
            make_tables(layer, held[0].residual.device)

            def run(*stream: Tensor | None) -> Tensor:  # residual, branch, scale to (B*P, g + L, C)
                return layer.one(run_block(parts, [Stream(*stream)], layer, call)[0], layer.new).residual

            out, ran = Stream(checkpoint(run, *held.pop())), 1
        return out, ran

    def extra_repr(self) -> str:
        return type(self.host).__name__


Step = tuple["nn.Module | Norm", Layer]  # a lifted block or what is around it, or the last norm; and where it stands


def run_lifted(steps: list[Step], held: list[Stream]) -> Stream | tuple[Tensor, Tensor]:
    """The next step, or several at once, which are taken off `steps`; the stream is taken out of its list.

    Returns the stream, or after a last norm the tokens and their norm, (B*P, g + L, C) each.
    """
    step, layer = steps[0]
    if isinstance(step, Norm):
        out, ran = layer.on(held[0].residual.device).switch(held.pop(), step), 1
    elif is_plain(step):
        out, ran = step.take(held, layer, _following(steps))
    else:
        one = layer.on(held[0].residual.device).one(held.pop(), layer.old)  # hooks may keep it, or change it
        out, ran = step(one, layer), 1
        if not isinstance(out, Stream):
            raise TypeError(
                f"stream must be a planecycle_fast.Stream, got {type(out).__name__}; hooks must return one, and "
                "checkpointing around a block must not be reentrant, which makes a tuple of it"
            )
    del steps[:ran]
    return out


def is_plain(block: nn.Module) -> bool:
    """Whether nobody can tell that a block is not called as a module."""
    return type(block) is LiftedBlock and watched(block) is None


def _following(steps: Sequence[Step]) -> Iterator[Following]:
    """What comes after the first, as long as nobody sees what is between."""
    for step, layer in islice(steps, 1, None):
        if isinstance(step, Norm):
            yield step, layer
        elif is_plain(step):
            yield step.reading.now(), layer
        else:
            return


class Mirror(nn.ModuleList):
    """A host's module on the way to its blocks, usually the list of them, with lifted blocks in their place."""

    def __init__(self, host: nn.Module, children: dict[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        for shared in SHARED:
            self.__dict__[shared] = host.__dict__[shared]
        self.__dict__.update(host=host, _modules=children)

    training = SharedModule.training

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return super().__getitem__(index)


def mirrored(module: nn.Module, blocks: dict[int, nn.Module]) -> nn.Module:
    """`module`, or where any of `blocks` (by the id of the host's) is inside, a `Mirror` of it that holds those."""
    if id(module) in blocks:
        return blocks[id(module)]
    children = {name: mirrored(child, blocks) for name, child in module._modules.items() if child is not None}
    if all([child is module._modules[name] for name, child in children.items()]):
        return module
    return Mirror(module, {name: children.get(name) for name in module._modules})


def holds_lifted(module: nn.Module) -> bool:
    """Whether lifted blocks are in a module, or it is one."""
    return any([isinstance(inner, (LiftedBlock, Mirror)) for inner in module.modules()])


def list_of(mirrors: Iterable[nn.Module], blocks: Sequence[nn.Module]) -> nn.ModuleList:
    """The mirror among or below these whose children are just `blocks`, or a new list of them."""
    for mirror in mirrors:
        if isinstance(mirror, Mirror):
            if [*mirror._modules.values()] == list(blocks):
                return mirror
            found = list_of([child for child in mirror._modules.values() if child is not None], blocks)
            if isinstance(found, Mirror):
                return found
    return nn.ModuleList(blocks)
