"""Launches that are made once and repeated: what an operation's body does for calls of one kind, without its Python.

A body asks tensors for nothing but shapes, strides, dtypes and devices, allocates, and launches kernels. So what it did
for one call it does for all of the same kind (`DescribedCall.key`): a `LaunchPlan` holds what to allocate, and
compiled kernels with their grids and arguments, among which only addresses change. A body that does anything else has
none, and runs every time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

_MAKES = {
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
}
_now = threading.local()  # `.watch`: the body that runs in this thread


class DescribedCall(NamedTuple):
    """Arguments of an operation."""

    key: tuple[Any, ...]  # all that its body depends on
    tensors: Sequence[Tensor]  # those among them, in order
    starts: Sequence[int]  # their addresses
    device: torch.device  # of the first


def described(args: Sequence[Any]) -> DescribedCall | None:
    """None where a tensor is of another kind than torch's own, or has no memory; or where there is none."""
    key: list[Any] = []
    tensors: list[Tensor] = []
    starts: list[int] = []
    try:
        for a in args:
            several = type(a) is list
            if several:
                key.append(len(a))
            for t in a if several else (a,):
                if type(t) is Tensor or type(t) is Parameter:
                    start = t.data_ptr()
                    tensors.append(t)
                    starts.append(start)
                    key += (t.shape, t.stride(), t.dtype, t.device, start & 15)  # bodies ask for alignment
                elif isinstance(t, Tensor):
                    return None
                else:
                    key.append(t)
    except RuntimeError:  # of what a transform has left behind
        return None
    if not tensors:
        return None
    if len(set(starts)) < len(starts):  # a tensor may be in several places: which of them a kernel is given is the same
        key += map(starts.index, starts)
    return DescribedCall(tuple(key), tensors, starts, tensors[0].device)


def is_current(device: torch.device) -> bool:
    """Whether kernels that are launched now run there."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


class PlannedLaunch(NamedTuple):
    """One kernel."""

    run: Callable[..., None]  # of the compiled kernel, as triton launches it
    x: int  # the grid
    y: int
    z: int
    function: Any
    metadata: Any
    values: list[Any]  # of all parameters; addresses are filled in
    places: list[tuple[int, int, int]]  # (parameter, tensor, bytes from its start)


class LaunchPlan:
    """What to allocate and to launch."""

    def __init__(
        self,
        device: torch.device,
        made: Sequence[Tensor],
        launches: Sequence[PlannedLaunch],
        returned: Any,  # what the body returned: one of those that were made, several, or None
    ) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.launches, self._kind = launches, type(returned)
        several = [] if returned is None else [returned] if isinstance(returned, Tensor) else returned
        self._returned = [next(i for i, t in enumerate(made) if t is one) for one in several]
        self.made = [(tuple(t.shape), t.stride(), t.dtype) for t in made]
        self._empty = getattr(guards, f"_empty_strided_{device.type}")
        self._stream, self._runtime = driver.active.get_current_stream, knobs.runtime
        self._index = device.index if device.type == "cuda" else 0

    def hooked(self) -> bool:
        """Whether somebody wants to see every launch, as profilers do."""
        for hook in (self._runtime.launch_enter_hook, self._runtime.launch_exit_hook):
            if hook is not None and getattr(hook, "calls", True):
                return True
        return False

    def __call__(self, starts: list[int]) -> Any:
        """What the body returns, for tensors at these addresses; on the current device. Adds to the list."""
        empty = self._empty
        made = [empty(size, stride, dtype) for size, stride, dtype in self.made]
        for t in made:
            starts.append(t.data_ptr())
        stream = self._stream(self._index)
        for run, x, y, z, function, metadata, values, places in self.launches:
            arguments = values.copy()
            for parameter, tensor, offset in places:
                arguments[parameter] = starts[tensor] + offset
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)
        out = [made[i] for i in self._returned]
        if self._kind is tuple:
            return tuple(out)
        return out if self._kind is list else out[0] if out else None


class _Watch(TorchDispatchMode):
    """Sees what a body does."""

    def __init__(self, call: DescribedCall) -> None:
        super().__init__()
        self.call = call
        self.fits = True
        self.made: list[Tensor] = []
        self.launches: list[PlannedLaunch] = []
        self._seen: list[Tensor] = []  # kept, as `_of` knows them by address
        self._of: dict[int, tuple[int, Tensor]] = {id(t): (i, t) for i, t in enumerate(call.tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _MAKES and out.device == self.call.device:
            self._of[id(out)] = (len(self.call.tensors) + len(self.made), out)
            self.made.append(out)
        elif isinstance(out, Tensor) and _is_view(func) and id(args[0]) in self._of:
            self._of[id(out)] = self._of[id(args[0])]
            self._seen.append(out)
        elif func is not torch.ops.aten.promote_types.default:
            self.fits = False
        return out

    # The launches of a body are told by `registration.launch`.
    def launched(self, kernel: Any, compiled: Any, grid: Sequence[int], args: Any, constants: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args))
        given |= {name: value for name, value in constants.items() if name in names}
        if compiled is None or len(given) != len(names):
            self.fits = False
            return
        values, places = [given[name] for name in names], []
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                if id(value) not in self._of:
                    self.fits = False
                    return
                number, start = self._of[id(value)]
                places.append((i, number, value.data_ptr() - start.data_ptr()))
                values[i] = None
            elif not (value is None or isinstance(value, (int, float, str, *_constants()))):
                self.fits = False
                return
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append(
            PlannedLaunch(compiled.run, x, y, z, compiled.function, compiled.packed_metadata, values, places)
        )

    def plan(self, out: Any) -> LaunchPlan | None:
        """Of a body that has returned."""
        several = [] if out is None else [out] if isinstance(out, Tensor) else out
        known = all([any([t is made for made in self.made]) for t in several])
        return LaunchPlan(self.call.device, self.made, self.launches, out) if self.fits and known else None


def _is_view(func: Any) -> bool:
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return alias is not None and not alias.is_write


def _constants() -> tuple[type, ...]:
    import triton.language as tl

    return bool, tl.dtype, tl.constexpr


def unwatched(body: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a body returns."""
    return _run(body, args, _NOBODY)


def watched(body: Callable[..., Any], args: Sequence[Any], call: DescribedCall) -> tuple[Any, LaunchPlan | None]:
    """What a body returns; and its plan, or None if it has none."""
    watch = _Watch(call)
    with watch:
        out = _run(body, args, watch)
    return out, watch.plan(out)


def _run(body: Callable[..., Any], args: Sequence[Any], watch: Any) -> Any:
    before, _now.watch = watching(), watch
    try:
        with torch.no_grad():
            return body(*args)
    finally:
        _now.watch = before


_NOBODY = object()


def watching() -> Any:
    """Of the body that runs past the dispatcher in this thread: who watches. None: no body does."""
    return getattr(_now, "watch", None)
