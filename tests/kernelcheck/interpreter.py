"""Triton's interpreter (TRITON_INTERPRET=1) made honest, for tests only.

As shipped its bf16 is wrong: casts from fp32 truncate, arithmetic adds bit patterns (triton 11585). With `patch`,
casts round as torch does, and arithmetic on raw bf16 raises: kernels convert to fp32 first. Integer operations are not
computed twice to look for overflow that nobody asks about. `executor` runs the kernels, `sanitizer` watches them.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as shipped
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle

from .executor import patch_executor
from .observers import watching
from .sanitizer import Bounds, Races

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Bf16ArithmeticError(TypeError):
    """A kernel computes on bf16 values, which the interpreter would take for integers."""


def patch():
    """Makes the interpreter of this process honest.

    Raises RuntimeError without TRITON_INTERPRET=1, and where triton's interpreter has changed too much.
    """
    if not INTERPRETED:
        raise RuntimeError("kernels run under TRITON_INTERPRET=1, which triton reads when it is imported")
    _patch_casts()
    _patch_arithmetic()
    _patch_speed()
    patch_executor()
    watching.extend([Bounds(), Races()])


def _is_bf16(handle):
    return handle.dtype.scalar.name == "bf16"


def to_torch(handle):
    """The values of a float or integer handle as a tensor of the handle's dtype, of any shape."""
    data = torch.from_numpy(np.ascontiguousarray(handle.data))
    return data.view(torch.bfloat16) if _is_bf16(handle) else data


def _to_bf16(handle):
    if handle.dtype.scalar.is_fp8():
        raise Bf16ArithmeticError("fp8 to bf16 in the interpreter: convert to fp32 first")
    data = to_torch(handle).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(data.reshape(np.shape(handle.data)), tl.bfloat16)


def _from_bf16(handle, dtype):
    values = to_torch(handle).float().numpy().reshape(np.shape(handle.data))
    return TensorHandle(values.astype(shipped._get_np_dtype(dtype)), dtype.scalar)


def _patch_casts():
    cast = InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _to_bf16(src)
        return _from_bf16(src, dst_type) if _is_bf16(src) else cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        fp8 = src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8()
        if rounding_mode == shipped._ir.ROUNDING_MODE.RTZ or fp8:
            return convert(self, src, dst_type, rounding_mode)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _patch_arithmetic():
    def refusing(method):
        @functools.wraps(method)
        def wrapper(self, *args):
            for arg in args:
                if isinstance(arg, TensorHandle) and _is_bf16(arg):
                    raise Bf16ArithmeticError("arithmetic on bf16 in the interpreter: convert to fp32 first")
            return method(self, *args)

        return wrapper

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_atomic_rmw", "create_atomic_cas"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))

    reduce_impl = shipped.ReduceOps.apply_impl

    def apply_impl(self, input):
        if any(_is_bf16(tensor.handle) for tensor in input):
            raise Bf16ArithmeticError("a reduction of bf16 in the interpreter: convert to fp32 first")
        return reduce_impl(self, input)

    shipped.ReduceOps.apply_impl = apply_impl

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *args):  # products of bf16 are exact in fp32, as in tensor cores
        a, b = (_from_bf16(x, tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, d, *args)

    InterpreterBuilder.create_dot = create_dot


def _patch_speed():
    np_dtype, known = shipped._get_np_dtype, {}

    def get_np_dtype(dtype):  # as shipped it builds a table at every call
        if isinstance(dtype, (tl.pointer_type, tl.block_type)):
            return np_dtype(dtype)
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    shipped._get_np_dtype = get_np_dtype
    shipped.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)


class poisoned:
    """Within it torch fills empty tensors with NaN (integers with their largest value): what is unwritten shows."""

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self.before)
