"""The blocks of a lifted model: modules that are called with the stream, and own nothing that is not the host's.

`LiftedBlock` shares the dictionaries of a host's block (parameters, submodules, hooks of state_dict), so that both are
one: what is loaded, replaced or sharded in one shows in the other. `module_tree` puts them in the place of the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..hosts import Adapter
from ..hosts.description import BlockDescription, Reading
from ..hosts.known import why_called
from ..hosts.placement import TensorsOfHost
from .passes import OnStream
from .shared_module import SharedModule
from .stream import Layer, Stream


class LiftedBlock(OnStream, TensorsOfHost, SharedModule):
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

    def description(self) -> BlockDescription:
        """What of the block runs by operations now, and why the rest does not."""
        return self.reading.now()

    def forward(self, stream: Stream, layer: Layer) -> Stream:
        """Runs the layer.

        Raises TypeError for a stream that is none: a hook may have returned something else.
        """
        if not isinstance(stream, Stream):
            raise TypeError(
                f"stream must be a planecycle_fast.Stream, got {type(stream).__name__}; hooks must return one"
            )
        layer = layer.here(stream)  # hooks that move arguments see a stream, and no tables
        if layer.look is not None:
            layer.look(stream)
        return layer.one(self.take([stream], layer)[0], layer.new)

    def why_called(self) -> str | None:
        return why_called(self, LiftedBlock)

    def whole(self, tokens: Tensor, layer: Layer) -> Tensor:
        return self.adapter.call_block(self.host, tokens, layer.grid, layer.sincos)

    def checkpoint(self) -> Callable[..., Any] | None:
        return self.adapter.checkpoint(self.host)

    def extra_repr(self) -> str:
        return type(self.host).__name__
