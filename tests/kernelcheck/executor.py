"""Runs kernels in triton's interpreter, in a way that lets observers see every launch and every access to memory.

Pointers of a kernel are no addresses here but places: the upper byte says to which tensor of the launch one belongs,
the rest how far it is from that tensor's first element. An access far outside is seen as what it is, whatever lies
there, and refused before it happens; and tensors on `meta` have places too. Arguments have the types that triton would
give them, and an error in a kernel comes out as it is.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as shipped
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import _normalize_ty

from .elements import Elements

NUMBER = np.uint64(56)  # how far to shift a place to get the number of its tensor
MIDDLE = 1 << 55  # the place of a tensor's first element, but for the number: room for distances of either sign
INTEGERS = {name: tl.str_to_ty(name, None) for name in ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")}
NEEDED = {  # what of triton's interpreter is replaced, with the parameters that must come first
    "create_masked_load": "self ptrs mask other",
    "create_masked_store": "self ptrs value mask",
    "create_atomic_rmw": "self rmwOp ptr val mask",
    "create_atomic_cas": "self ptr cmp val",
    "create_addptr": "self ptr offset",
    "binary_op": "self lhs rhs op",
    "cast_impl": "self src dst_type",
}


class Fault(AssertionError):
    """What a kernel must not do."""


@dataclass(frozen=True, eq=False)
class Argument:
    """A tensor that a kernel is given."""

    name: str
    tensor: torch.Tensor
    number: int  # within its launch, from 1

    @cached_property
    def elements(self):
        return Elements(self.tensor.shape, self.tensor.stride())

    @cached_property
    def place(self):  # of the first element, aligned as the tensor is
        return (self.number << int(NUMBER)) + MIDDLE + self.tensor.data_ptr() % 256

    def __str__(self):
        return f"{self.name} of shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()}"


@dataclass
class Launch:
    """One run of a kernel over a grid."""

    kernel: str
    values: dict[str, Any]  # of its parameters
    grid: tuple[int, int, int] = (1, 1, 1)
    tensors: dict[int, Argument] = field(default_factory=dict)  # by number
    program: tuple[int, int, int] = (0, 0, 0)  # which runs

    def pointer_to(self, name, tensor):
        argument = Argument(name, tensor, len(self.tensors) + 1)
        self.tensors[argument.number] = argument
        dtype = tl.str_to_ty(triton.runtime.jit.mangle_type(tensor), None)
        return tl.tensor(TensorHandle(np.array([argument.place], np.uint64), dtype), dtype)

    def __str__(self):
        return f"{self.kernel}, program {self.program}"


@dataclass(frozen=True, eq=False)
class Access:
    """What the lanes that are not masked do to one tensor."""

    kind: str  # "load", "store", "atomic"
    argument: Argument
    distances: np.ndarray  # (N,) int64, bytes from the tensor's first element
    width: int  # bytes
    values: np.ndarray | None  # (N,), of a store
    launch: Launch


class Observer:
    """Told of all that kernels do, before they do it."""

    moves_data = True  # whether loads and stores happen; if not, loads give zeros

    def launched(self, launch):
        """A launch begins."""

    def programs(self, grid):
        """Which programs to run: triples, or None for all."""

    def accessed(self, access):
        """An access is about to happen."""


_observers = []  # who is told; `interpreter.patch` adds the sanitizers for good
_launches = []  # the one that runs; none in between


def observe(*observers):
    """Tells them of all kernels that run from now on."""
    _observers.extend(observers)


def forget():
    """Nobody is told any more."""
    _observers.clear()


@contextmanager
def observing(observer):
    """Within it `observer` is told of all kernels that run."""
    _observers.append(observer)
    try:
        yield observer
    finally:
        _observers.remove(observer)


def check_interpreter():
    """Raises RuntimeError where triton's interpreter is not the one that this module knows."""
    for name, expected in NEEDED.items():
        method = getattr(InterpreterBuilder, name, None)
        found = " ".join(inspect.signature(method).parameters) if method else "nothing"
        if not found.startswith(expected):
            raise RuntimeError(
                f"tests/kernelcheck knows the interpreter of triton 3.6 to 3.9; in triton {triton.__version__} "
                f"InterpreterBuilder.{name} takes ({found}), expected ({expected}, ...)"
            )


def patch_executor():
    """Makes all kernels of this process run by this module. Raises RuntimeError as `check_interpreter`."""
    check_interpreter()
    shipped.GridExecutor.__call__ = _run_grid
    shipped.InterpretedFunction.__call__ = _call_function
    shipped._implicit_cvt = _convert
    _patch_memory()


_patched = {}  # modules whose `tl` is patched in the grid that runs, and how to undo it
_shipped_convert = shipped._implicit_cvt


