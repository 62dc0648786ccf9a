"""What torch is told of swiglu, whichever backend computes it, and how its operations are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import refuse_transforms

# Of all below: gate (rows, hidden), or (rows, 2*hidden) without a value; value (rows, hidden); channels dense.


def _hidden(gate: Tensor, value: Tensor | None) -> int:
    return gate.shape[1] // 2 if value is None else gate.shape[1]


def _dtype(gate: Tensor, value: Tensor | None) -> torch.dtype:
    return gate.dtype if value is None else torch.promote_types(gate.dtype, value.dtype)


def _like(grad: Tensor, gate: Tensor, value: Tensor | None) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (gate, value) if t is not None]


def fake(gate: Tensor, value: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape[0], _hidden(gate, value), dtype=_dtype(gate, value))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """As `torch.library.register_autograd` takes it."""
    ctx.save_for_backward(*inputs)


def backward_by(operation: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The same, of a backend's ``swiglu_backward``."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = operation(rows_of(grad), *ctx.saved_tensors)
        return (*grads, None)[:2]

    return backward


def rows_of(t: Tensor) -> Tensor:  # (..., C) to (N, C), channels dense
    """A view where all rows are at one distance and channels dense, else a copy (which autograd sees)."""
    rows = t[None] if t.ndim == 1 else t.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def call_of(op: Callable[..., Tensor], in_place: Callable[..., None], backend: str) -> Callable[..., Tensor]:
    """`swiglu_ref` in one pass, by an operation and its twin in place.

    It raises NotImplementedError for forward mode, torch.func's transforms or a second derivative; on "triton"
    ValueError for more than 2**31 - 1 programs: tiles of 2048 elements, 512 where rows are not 16 bytes apart.
    """

    def swiglu(
        gate: Tensor,  # (..., hidden), or (..., 2*hidden), any strides
        value: Tensor | None,  # (..., hidden), any strides
        inplace: bool,
    ) -> Tensor:  # (..., hidden), contiguous unless in place
        refuse_transforms("swiglu", backend)
        rows, values = rows_of(gate), None if value is None else rows_of(value)
        if inplace and gate.is_contiguous() and gate.dtype == _dtype(gate, value):
            in_place(rows, values)
            return gate
        out = op(rows, values)
        out = out.view(*gate.shape[:-1], out.shape[1])
        return gate.copy_(out) if inplace else out

    return swiglu
