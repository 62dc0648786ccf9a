"""What torch.compile makes of kernels, without a GPU: the types it gives their arguments, and what it finds written.

Inductor types arguments by its own rules, not by triton's: annotations and `do_not_specialize` are dropped, a float is
of 64 bits, an int of 32 where its value fits, and an int that is 1 is a constant. To find out what a kernel writes to,
torch 2.11 and older make constants of all ints. Everything here runs on a CPU build of torch; `make compile-check`
runs Inductor itself.
"""

from unittest import mock

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, mangle_type

from .launches import NoGpu, Variant


class WritesError(AssertionError):
    """What torch finds written to is not what a kernel writes to: compiled code would be wrong, or would copy."""


def arguments_of(launch):
    """All arguments of a launch's kernel by name, in order."""
    given = dict(zip(launch.kernel.arg_names, launch.args)) | launch.constants
    return {name: given[name] for name in launch.kernel.arg_names}


def inductor_variant(launch):
    """What Inductor would compile of a launch, its tensors aligned."""
    backend = make_backend(NoGpu().get_current_target())
    signature, constants, attrs = {}, {}, {}
    for i, (parameter, (name, value)) in enumerate(zip(launch.kernel.params, arguments_of(launch).items())):
        signature[name] = "constexpr" if parameter.is_constexpr else _type(value)
        if signature[name] == "constexpr":
            constants[i,] = value
        elif isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attrs[i,] = backend.parse_attr("D")  # divisible by 16
    settings = {name: value for name, value in launch.constants.items() if name not in signature}
    return Variant(launch.kernel, True, signature, constants, attrs, backend.parse_options(settings))


def _type(value):
    """Of an argument that is no constexpr, as Inductor's `signature_of` says it."""
    if value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return mangle_type(value)
    if isinstance(value, float):
        return "fp64"
    return "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"


def written(launch, all_constant):
    """The arguments that torch finds written to.

    Args:
        launch: a `launches.Launch`.
        all_constant: whether its ints are constants for that, as in torch 2.11, or as this torch has it.

    Raises RuntimeError where torch cannot tell, and would take every tensor for written to.
    """
    given = {
        name: torch.empty(2, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments_of(launch).items()
    }
    kernel = _with_constants(launch.kernel, given) if all_constant else launch.kernel
    driver = mock.patch.object(triton.runtime.driver, "_active", NoGpu())
    with driver, mock.patch.object(triton_kernel_wrap.log, "warning", _raise):
        if hasattr(triton_kernel_wrap, "identify_mutated_tensors"):  # until torch 2.12
            return set(triton_kernel_wrap.identify_mutated_tensors(kernel, given, {}))
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, given, {})
        return {dependency.name for dependency in accesses.read_writes.writes}


def check_writes(launch, outputs, ways=(False, True)):
    """Exactly the outputs of a launch that have elements are found to be written to. Raises WritesError.

    Args:
        launch: a `launches.Launch`.
        outputs: the names of all arguments that its kernel may write to.
        ways: with ints as this torch has them, and as constants.
    """
    tensors = {name: t for name, t in arguments_of(launch).items() if isinstance(t, torch.Tensor) and t.numel()}
    expected = outputs & tensors.keys()
    for all_constant in ways:
        found = written(launch, all_constant)
        if found != expected:
            raise WritesError(
                f"{launch.kernel.__name__} writes to {sorted(expected)}, torch finds {sorted(found)}"
                f"{' where all ints are constants' if all_constant else ''}"
            )


def _with_constants(kernel, given):
    """The same kernel, all of whose arguments but tensors are constants."""
    copy = JITFunction(kernel.fn)
    for parameter in copy.params:
        if not isinstance(given[parameter.name], torch.Tensor):
            parameter.__dict__["is_constexpr"] = True
    return copy


def _raise(message, *_, **__):
    raise RuntimeError(message)
