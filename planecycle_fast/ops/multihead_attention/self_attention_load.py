"""Which of queries and keys the kernels of self_attention turn when they load them; the others have to turn before."""

from __future__ import annotations

import torch

from . import self_attention_backward_tiles as backward
from .self_attention_tiles import holds_keys, one_tile


def turned_on_load(
    rows: int | torch.SymInt,  # of a sequence
    head_dim: int,
    dtype: torch.dtype,
    training: bool,  # whether there will be a backward
) -> str:
    """ "", "q" or "qk".

    Turning on load is free where a program holds all keys, and of queries, which are loaded once. Keys of more rows
    would turn once for every tile of queries, and beyond one tile backward loads both many times: no kernel does that.
    Under torch.compile sizes may be symbols, of which nothing is asked.
    """
    if torch.compiler.is_compiling() or not isinstance(rows, int):
        return ""
    if training:
        held = one_tile(rows, head_dim, dtype) and backward.one_tile(rows, dtype, head_dim) is not None
        return "qk" if held else ""
    return "qk" if holds_keys(rows, head_dim, dtype) else "q"


def check_load(
    load: str,  # of an operation
    rows: int | torch.SymInt,
    head_dim: int,
    dtype: torch.dtype,
    training: bool,
) -> None:
    """Raises ValueError for more than kernels turn on load."""
    most = turned_on_load(rows, head_dim, dtype, training) if load else ""
    if not set(load) <= set(most):
        raise ValueError(f"load must be within {most!r} for {rows} rows, got {load!r}; turn the others before")
