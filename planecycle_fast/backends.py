"""Which implementation of the operations runs, and why another one does not.

A backend asked for by name never falls back: it raises and says why. "auto" takes the first usable
one of `BACKENDS`, fastest first, unless `use_backend` or PLANECYCLE_FAST_BACKEND names another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("triton", "cpu", "reference")
ATTENTIONS = ("auto", "flash2", "flash3", "flash4", "sdpa", "triton", "reference")
VARIABLE = "PLANECYCLE_FAST_BACKEND"

_overrides: list[str] = []  # a plain global: torch.compile guards on it, so a compiled model follows it


def why_not(backend: str) -> str | None:
    """The reason why `backend` is not usable here, or None if it is.

    Raises ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    return "not part of this release yet"


def backends() -> dict[str, str | None]:
    """Every backend: None if usable, else the reason why not."""
    return {name: why_not(name) for name in BACKENDS}


def pick(backend: str = "auto") -> str:
    """The backend to use. Raises ValueError, with the reason, for one that is unknown or not usable."""
    if backend == "auto":
        backend = _overrides[-1] if _overrides else os.environ.get(VARIABLE, "auto")
    if backend == "auto":
        return next(name for name in BACKENDS if why_not(name) is None)
    reason = why_not(backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} is not usable: {reason}; usable: {_usable()}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, "auto" means `backend`, in all threads. Raises ValueError like `pick`, on entering."""
    pick(backend)
    _overrides.append(backend)
    try:
        yield
    finally:
        _overrides.remove(backend)


def why_not_attention(attention: str) -> str | None:
    """The reason why an attention cannot be chosen by name here, or None if it can.

    Raises ValueError for an unknown name.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "auto":
        return None
    return "not part of this release yet; the model's own attention runs"


def attentions() -> dict[str, str | None]:
    """Every attention: None if it can be chosen, else the reason why not."""
    return {name: why_not_attention(name) for name in ATTENTIONS}


def check_attention(attention: str) -> None:
    """Raises ValueError for an unknown attention, or one that this release does not choose by name."""
    reason = why_not_attention(attention)
    if reason is not None:
        raise ValueError(f"attention {attention!r} is not usable: {reason}; use 'auto'")


def _usable() -> str:
    return ", ".join(name for name in BACKENDS if why_not(name) is None)
