"""Which implementation of the operations runs, and why another one does not.

A backend asked for by name never falls back: it raises and says why. "auto" takes the first usable
one of `BACKENDS`, fastest first, that takes the tensors' device, unless `use_backend` or
PLANECYCLE_FAST_BACKEND names another; the reference within forward mode and torch.func's transforms, and while
torch's own operations are recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native
from .tracing import constant_when_compiled, recorder, transforms_active

BACKENDS = ("triton", "cpu", "reference")
LACKS: dict[str, tuple[str, ...]] = {"triton": (), "cpu": ("patchify",), "reference": ()}  # operations
VARIABLE = "PLANECYCLE_FAST_BACKEND"
NO_CUDA = "no CUDA device was found"
RECORDED = "{}, which records torch's own operations, is running; while it does, 'auto' is the reference"

_found: dict[str, str | None] = {}  # why a backend is not usable on this machine, once it has been looked for
_planned: list[str] = []  # not empty while tensors without data, on "meta", stand for tensors on an NVIDIA GPU
_overrides: list[str] = []  # a plain global: torch.compile guards on it, so a compiled model follows it


def why_not(backend: str, device: torch.device | None = None, op: str | None = None) -> str | None:
    """The reason why `backend` is not usable, or None if it is; for an operation and tensors on `device`, if given.

    "cpu" counts as usable as long as nothing says that its library cannot be built; `pick` builds it.

    Raises ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    if (recording := recorder()) is not None:
        return RECORDED.format(recording)
    if op in LACKS[backend]:
        return f"it has no {op} yet"
    if backend == "cpu":
        elsewhere = device is not None and device.type != "cpu"
        return f"it needs tensors on the CPU, got {device}" if elsewhere else native.why_not_native()
    reason = _why_not_triton()
    if _planned and (device is None or device.type == "meta"):
        return None if reason == NO_CUDA else reason
    if reason is None and device is not None and device.type != "cuda" and not _interpreted():
        reason = f"it needs tensors on a CUDA device, got {device}"
    return reason


def backends() -> dict[str, str | None]:
    """Every backend: None if usable, else the reason why not."""
    return {name: why_not(name) for name in BACKENDS}


def pick(backend: str = "auto", device: torch.device | None = None, op: str | None = None) -> str:
    """The backend to use; for an operation and tensors on `device`, if given.

    Raises ValueError, with the reason, for one that is unknown or not usable.
    """
    backend = asked_for(backend)
    if backend == "auto":
        if transforms_active():  # kernels have few derivatives; by name they say so
            return "reference"
        return next(name for name in BACKENDS if _takes(name, device, op))
    reason = why_not(backend, device, op)
    if reason is None and not _loads(backend):
        reason = why_not(backend, device, op)
    if reason is not None:
        usable = ", ".join([name for name in BACKENDS if why_not(name, device, op) is None])
        raise ValueError(f"backend {backend!r} is not usable: {reason}; usable: {usable}")
    return backend


def choose(backend: str, device: torch.device, op: str, strict: bool) -> str:
    """The backend of an operation; without `strict` the reference where the one asked for lacks it."""
    named = asked_for(backend)
    if not strict and named != "auto" and why_not(named, device, op) is not None:
        return "reference"
    return pick(backend, device, op)


def asked_for(backend: str = "auto") -> str:
    """The name that `backend` stands for: what `use_backend` or PLANECYCLE_FAST_BACKEND say where it is "auto"."""
    if backend == "auto":
        return _overrides[-1] if _overrides else os.environ.get(VARIABLE, "auto")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, "auto" means `backend`, in all threads. Raises ValueError like `pick`, on entering."""
    pick(backend)
    _overrides.append(backend)
    try:
        yield
    finally:
        del _overrides[len(_overrides) - 1 - _overrides[::-1].index(backend)]  # another thread may have added one since


@contextmanager
def meta_stands_for_cuda() -> Iterator[None]:
    """Within the block tensors without data, on device "meta", choose backends like tensors on an NVIDIA GPU."""
    _planned.append("cuda")
    try:
        yield
    finally:
        _planned.pop()


def _takes(backend: str, device: torch.device | None, op: str | None) -> bool:
    """Whether "auto" takes a backend. One that had to be built and could not be says so, once."""
    if backend == "cpu" and device is not None and device.type == "cpu" and op not in LACKS["cpu"]:
        return recorder() is None and native.ready()
    usable = why_not(backend, device, op) is None and _loads(backend)
    return usable and (backend != "triton" or not _interpreted())  # triton's interpreter runs by name only


def _loads(backend: str) -> bool:  # builds what is built on first use
    return backend != "cpu" or native.ready()


@constant_when_compiled
def _why_not_triton() -> str | None:
    if "triton" not in _found:
        _found["triton"] = _look_for_triton()
    return _found["triton"]


def _look_for_triton() -> str | None:
    try:
        import triton
        import triton.language
        from triton.backends import backends as compilers
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0] == "triton"
        return "triton is not installed: pip install triton" if missing else _broken(error)
    except Exception as error:  # a broken installation raises anything
        return _broken(error)
    if not hasattr(triton, "knobs"):
        return f"triton {getattr(triton, '__version__', 'of unknown version')} is too old; it needs triton 3.6 or newer"
    if triton.knobs.runtime.interpret:
        return None
    if "nvidia" not in compilers:
        return f"this triton has no backend for NVIDIA GPUs; it has {', '.join(compilers) or 'none'}"
    if torch.version.hip:
        return "it runs on NVIDIA GPUs only so far"
    return None if torch.cuda.is_available() else NO_CUDA


@constant_when_compiled
def _interpreted() -> bool:
    """Whether triton's interpreter stands in for a GPU, on tensors of any device. Call it where triton imports."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _broken(error: Exception) -> str:
    return f"importing triton failed: {type(error).__name__}: {error}"
