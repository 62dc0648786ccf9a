"""The blocks of a lifted model: modules that are called with the stream, and own nothing that is not the host's.

`LiftedBlock` shares the dictionaries of a host's block (parameters, submodules, hooks of state_dict), so that both are
one: what is loaded, replaced or sharded in one shows in the other. `module_tree` puts them in the place of the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ..hosts import Adapter
from ..hosts.parts import Plan, plan_of, watched
from ..hosts.parts_cache import Reading
from ..hosts.placement import TensorsOfHost
from ..ops import Norm
from .block import run_block
from .branches import make_tables
from .cpu_groups import Following
from .shared_module import SharedModule
from .stream import Layer, Stream


class LiftedBlock(TensorsOfHost, SharedModule):
    """One layer of a lifted model: takes a `Stream` and a `Layer`, returns a `Stream`.

    What hooks see: ``args`` is ``(stream, layer)``, the rows of `stream` in the order of the previous layer's plane,
    ``layer.old``; the output's rows are in the order of this layer's plane, ``layer.new``. Both are (B*P, g + L, C),
    see `planecycle_fast.geometry.planes`; ``stream.tokens()`` are the features after a block. A hook that changes it
    returns ``Stream(tokens)``. Hooks on the host's own block (``unlift(lifted)``) see tokens in the order of this
    layer's plane, before and after, and make it run as a whole.

    FSDP2 (`fully_shard`), activation checkpointing and anything else that wraps modules goes around lifted blocks. What
    a block returns when it is called is a stream of one tensor, its own: what is kept between checkpointed blocks is no
    more than that, and no parameter leaves a block whose owner may free it. Blocks that nobody watches are not called:
    between those streams are ``residual + scale * branch``, which the next one adds.
    """

    def __init__(self, adapter: Adapter, block: nn.Module) -> None:
        super().__init__(block)
        self.__dict__.update(adapter=adapter, reading=Reading(adapter.parts(block)), told=adapter.block_settings)

    def plan(self) -> Plan:
        """What of the block runs by operations now, and why the rest does not."""
        return plan_of(self.reading.now())

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

        parts, checkpoint = self.reading.now(), self.adapter.checkpoint(self.host)  # for all of this call
        if checkpoint is None or not torch.is_grad_enabled() or plan_of(parts).block is not None:
            out, ran = run_block(parts, held, layer, call, following)
        else:  # tensors one by one: some ways of checkpointing see no others
            anew = self.reading.parts  # read when it runs: again in backward, with other tensors if it is sharded
            make_tables(layer, held[0].residual.device)

            def run(*stream: Tensor | None) -> Tensor:  # residual, branch, scale to (B*P, g + L, C)
                return layer.one(run_block(anew, [Stream(*stream)], layer, call)[0], layer.new).residual

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
        here = layer.on(held[0].residual.device)
        if torch.is_grad_enabled():  # it may be checkpointed
            make_tables(here, held[0].residual.device)
        out, ran = step(here.one(held.pop(), layer.old), layer), 1  # hooks may keep the stream, or change it
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
