"""The overflow probe: the arithmetic of addresses at sizes no machine has memory for.

Tensors are on `meta`, so loads give zeros and stores do nothing; what kernels compute on integers is real. Every
signed integer that does not fit into its type is reported (a GPU wraps it silently; unsigned ones are meant to wrap),
and `sanitizer.Bounds` holds every address against the view it is for. Of a large grid the first and last programs run,
those between at distances of powers of four from either end, and those that an argument of the kernel counts; of a long
loop both ends. Sums and scans of 64-bit integers are not checked.
"""

import linecache
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
import triton.runtime.interpreter as shipped
from triton.runtime.interpreter import InterpreterBuilder

from .observers import Fault, Observer, observing

GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # programs along x, y, z (CUDA programming guide)
MANY_SLICES = 100_000  # at which grids must fit
LONG_LOOP = 16  # steps; of longer ones the two at either end run
EXACT = (np.add, np.subtract, np.multiply, np.left_shift)  # integer operations that can leave their type
NOT_KERNELS = (str(Path(triton.__file__).parent), str(Path(__file__).parent))


class OverflowFault(Fault):
    """An integer does not fit into its type."""


class GridError(Fault):
    """A grid has more programs along an axis than a GPU takes."""


class _Probe(Observer):
    moves_data = False

    def __init__(self):
        self.launches = 0

    def launched(self, launch):
        for axis, size, limit in zip("xyz", launch.grid, GRID_LIMITS):
            if size > limit:
                raise GridError(f"{launch.kernel}: {size} programs along {axis}, a GPU takes at most {limit}")
        for argument in launch.tensors.values():
            assert argument.tensor.is_meta, f"{launch.kernel}: {argument} is on {argument.tensor.device}, expected meta"
        self.launch = launch
        self.launches += 1

    def programs(self, grid):
        sizes = {value for value in self.launch.values.values() if type(value) is int}  # where parts of a grid may meet
        chosen = _some_of(int(np.prod(grid, dtype=object)), sizes | {size - 1 for size in sizes})
        return [tuple(int(i) for i in np.unravel_index(i, grid)) for i in chosen]

    def steps(self, steps):
        return steps if len(steps) <= LONG_LOOP else [steps[i] for i in (0, 1, -2, -1)]

    def check(self, values, dtype, what):
        """Raises OverflowFault unless integers, computed without limits, fit into a type of triton."""
        bits = dtype.scalar.int_bitwidth - 1
        wrong = (values < -(2**bits)) | (values > 2**bits - 1)
        if wrong.any():
            value = int(values[wrong].flat[0]) if np.shape(values) else int(values)
            raise OverflowFault(
                f"{self.launch}: {what()} gives {value}, which does not fit into {dtype.scalar}, in {_kernel_line()}"
            )


def _some_of(count, more=()):
    """Indices below `count`: both ends, distances of powers of four from them, and some more."""
    steps = {0, *(4**k for k in range(16))}
    return sorted(i for i in steps | {count - 1 - step for step in steps} | set(more) if 0 <= i < count)


def _kernel_line():
    """Where in a kernel the interpreter is."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(NOT_KERNELS):
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"


@contextmanager
def probing():
    """Within it kernels compute addresses but move no data, and integers that overflow raise OverflowFault.

    Raises GridError for a grid that is too large, and all that `sanitizer.Bounds` raises.
    """
    probe = _Probe()
    binary, cast = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl
    to_tensor = shipped.ReduceScanOpInterface.to_tensor

    def binary_op(self, lhs, rhs, op):
        if op in EXACT and _is_integer(lhs.dtype):
            exact = _exactly(op, lhs.data, rhs.data)
            probe.check(exact, lhs.dtype, lambda: f"{op.__name__} of {_some(lhs)} and {_some(rhs)}")
        return binary(self, lhs, rhs, op)

    def cast_impl(self, src, dst_type):
        if _is_integer(dst_type) and (src.dtype.scalar.is_int() or src.dtype.scalar.is_floating()):
            finite = src.data[np.isfinite(src.data)] if src.data.dtype.kind == "f" else src.data
            probe.check(finite, dst_type, lambda: f"a cast of {_some(src)}")
        return cast(self, src, dst_type)

    def reduced(self, ret, dtype):
        if _is_integer(dtype):
            probe.check(np.asarray(ret), dtype, lambda: "a reduction")
        return to_tensor(self, ret, dtype)

    def advance(self, ptr, offsets):
        for old, step in zip(ptr.offsets, offsets):
            exact = old.data.astype(np.int64) + step.data
            probe.check(exact, old.dtype, lambda: "advancing a block pointer")
        return advance_shipped(self, ptr, offsets)

    with ExitStack() as stack:
        if advance_shipped := getattr(InterpreterBuilder, "create_advance", None):  # gone in triton 3.9
            stack.enter_context(mock.patch.object(InterpreterBuilder, "create_advance", advance))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "binary_op", binary_op))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "cast_impl", cast_impl))
        stack.enter_context(mock.patch.object(shipped.ReduceScanOpInterface, "to_tensor", reduced))
        yield stack.enter_context(observing(probe))


def _exactly(op, a, b):
    """What comes out without a limit, in int64 where that is wide enough."""
    if a.itemsize <= 4 and b.itemsize <= 4 and op is not np.left_shift:
        return op(a.astype(np.int64), b.astype(np.int64))
    near = a * 2.0**b if op is np.left_shift else op(a.astype(np.float64), b.astype(np.float64))
    wide = (np.asarray(x).astype(np.int64 if np.abs(near).max(initial=0) < 2**62 else object) for x in (a, b))
    return op(*wide)


def _is_integer(dtype):  # signed
    return dtype.scalar.is_int_signed() and dtype.scalar.int_bitwidth > 1


def _some(handle):
    values = np.ravel(handle.data)
    return str(values[0]) if values.size == 1 else f"[{values[0]} .. {values[-1]}]"


def _gap(t):
    """From row to row: 2^32 elements, where the probe can still tell all addresses apart (2^55 bytes of a tensor)."""
    return min(2**32, 2**50 // max(t.numel(), 1))


def apart(t):
    """On `meta`: the same shape with elements far from each other; channels stay dense."""
    strides = [*[stride * _gap(t) for stride in t.stride()[:-1]], t.stride(-1)] if t.ndim else []
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)


def apart_unaligned(t):
    """As `apart`, with distances that are no multiples of anything, of channels too."""
    gap = _gap(t)
    strides = [*[stride * (gap + 1) for stride in t.stride()[:-1]], (gap // 4 + 1) * t.stride(-1)] if t.ndim else []
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
