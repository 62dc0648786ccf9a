"""How an operation runs where nobody watches: past torch's dispatcher, which takes the host longer than a small kernel
the GPU.

`CustomOp` comes here first. What traces, records, transforms or watches operations, and tensors of other kinds than
torch's own, get the operation that is registered; all others its body, and where gradients are recorded a plain
`torch.autograd.Function` around it with the same formulas. Bodies are run by plans (`launch_plans`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..runtime.tracing import nobody_watches
from .launch_plans import DescribedCall, LaunchPlan, described, is_current, unwatched, watched

MOST = 1024  # plans of an operation that are kept: a model has a few for each shape of volume


_now = threading.local()  # `.calls` of this thread, where they are listed


class EagerCall(NamedTuple):
    """A call of an operation past the dispatcher."""

    op: EagerOp
    args: Sequence[Any]
    call: DescribedCall
    plan: LaunchPlan | None


@contextmanager
def listed_calls() -> Iterator[list[EagerCall]]:
    """Of this thread within the block."""
    before, _now.calls = getattr(_now, "calls", None), []
    try:
        yield _now.calls
    finally:
        _now.calls = before


class EagerOp:
    """An operation without its dispatcher."""

    def __init__(
        self,
        name: str,
        body: Callable[..., Any],
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
        mutates: Sequence[int],
        devices: Sequence[str],
        planned: bool,
    ) -> None:
        """
        Args:
            body, setup_context, backward: as of `registration.register`.
            mutates: positions of the arguments that it writes to.
            devices: types of those on which bodies can launch.
            planned: whether plans are made, of kernels that triton compiles.
        """
        self.name, self.body, self.mutates, self.devices, self.planned = name, body, mutates, devices, planned
        self.setup_context, self.backward = setup_context, backward
        self._plans: dict[Any, LaunchPlan | None] = {}
        self._apply = _function(name, self.run, setup_context, backward) if backward is not None else None

    def __call__(self, args: Sequence[Any]) -> Any:
        """What the operation returns; NotImplemented where it has to go through torch's dispatcher."""
        again: _Again | None = getattr(_now, "again", None)
        if again is not None and again.op is self and (starts := again.starts(args)) is not None:
            return again.plan(starts)
        if not nobody_watches():
            return NotImplemented
        call = described(args)
        if call is None or call.device.type not in self.devices:
            return NotImplemented
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return NotImplemented if self._apply is None else self._apply(*args, call)
        return self.run(args, call)

    def run(self, args: Sequence[Any], call: DescribedCall) -> Any:
        """Without a record for gradients."""
        plan = self._plans.get(call.key)
        if plan is None and self.planned and call.key not in self._plans:
            if len(self._plans) >= MOST:
                self._plans.clear()
            out, plan = watched(self.body, args, call)
            self._plans[call.key] = plan
        elif plan is None or plan.hooked():
            out = unwatched(self.body, args)
        elif is_current(call.device):
            out = plan([*call.starts])
        else:
            with torch.cuda.device(call.device):
                out = plan([*call.starts])
        if self.mutates:  # what was kept for a gradient, or is a view, hears of it
            torch._C._increment_version([args[i] for i in self.mutates])
        if (calls := getattr(_now, "calls", None)) is not None:
            calls.append(EagerCall(self, args, call, plan))
        return out


class _Again:
    """A call within a formula for gradients, with a plan."""

    def __init__(self, made: EagerCall) -> None:
        self.op, self.device = made.op, made.call.device
        self.plan: LaunchPlan = made.plan  # type: ignore[assignment]  # it has one
        self._ends = [start & 15 for start in made.call.starts]

    def starts(self, args: Sequence[Any]) -> list[int] | None:
        """Addresses; None where gradients that have come lie otherwise than those before."""
        starts = []
        for a in args:
            for t in a if type(a) is list else (a,):
                if isinstance(t, Tensor):
                    if type(t) is not Tensor and type(t) is not Parameter:
                        return None
                    starts.append(t.data_ptr())
        known = [start & 15 for start in starts] == self._ends and not torch.is_grad_enabled()
        return starts if known and is_current(self.device) and not self.plan.hooked() else None


