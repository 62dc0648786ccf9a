"""`planecycle-fast build`: the library of csrc, before it is needed."""

from __future__ import annotations

from ..runtime import native


def run_build() -> None:
    """Builds the operations of backend "cpu" now; otherwise that happens when they are first used."""
    print(native.build())
