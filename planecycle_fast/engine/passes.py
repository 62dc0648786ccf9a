"""A pass: consecutive blocks on the residual stream, for lifted models and for those of the authors' code alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..hosts.description import BlockDescription, Reading
from ..hosts.parts import WHOLE
from ..ops import Norm
from ..ops.choice import Choice
from ..runtime.recording import is_recording
from .block import run_block
from .branches import make_tables
from .cpu_groups import Following
from .stream import Layer, Stream


class OnStream:
    """A host's block that a pass runs without calling it as a module, as long as nobody can tell."""

    reading: Reading
    __call__: Callable[..., Any]  # of modules, which blocks are

    def why_called(self) -> str | None:
        """Why somebody could tell, or None."""
        return None

    @abstractmethod
    def whole(
        self,
        tokens: Tensor,  # (B*P, g + L, C)
        layer: Layer,
    ) -> Tensor:  # the same
        """All of the block by the host's own code."""

    def checkpoint(self) -> Callable[..., Any] | None:
        """``function(run, *tensors)`` where the block's activations are computed again in backward."""
        return None

    def take(
        self, held: list[Stream], layer: Layer, following: Iterable[Following] = ()
    ) -> tuple[Stream | tuple[Tensor, Tensor], int]:
        """Runs on the stream in a list, which is taken out of it: its memory is free once it has been read.

        With it the steps that are `following` which can run in the same call; and how many steps that were. The stream
        that goes out may hold this block's LayerScale, for a block that follows without being called.
        """
        block, checkpoint = self.reading.now(), self.checkpoint()  # for all of this call
        if checkpoint is None or not torch.is_grad_enabled() or block.whole is not None:
            return run_block(block, held, layer, self.whole, following)
        if is_recording():
            raise RuntimeError("activation checkpointing runs blocks again in backward, by Python")
        make_tables(layer)

        def run(*stream: Any) -> Tensor:  # residual, branch, scale to (B*P, g + L, C)
            # Read when it runs: again in backward, with other tensors if it is sharded.
            came = Stream(*stream)
            here = layer.here(came)
            out = run_block(self.reading.anew(), [came], here, self.whole)[0]
            return here.one(out, here.new).residual  # type: ignore[arg-type]  # nothing follows: it is a stream

        return Stream(checkpoint(run, *held.pop())), 1  # tensors one by one: some ways of checkpointing see no others


Called = Callable[[Stream, Layer], Stream]  # a block that is called as a module, or what stands around it
Step = tuple["OnStream | Called | Norm", Layer]  # or the last norm; and where it stands


def run_pass(
    step: Callable[[int], Step],
    held: list[Stream],
    wanted: Collection[int],
    leave: Callable[[int], tuple[Norm | None, Layer]],
    finish: Callable[[Tensor | tuple[Tensor, Tensor], Layer], Any],
    one_by_one: bool = False,
    after_steps: Callable[[int], None] | None = None,
) -> list[Any]:
    """Runs blocks up to the last one wanted; what `finish` makes of each one wanted.

    Args:
        step: block i, and where it stands.
        held: the stream before the first block; taken out.
        wanted: indices of blocks.
        leave: of one that is wanted, the norm after it, and the change of planes to its features.
        finish: is given the tokens after that change (B*P, g + L, C), or with a norm the two, and `leave`'s layer.
        one_by_one: whether a step is made when those before it have run: what it draws comes in the host's order.
        after_steps: told how many steps have run.
    """
    outputs, done, last = [], 0, max(wanted)
    for end in range(last + 1) if one_by_one else sorted(wanted):
        steps = [step(i) for i in range(done, end + 1)]
        norm, leaving = leave(end) if end in wanted else (None, None)
        if end == last and norm is not None and leaving is not None:
            steps.append((norm, leaving))
        while steps:
            before = len(steps)
            held = [_run_next(steps, held)]  # type: ignore[list-item]  # or, of the last norm, what it returns
            if after_steps is not None:
                after_steps(before - len(steps))
        if leaving is not None:
            out = held[0]
            held = [] if end == last else [Stream(*out)]  # seen: features may be views of it
            outputs.append(finish(leaving.here(out).switch(out, norm) if isinstance(out, Stream) else out, leaving))
            del out
        done = end + 1
    return outputs


def _run_next(steps: list[Step], held: list[Stream]) -> Stream | tuple[Tensor, Tensor]:
    """The next step, or several at once, which are taken off `steps`; the stream is taken out of its list.

    Returns the stream, or after a last norm the tokens and their norm, (B*P, g + L, C) each.
    """
    out: Stream | tuple[Tensor, Tensor]
    step, layer = steps[0]
    layer = layer.here(held[0])  # hooks on those before may have changed the mode, or the device
    if isinstance(step, Norm):
        out, ran = layer.switch(held.pop(), step), 1
    elif _is_taken(step):
        out, ran = step.take(held, layer, _following(steps))
    else:
        if torch.is_grad_enabled():  # it may be checkpointed
            make_tables(layer)
        out, ran = step(layer.one(held.pop(), layer.old), layer), 1  # hooks may keep the stream, or change it
        if not isinstance(out, Stream):
            raise TypeError(
                f"stream must be a planecycle_fast.Stream, got {type(out).__name__}; hooks must return one, and "
                "checkpointing around a block must not be reentrant, which makes a tuple of it"
            )
    del steps[:ran]
    return out


def _is_taken(step: Any) -> TypeGuard[OnStream]:
    return isinstance(step, OnStream) and step.why_called() is None


def _following(steps: Sequence[Step]) -> Iterator[Following]:
    """What comes after the first, as long as nobody sees what is between."""
    for step, layer in islice(steps, 1, None):
        if isinstance(step, Norm):
            yield step, layer
        elif _is_taken(step):
            yield step.reading.now(), layer
        else:
            return


def check_strict(choice: Choice, attention: str, blocks: Callable[[], Sequence[BlockDescription]]) -> None:
    """Raises ValueError where a backend, attention or GELU asked for by name would have to leave parts to the host."""
    named: dict[str, tuple[str, ...] | None]
    named = {} if choice.asked in ("auto", "reference") else {f"backend {choice.asked!r}": None}
    named |= {} if attention == "auto" else {f"attention {attention!r}": ("block", "attention")}
    named |= {} if choice.gelu != "tanh_epilogue" else {"gelu 'tanh_epilogue'": ("block", "mlp")}
    if not choice.strict or not named:  # the reference replaces nothing
        return
    kept = [_kept(block, choice.gelu) for block in blocks()]
    for name, needed in named.items():
        for i, reasons in enumerate(kept):
            for part, reason in reasons.items():
                if reason != WHOLE if needed is None else part in needed:  # plane changes go by backends anyway
                    raise ValueError(
                        f"{name} would leave block {i}'s {part} to the model's own code: {reason}; expected a model "
                        "whose parts can be replaced (`report()` lists them), or strict=False"
                    )


def _kept(block: BlockDescription, gelu: str) -> Mapping[str, str]:
    """Why parts are left to the host; an MLP without GELU too, where one is asked for by name."""
    if gelu != "tanh_epilogue" or block.kept.keys() & {"block", "mlp"} or block.mlp.activation == "gelu":
        return block.kept
    return {**block.kept, "mlp": f"it has {block.mlp.activation}, and no GELU"}