class KnownCall:
    """A call that is made again, with other tensors in the place of its first ones; its formulas for gradients.

    For those who know that these others are like the first ones were.
    """

    def __init__(self, made: EagerCall, changing: int) -> None:  # how many of its tensors change
        self.op, self.plan, self.device = made.op, made.plan, made.call.device
        self._places = [i for i, a in enumerate(made.args) if isinstance(a, Tensor)][:changing]
        self._args = [None if i in self._places else a for i, a in enumerate(made.args)]  # those would stay in memory
        self._starts = made.call.starts[changing:]
        self._same = [(t, start, t.dtype) for t, start in zip(made.call.tensors[changing:], self._starts)]
        self._again: dict[tuple[bool, ...], _Again] = {}  # in its formula for gradients

    def holds(self) -> bool:
        """Whether the others are where and what they were, on the current device, and nobody waits for launches."""
        if self.plan is not None and (self.plan.hooked() or not is_current(self.device)):
            return False
        return all([t.data_ptr() == start and t.dtype is dtype for t, start, dtype in self._same])

    def __call__(self, *changed: Tensor) -> Any:
        """What the operation returns."""
        if self.plan is not None:
            return self.plan([*[t.data_ptr() for t in changed], *self._starts])
        return unwatched(self.op.body, self.args(*changed))

    def args(self, *changed: Tensor) -> list[Any]:
        """Of the operation."""
        args = [*self._args]
        for i, t in zip(self._places, changed):
            args[i] = t
        return args

    def keep(self, needed: Sequence[bool], changed: Sequence[Tensor], out: Any) -> Kept:
        """What its backward needs; `needed` says of which arguments there will be gradients."""
        kept = Kept(needed)
        self.op.setup_context(kept, self.args(*changed), out)  # type: ignore[misc]  # it has formulas
        return kept

    def back(self, kept: Kept, *grads: Tensor | None) -> Sequence[Tensor | None]:
        """Gradients of its arguments, from those of what it returned, which are of their shapes and dtypes."""
        if not all([grad is None or grad.is_contiguous() for grad in grads]):
            return self.op.backward(kept, *grads)  # type: ignore[misc]  # it has formulas
        key = (*kept.needs_input_grad, *[grad is None for grad in grads])
        before, _now.again = getattr(_now, "again", None), self._again.get(key)
        try:
            if self.plan is None or key in self._again:
                return self.op.backward(kept, *grads)  # type: ignore[misc]
            with listed_calls() as calls:
                found = self.op.backward(kept, *grads)  # type: ignore[misc]
        finally:
            _now.again = before
        if len(calls) == 1 and calls[0].plan is not None:
            starts = [start for start in calls[0].call.starts if start]  # but of empty tensors
            if len(set(starts)) == len(starts):  # else the plan is of gradients that are one tensor
                self._again[key] = _Again(calls[0])
        return found


class Kept:
    """What a formula takes for the context of a `torch.autograd.Function`, within another one."""

    def __init__(self, needed: Sequence[bool]) -> None:
        self.needs_input_grad = needed
        self.saved_tensors: Sequence[Tensor | None] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nobody asks for their gradients."""

    def set_materialize_grads(self, value: bool) -> None:
        """None stays None."""

    def taken(self) -> Sequence[Tensor | None]:
        """The tensors, which somebody else saves."""
        tensors, self.saved_tensors = self.saved_tensors, ()
        return tensors


def _function(
    name: str,
    run: Callable[[Sequence[Any], DescribedCall], Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """``apply`` of a function with these formulas; a described call comes last."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs = args[:-1]
            out = run(inputs, args[-1])
            if setup_context is not None:
                setup_context(ctx, inputs, out)
            return tuple(out) if type(out) is list else out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            found = backward(ctx, *grads)
            if type(found) is not tuple:
                return found, None
            return *[None if type(grad) is list else grad for grad in found], None  # lists are of no gradients

    Eager.__name__ = Eager.__qualname__ = f"{name}_eager"
    return super(torch.autograd.Function, Eager).apply  # no transforms are active, nor have been
