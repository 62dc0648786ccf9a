"""A block whose steps are known from the last time it ran: launches at new addresses, and linear layers.

What a block asks before each step has the same answers as long as it is the same, on the same plane, for a stream of
the same shape: which backends run, what lies how, what a kernel is given. So the first pass lists the calls that it
makes of operations, and a `PreparedBlock` repeats them, with a record for gradients by `block_functions`. Only where
everything in a block is plain, on kernels of ours, without autocast, and nobody watches (`tracing.nobody_watches`);
else `block.run_block` goes on part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_

import torch
import torch.nn.functional as F

from ..hosts.description import BlockDescription, WeightAndBias, weight_and_bias
from ..ops.activations.gelu import gelu_ref
from ..ops.eager import EagerCall, KnownCall, listed_calls
from ..ops.launch_plans import DescribedCall, described
from ..runtime.tracing import nobody_watches
from .block_functions import after_attention, before_attention, whole_block
from .branches import attended, in_heads, mlp_branch
from .stream import Layer, Own, Stream

MOST = 64  # of a block: for several planes, and shapes of volumes


class PreparedBlock:
    """A block on one plane for streams of one shape."""

    def __init__(
        self, block: BlockDescription, layer: Layer, boundary: KnownCall, attention: KnownCall | None, added: KnownCall
    ) -> None:
        self.block, self.boundary, self.attention, self.added = block, boundary, attention, added
        self.tables = None if layer.angles is None or attention is None else layer.angles.by_axis()
        self.qkv = [weight_and_bias(linear) for linear in block.attention.qkv]
        self.output, self.last = weight_and_bias(block.attention.output), weight_and_bias(block.mlp.last)
        self.norms = [(norm.known.weight, norm.known.bias) for norm in (block.norm1, block.norm2) if norm.known]
        self.first: Callable[[], WeightAndBias] | None = None  # of an MLP with GELU

    def holds(self) -> bool:
        """Whether nothing has changed that it relies on, and that `BlockDescription` does not tell."""
        return self.boundary.holds() and self.added.holds()

    def _attention(self, layer: Layer) -> KnownCall | None:
        """Where angles are others, as augmentation draws them, attention is not what it was."""
        if self.attention is None or not self.attention.holds():
            return None
        return self.attention if layer.angles is None or layer.angles.by_axis() is self.tables else None

    def __call__(self, held: list[Stream], layer: Layer) -> Stream:
        """The stream after the block; what came is taken out of its list."""
        if layer.choice.grad:
            return self._recorded(held, layer)
        came = held.pop()  # kept until kernels that read it have been launched
        x, normed, *_ = self.boundary(*[t for t in came if t is not None])
        if not x.numel():  # nothing was added
            x = came.residual
        del came
        made = in_heads([F.linear(normed, *linear()) for linear in self.qkv], self.block.attention.heads)
        attention = self._attention(layer)
        context = attended(made, self.block, layer) if attention is None else attention(*made)[0]
        del made
        branch = F.linear(context.flatten(2), *self.output())
        del context
        x, normed, *_ = self.added(x, branch)
        del branch
        if self.first is None:
            return Own(x, mlp_branch(self.block, normed, layer), self.block.scale2.gamma)
        hidden = F.linear(normed, *self.first())
        del normed
        return Own(x, F.linear(gelu_ref(hidden, inplace=True), *self.last()), self.block.scale2.gamma)

    def _recorded(self, held: list[Stream], layer: Layer) -> Stream:
        """The same with a record for gradients."""
        block, heads, gamma = self.block, self.block.attention.heads, self.block.scale2.gamma
        before = *held.pop(), *self.norms[0], *[t for linear in self.qkv for t in linear()]
        mlp = *self.first(), *self.last()  # type: ignore[misc]  # only an MLP with GELU is repeated here
        after = *self.output(), block.scale1.gamma, *self.norms[1], *mlp
        if (attention := self._attention(layer)) is not None:
            known, packed = (self.boundary, attention, self.added), 3 * heads if len(self.qkv) == 1 else heads
            x, branch = whole_block(known, packed, len(before), *before, *after)
            return Stream(x, branch, gamma)
        x, *made = before_attention(self.boundary, *before)
        del before
        context = attended(in_heads(made, heads), block, layer)
        x, branch = after_attention(self.added, x, context, *after)
        return Stream(x, branch, gamma)


class Preparation:
    """Of one call of a block: by what it is known, and what is known of it."""

    def __init__(self, block: BlockDescription, stream: Stream, layer: Layer, call: DescribedCall) -> None:
        self.block, self.layer, self.call = block, layer, call
        self.key = (layer.kind, call.key)
        self.given = [t for t in stream if t is not None]

    def found(self) -> PreparedBlock | None:
        found = self.block.prepared.get(self.key)
        return found if found is not None and found.holds() else None

    @property
    def is_new(self) -> bool:
        """Whether it is worth being prepared: what could not be, once, is not tried again."""
        return self.block.prepared.get(self.key, self) is not None

    @contextmanager
    def made(self) -> Iterator[None]:
        """Prepares what runs within."""
        with listed_calls() as calls:
            yield
        if len(self.block.prepared) >= MOST:
            self.block.prepared.clear()
        self.block.prepared[self.key] = self._prepared(calls)

    def _prepared(self, calls: Sequence[EagerCall]) -> PreparedBlock | None:
        names = [made.op.name for made in calls]
        sums = [i for i, name in enumerate(names) if name == "add_norm"]
        if len(sums) != 2 or sums[0] != 0 or not all([_is_known(calls[i]) for i in sums]):
            return None
        boundary, between, added, after = calls[0], calls[1 : sums[1]], calls[sums[1]], calls[sums[1] + 1 :]
        if len(boundary.call.tensors) < len(self.given) or not all(map(is_, boundary.call.tensors, self.given)):
            return None  # it was copied before
        block, attention = self.block, None
        if [made.op.name for made in between] == ["self_attention"] and _is_known(between[0]):
            attention = KnownCall(between[0], len(block.attention.qkv))
        made = PreparedBlock(
            block, self.layer, KnownCall(boundary, len(self.given)), attention, KnownCall(added, 2)
        )  # fmt: skip
        if block.mlp.activation == "gelu" and not after and self.layer.choice.gelu != "tanh_epilogue":
            made.first = weight_and_bias(block.mlp.first[0])
        return None if self.layer.choice.grad and made.first is None else made  # with SwiGLU part by part


def _is_known(made: EagerCall) -> bool:
    """Whether a call can be made again: by its plan, or, in the interpreter, by its body."""
    return made.plan is not None or not made.op.planned


def preparation(block: BlockDescription, held: Sequence[Stream], layer: Layer) -> Preparation | None:
    """None where a block is not repeated."""
    choice = layer.choice
    if choice.add_norm != "triton" or not choice.writes or choice.autocast is not None:
        return None
    if choice.grad and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None  # checkpointing runs it again, and wants the same tensors to be saved
    if not block.is_plain or not nobody_watches():
        return None
    call = described(held[0])
    return None if call is None else Preparation(block, held[0], layer, call)
