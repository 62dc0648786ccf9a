"""What an operation would launch on a GPU, without one: kernels, grids and the variants triton would compile.

An operation's body runs on `meta` tensors while its launches are recorded; triton's own rules then say which
arguments of a launch become part of the compiled kernel. Not under TRITON_INTERPRET=1.
"""

import functools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from planecycle_fast.ops import registration

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]

    def variant(self, aligned, arch, always=lambda t: False):
        """What triton would compile for sm_<arch>, with all pointers aligned to 16 bytes or none of them.

        Those of tensors for which `always` is true are: the operation sees to it.
        """
        backend, binder = _binder(self.kernel, arch)
        args = [Pointer(a.dtype, aligned or always(a)) if isinstance(a, torch.Tensor) else a for a in self.args]
        kwargs = dict(self.constants, debug=False)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attrs = self.kernel._pack_args(backend, kwargs, bound, specialization, options)
        return Variant(self.kernel, aligned, signature, constants, attrs, options)


@functools.cache
def _binder(kernel, arch):
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass(frozen=True)
class Pointer:
    """A tensor as triton sees it when it chooses what to compile."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self):
        return 0 if self.aligned else self.dtype.itemsize


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that its compilation depends on but the GPU."""

    kernel: Any
    aligned: bool
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict
    options: Any

    def source(self):
        return ASTSource(self.kernel, self.signature, self.constants, self.attrs)

    @property
    def values(self):
        """Constants by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    @property
    def name(self):
        """Everything that tells the variants of a kernel apart, in words."""
        kinds = Counter(kind for kind in self.signature.values() if kind != "constexpr")
        types = " ".join(f"{count} {kind}" for kind, count in kinds.items())
        constants = [f"{name}={value}" for name, value in self.values.items()]
        options = [f"{name}={getattr(self.options, name)}" for name in OPTIONS if getattr(self.options, name)]
        ints = [f"{name}%16" for name in self._divisible()]
        aligned = "aligned" if self.aligned else "unaligned"
        return f"{self.kernel.__name__}: " + " ".join([f"({types})", aligned, *constants, *ints, *options])

    def _divisible(self):
        names = [self.kernel.arg_names[path[0]] for path, attr in self.attrs.items() if attr]
        return [name for name in names if not self.signature[name].startswith("*")]


@contextmanager
def recorded_launches(body):
    """Within it an operation's body, on `meta` tensors, launches into the list that it gives."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(Launch(self.kernel, tuple(grid), args, constants))

    def launch(kernel, *arguments, **constants):  # what is opaque to torch is not wrapped
        kernel = kernel if isinstance(kernel, Recorder) else Recorder(kernel)
        return registration.launch(kernel, *arguments, **constants)

    with mock.patch.dict(body.__globals__, {"wrap_triton": Recorder, "launch": launch}):
        yield launches


class NoGpu:
    """Enough of triton's driver for torch to compile a kernel as far as it needs to see which tensors it writes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@contextmanager
def idle_launches():
    """Within it kernels that torch launches do nothing, on any device, but fill what nobody has written with zeros.

    Gives a list of their names. Within `interpreter.poisoned` what nobody has written is NaN.
    """
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append(kernel.__name__)
        for t in (*args, *kwargs.values()):
            t = t.base if isinstance(t, TensorDescriptor) else t
            if isinstance(t, torch.Tensor) and t.isnan().all():
                t.zero_()

    driver = mock.patch.object(triton.runtime.driver, "_active", NoGpu())
    with driver, mock.patch.object(triton.runtime.JITFunction, "run", run):
        yield launches


def launches_of(spec, case, dtype, layout=lambda t: t):
    """The launches of all calls of a case, backward's too."""
    tensors = {name: layout(torch.empty(shape, dtype=dtype, device="meta")) for name, shape in case.tensors.items()}
    launches = []
    for op, call in spec.op_arguments(tensors, case.settings):
        with recorded_launches(op.body) as found:
            op.body(*call)
        launches += found
    assert launches or case in spec.empty, f"{spec.op.name} launches nothing"
    return launches


def variants(launches, alignments=(True, False), arch=90):
    """The different variants of some launches, by name."""
    found = {}
    for launch in launches:
        for aligned in alignments:
            variant = launch.variant(aligned, arch)
            found[variant.name] = variant
    return found