def _run_grid(executor, *args, **kwargs):
    fn, names = executor.fn, executor.arg_names
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    for hook in executor.pre_run_hooks:
        hook(*args, **kwargs)
    values = inspect.getcallargs(fn, *args, **kwargs)
    grid = executor.grid(values) if callable(executor.grid) else executor.grid
    launch = Launch(fn.__name__, values, (*grid, 1, 1)[:3])
    _launches.append(launch)
    _patch_language(fn)
    try:
        with _disable_current_modes():  # what the interpreter does with tensors is none of a counter's business
            _run_programs(fn, executor.constexprs, launch)
    finally:
        _launches.pop()
        while _patched:
            _patched.popitem()[1].restore()


def _run_programs(fn, constexprs, launch):
    args = {}
    for name, value in launch.values.items():
        annotation = fn.__annotations__.get(name)
        args[name] = value if name in constexprs else _convert(value, name, annotation and _normalize_ty(annotation))
    for observer in _observers:
        observer.launched(launch)
    chosen = [programs for programs in (observer.programs(launch.grid) for observer in _observers) if programs]
    shipped.interpreter_builder.set_grid_dim(*launch.grid)
    for x, y, z in chosen[0] if chosen else np.ndindex(launch.grid):
        launch.program = (x, y, z)
        shipped.interpreter_builder.set_grid_idx(x, y, z)
        fn(**args)


def _convert(value, name="", annotation=None):
    """An argument as a kernel sees it."""
    if isinstance(value, int) and not isinstance(value, bool):
        fits = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        dtype = INTEGERS[annotation if annotation in INTEGERS else fits]
        bits = np.iinfo(shipped._get_np_dtype(dtype))
        if not bits.min <= value <= bits.max:
            raise Fault(f"{_launches[-1].kernel}: {name} = {value} does not fit into {dtype}")
        return tl.tensor(TensorHandle(np.array([value], bits.dtype), dtype), dtype)
    if hasattr(value, "data_ptr"):
        return _launches[-1].pointer_to(name, shipped._unwrap_tensor(value))
    return _shipped_convert(value)  # comes back here for the parts of tuples and descriptors


def _call_function(function, *args, **kwargs):
    """A kernel's call of another function."""
    _patch_language(function.fn)
    return function.rewrite()(*args, **kwargs)


def _patch_language(fn):
    if fn.__module__ not in _patched:
        _patched[fn.__module__] = shipped._patch_lang(fn)


def _patch_memory():
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def masked_load(self, ptrs, mask, other, *rest, **more):
        addresses = _addresses("load", ptrs, mask)
        dtype = ptrs.get_element_ty()
        if mask is not None and other is None:  # masked lanes are undefined on a GPU; as shipped they are 0
            other = TensorHandle(np.full(np.shape(ptrs.data), *_worst(dtype)), dtype)
        if addresses is None:
            return TensorHandle(np.zeros(np.shape(ptrs.data), shipped._get_np_dtype(dtype)), dtype)
        return load(self, addresses, mask, other, *rest, **more)

    def masked_store(self, ptrs, value, mask, *rest, **more):
        addresses = _addresses("store", ptrs, mask, value)
        return None if addresses is None else store(self, addresses, value, mask, *rest, **more)

    def atomic_rmw(self, rmwOp, ptr, val, mask, *rest, **more):
        addresses = _addresses("atomic", ptr, mask)
        return val if addresses is None else rmw(self, rmwOp, addresses, val, mask, *rest, **more)

    def atomic_cas(self, ptr, cmp, val, *rest, **more):
        addresses = _addresses("atomic", ptr, None)
        return val if addresses is None else cas(self, addresses, cmp, val, *rest, **more)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = atomic_rmw, atomic_cas


def _worst(dtype):
    np_dtype = shipped._get_np_dtype(dtype)
    worst = np.nan if np_dtype.kind == "f" else True if np_dtype.kind == "b" else np.iinfo(np_dtype).max
    return 0x7FC0 if dtype == tl.bfloat16 else worst, np_dtype


def _addresses(kind, pointers, mask, value=None):
    """Where a block of places is in memory, or None where nothing is moved. Observers see its unmasked lanes first."""
    places, launch = pointers.data, _launches[-1]
    active = None if mask is None else np.broadcast_to(np.asarray(mask.data).astype(bool, copy=False), places.shape)
    active = None if active is None or active.all() else active
    flat = (lambda block: block.ravel()) if active is None else (lambda block: block[active])
    lanes = flat(places)
    numbers = lanes >> NUMBER
    addresses = places
    for number in np.unique(numbers) if lanes.size and (numbers != numbers[0]).any() else numbers[:1]:
        argument = launch.tensors.get(int(number))
        if argument is None:
            raise Fault(f"{launch}: {kind} through a pointer that comes from no tensor of the launch")
        if _observers:
            mine = numbers == number
            distances = (lanes[mine] - np.uint64(argument.place)).view(np.int64)
            values = None if value is None else flat(np.broadcast_to(value.data, places.shape))[mine]
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            for observer in _observers:
                observer.accessed(Access(kind, argument, distances, width, values, launch))
        shift = np.uint64((argument.tensor.data_ptr() - argument.place) % 2**64)
        addresses = np.where(places >> NUMBER == number, places + shift, addresses)
    if any(not observer.moves_data for observer in _observers):
        return None
    return TensorHandle(addresses, pointers.dtype)
