"""Which layers of a model a caller wants features of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def wanted_layers(n: int | Sequence[int], count: int) -> set[int]:
    """Indices of layers of a model that has `count` of them.

    Args:
        n: how many of the last layers, or the indices of layers (negative ones count from the end).

    Raises:
        TypeError: neither a number nor a sequence of them.
        ValueError: layers that the model lacks, or none at all.
    """
    if _is_index(n):
        if not 1 <= n <= count:
            raise ValueError(f"n must be between 1 and the model's {count} layers, got {n}")
        return set(range(count - n, count))
    listed = list(n) if isinstance(n, Iterable) and not isinstance(n, (str, bytes)) else [n]
    if not all(_is_index(i) for i in listed):
        raise TypeError(f"n must be a number of layers or a sequence of indices, got {n!r}")
    indices = [int(i) for i in listed]
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"n must hold indices of the model's {count} layers, got {indices}")
    return {i % count for i in indices}


def _is_index(n: Any) -> bool:
    return hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) and getattr(n, "ndim", 0) == 0
