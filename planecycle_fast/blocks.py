"""The blocks of a lifted model: modules that are called with the stream, and own nothing that is not the host's.

`LiftedBlock` shares the dictionaries of a host's block (parameters, submodules, hooks of state_dict), so that both are
one: what is loaded, replaced or sharded in one shows in the other. `module_tree` puts them in the place of the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .groups import Following
from .layer import Layer, Stream
from .ops import Norm
from .parts import Plan, plan_of, watched
from .reading import Reading
from .shared_module import SharedModule
from .stream import run_block


class LiftedBlock(SharedModule):
    """One layer of a lifted model: takes a `Stream` and a `Layer`, returns a `Stream`.

    What hooks see: ``args`` is ``(stream, layer)``, the rows of `stream` in the order of the previous layer's plane,
    ``layer.old``; the output's rows are in the order of this layer's plane, ``layer.new``. Both are (B*P, g + L, C),
    see `planecycle_fast.planes`; ``stream.tokens()`` are the features after a block. A hook that changes the stream
    returns ``Stream(tokens)``. Hooks on the host's own block (``unlift(lifted)``) see tokens in the order of this
    layer's plane, before and after, and make it run as a whole.

    FSDP2 (`fully_shard`), activation checkpointing and anything else that wraps modules goes around lifted blocks.
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
        if layer.look is not None:
            layer.look(stream)
        return Stream(*self.take([stream], layer)[0])

    def take(
        self, held: list[Stream], layer: Layer, following: Iterable[Following] = ()
    ) -> tuple[Stream | tuple[Tensor, Tensor], int]:
        """`forward` of the stream in a list, which is taken out of it: its memory is free once it has been read.

        With it the steps that are `following` which can run in the same call; and how many steps that were.
        """
        if not isinstance(held[0], Stream):
            raise TypeError(
                f"stream must be a planecycle_fast.Stream, got {type(held[0]).__name__}; hooks must return one"
            )

        def call(tokens: Tensor) -> Tensor:  # (B*P, g + L, C) to the same
            return self.adapter.call_block(self.host, tokens, layer.grid, layer.sincos)

        parts, checkpoint = self.reading.now(), self.adapter.checkpoint(self.host)  # for all of this call
        if checkpoint is None or not torch.is_grad_enabled() or plan_of(parts).block is not None:
            out, ran = run_block(parts, held, layer, call, following)
        else:  # tensors one by one: some ways of checkpointing see no others
            if plan_of(parts).attention is not None:  # made outside: they serve other blocks, and may be learned
                _ = layer.sincos
            anew = self.reading.parts  # read when it runs: again in backward, with other tensors if it is sharded
            run = lambda *stream: _own_scale(run_block(anew, [Stream(*stream)], layer, call)[0])  # noqa: E731
            out, ran = Stream(*checkpoint(run, *held.pop())), 1
        hooked = self._forward_hooks and isinstance(out, Stream)  # a hook may have come while a last norm ran as well
        return (_own_scale(out) if hooked else out), ran  # FSDP frees the parameter when the block ends

    def extra_repr(self) -> str:
        return type(self.host).__name__


Step = tuple["nn.Module | Norm", Layer]  # a lifted block or what is around it, or the last norm; and where it stands


def run_lifted(steps: list[Step], held: list[Stream]) -> Stream | tuple[Tensor, Tensor]:
    """The next step, or several at once, which are taken off `steps`; the stream is taken out of its list.

    Returns the stream, or after a last norm the tokens and their norm, (B*P, g + L, C) each.
    """
    step, layer = steps[0]
    if isinstance(step, Norm):
        out, ran = layer.switch(held.pop(), step), 1
    elif _is_plain(step):
        out, ran = step.take(held, layer, _following(steps))
    else:
        out, ran = step(Stream(*held.pop()), layer), 1  # hooks may keep it, or change it
    del steps[:ran]
    return out


def _is_plain(block: nn.Module) -> bool:
    """Whether nobody can tell that a block is not called as a module."""
    return type(block) is LiftedBlock and watched(block) is None


def _following(steps: Sequence[Step]) -> Iterator[Following]:
    """What comes after the first, as long as nobody sees what is between."""
    for step, layer in islice(steps, 1, None):
        if isinstance(step, Norm):
            yield step, layer
        elif _is_plain(step):
            yield step.reading.now(), layer
        else:
            return


def _own_scale(stream: Stream) -> Stream:
    """The stream with a scale that is no parameter."""
    return stream if stream.scale is None else stream._replace(scale=stream.scale.clone())
