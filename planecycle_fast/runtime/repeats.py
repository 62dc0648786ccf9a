"""Loops over groups that are all alike: a plan that asks for memory alone needs the first round of each.

On a CPU slices are embedded, and blocks run, a few sequences at a time. Peak memory is that of the first group, which
no other one exceeds, so that a volume of a million slices is planned as quickly as one of eight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_first: list[bool] = []  # not empty within `first_rounds_only`


@contextmanager
def first_rounds_only() -> Iterator[None]:
    """Within the block such loops end after their first round: results are garbage, peak memory is what it would be."""
    _first.append(True)
    try:
        yield
    finally:
        _first.pop()


def most_rounds() -> int:
    """Of each loop; 0: all."""
    return len(_first[:1])


def rounds(starts: range) -> range:
    """Those that run."""
    return starts[: most_rounds() or None]
