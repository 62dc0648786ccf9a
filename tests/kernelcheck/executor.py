"""Runs kernels in triton's interpreter, in a way that lets observers see every launch and every access to memory.

Arguments and loop variables have the types that triton would give them, and an error in a kernel comes out as it is.
"""

import builtins
import contextlib
import inspect
import threading

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as shipped
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import _normalize_ty

from .memory import patch_memory
from .observers import Fault, Launch, Observer, launches, observing, watching

INTEGERS = {name: tl.str_to_ty(name, None) for name in ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")}
FLOATS = {name: tl.str_to_ty(name, None) for name in ("fp16", "fp32", "fp64")}
WARPS = (1, 2, 4, 8, 16, 32)  # of a program, as a GPU takes them
NEEDED_NAMES = ["_implicit_cvt", "_patch_lang", "_unwrap_tensor", "_get_np_dtype", "GridExecutor", "ReduceOps"]
NEEDED = {  # methods of its builder that are replaced, or call these, with the parameters that must come first
    "create_masked_load": "self ptrs mask other",
    "create_masked_store": "self ptrs value mask",
    "create_descriptor_load": "self desc indices",
    "create_descriptor_store": "self desc value indices",
    "create_atomic_rmw": "self rmwOp ptr val mask",
    "create_atomic_cas": "self ptr cmp val",
    "create_addptr": "self ptr offset",
    "binary_op": "self lhs rhs op",
    "cast_impl": "self src dst_type",
}


def check_interpreter():
    """Raises RuntimeError where triton's interpreter is not the one that this module knows."""
    known = f"tests/kernelcheck knows the interpreter of triton 3.6 to 3.9; in triton {triton.__version__} "
    for name in NEEDED_NAMES:
        if not hasattr(shipped, name):
            raise RuntimeError(f"{known}triton.runtime.interpreter has no {name}")
    for name, expected in NEEDED.items():
        method = getattr(InterpreterBuilder, name, None)
        found = " ".join(inspect.signature(method).parameters) if method else "nothing"
        if not found.startswith(expected):
            raise RuntimeError(f"{known}InterpreterBuilder.{name} takes ({found}), expected ({expected}, ...)")


def patch_executor():
    """Makes all kernels of this process run by this module. Raises RuntimeError as `check_interpreter`."""
    if shipped.GridExecutor.__call__ is _run_grid:
        return
    check_interpreter()
    shipped.GridExecutor.__call__ = _run_grid
    shipped.InterpretedFunction.__call__ = _call_function
    shipped._implicit_cvt = _convert
    patch_memory()
    _try_out()


@triton.jit
def _copy_kernel(x, out, n):
    for i in range(n):
        tl.store(out + i, tl.load(x + i))


def _try_out():
    """What is patched must see what a kernel does."""
    seen = []

    class Recorder(Observer):
        def accessed(self, access):
            seen.append((access.kind, access.argument.name, access.distances.tolist()))

    x = torch.arange(2.0)
    out = torch.zeros(2)
    with observing(Recorder()):
        _copy_kernel[(1,)](x, out, 2)
    expected = [("load", "x", [0]), ("store", "out", [0]), ("load", "x", [4]), ("store", "out", [4])]
    if seen != expected or not torch.equal(x, out):
        raise RuntimeError(f"triton {triton.__version__} runs kernels in a way unknown to tests/kernelcheck: {seen}")


_patched = {}  # modules whose `tl` is patched in the grid that runs, and how to undo it
_shipped_convert = shipped._implicit_cvt
_lock = threading.RLock()  # the interpreter has one grid at a time


def _run_grid(executor, *args, **kwargs):
    fn, names = executor.fn, executor.arg_names
    if kwargs.get("num_warps", 4) not in WARPS:
        raise Fault(f"{fn.__name__}: num_warps must be one of {WARPS}, got {kwargs['num_warps']}")
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    for hook in executor.pre_run_hooks:
        hook(*args, **kwargs)
    values = inspect.getcallargs(fn, *args, **kwargs)
    grid = tuple(executor.grid(values) if callable(executor.grid) else executor.grid)
    if len(grid) > 3:
        raise ValueError(f"grid must have at most 3 axes, got {grid}")
    with _lock, _disable_current_modes():  # what the interpreter does with tensors is none of a counter's business
        launches.append(Launch(fn.__name__, values, (*grid, 1, 1)[:3]))
        try:
            _patch_language(fn)
            _run_programs(fn, executor.constexprs, launches[-1])
        finally:
            launches.pop()
            while _patched:
                _patched.popitem()[1].restore()


def _run_programs(fn, constexprs, launch):
    args = {}
    for name, value in launch.values.items():
        launch.argument = name
        args[name] = value if name in constexprs else _convert(value, _annotation(fn, name))
    for observer in watching:
        observer.launched(launch)
    chosen = [programs for programs in (observer.programs(launch.grid) for observer in watching) if programs]
    shipped.interpreter_builder.set_grid_dim(*launch.grid)
    for x, y, z in chosen[0] if chosen else np.ndindex(launch.grid):
        launch.program = (x, y, z)
        shipped.interpreter_builder.set_grid_idx(x, y, z)
        fn(**args)


def _annotation(fn, name):
    """The type that a parameter is declared with, as triton spells it, or None."""
    annotation = fn.__annotations__.get(name)
    if isinstance(annotation, str):  # the interpreter keeps the text only
        with contextlib.suppress(NameError, SyntaxError, AttributeError):
            annotation = eval(annotation, fn.__globals__)
    return None if annotation is None else _normalize_ty(annotation)


_inductor = []


@contextlib.contextmanager
def typed_by_inductor():
    """Within it arguments are typed as Inductor types them on a GPU (`inductor`): annotations count for nothing."""
    _inductor.append(True)
    try:
        yield
    finally:
        _inductor.pop()


def _convert(value, annotation=None):
    """An argument as a kernel sees it."""
    if _inductor:
        if type(value) is int and value == 1:
            return value  # a constant
        annotation = "fp64" if isinstance(value, float) else None
    if isinstance(value, bool):
        return _scalar(value, tl.int1)
    if isinstance(value, int):
        fits = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        dtype = FLOATS.get(annotation) or INTEGERS[annotation if annotation in INTEGERS else fits]
        limits = np.iinfo(shipped._get_np_dtype(dtype)) if dtype.is_int() else None
        if limits and not limits.min <= value <= limits.max:
            raise Fault(f"{launches[-1].kernel}: {launches[-1].argument} = {value} does not fit into {dtype}")
        return _scalar(value, dtype)
    if isinstance(value, float):
        return _scalar(value, FLOATS.get(annotation, tl.float32))
    if hasattr(value, "data_ptr"):
        argument = launches[-1].add(shipped._unwrap_tensor(value))
        return _scalar(argument.place, tl.str_to_ty(triton.runtime.jit.mangle_type(value), None))
    return _shipped_convert(value)  # comes back here for the parts of tuples and descriptors


def _scalar(value, dtype):
    return tl.tensor(TensorHandle(np.array([value], shipped._get_np_dtype(dtype)), dtype), dtype)


def _call_function(function, *args, **kwargs):
    """A kernel's call of another function."""
    _patch_language(function.fn)
    return function.rewrite()(*args, **kwargs)


def _patch_language(fn):
    if fn.__module__ not in _patched:
        _patched[fn.__module__] = scope = shipped._patch_lang(fn)
        scope.set_attr(_Names(fn.__globals__), "range", _range)
        scope.set_attr(tl, "range", _range)
        tl.tensor.__index__ = lambda self: self.handle.data.item()  # as shipped in 3.6, not with every numpy


class _Names:
    """A dictionary's items as attributes, to be set and restored like others."""

    def __init__(self, names):
        object.__setattr__(self, "names", names)

    def __getattr__(self, name):
        if name not in self.names:
            raise AttributeError(name)
        return self.names[name]

    def __setattr__(self, name, value):
        self.names[name] = value

    def __delattr__(self, name):
        del self.names[name]


def _range(*bounds, **_):
    """A loop variable has the width of its bounds, as in a compiled kernel; Python's has no limit."""
    values = [int(bound.value if isinstance(bound, tl.constexpr) else bound) for bound in bounds]
    widths = [bound.dtype.scalar.int_bitwidth for bound in bounds if isinstance(bound, tl.tensor)]
    wide = max(widths, default=32) > 32 or any(not -(2**31) <= value < 2**31 for value in values)
    steps = builtins.range(*values)
    if not wide and steps and steps[-1] + steps.step >= 2**31:
        raise Fault(f"{launches[-1]}: the variable of {steps} passes 2^31, too much for int32")
    for observer in watching:
        steps = observer.steps(steps)
    for value in steps:
        yield _scalar(value, tl.int64 if wide else tl.int32)
