"""swiglu on backend "cpu": csrc/swiglu.cpp, its backward and its twin in place. `swiglu_ref` says what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native_ops import register
from ..registry import refuse_second, refuse_transforms


def _fake(gate: Tensor, value: Tensor | None) -> Tensor:
    hidden = gate.shape[1] // 2 if value is None else gate.shape[1]
    dtype = gate.dtype if value is None else torch.promote_types(gate.dtype, value.dtype)
    return gate.new_empty(gate.shape[0], hidden, dtype=dtype)


def _backward_fake(grad: Tensor, gate: Tensor, value: Tensor | None) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (gate, value) if t is not None]


def _refuse(ctx: Any, *grads: Tensor) -> None:
    refuse_second("swiglu_backward", "cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = BACKWARD(rows_of(grad), *ctx.saved_tensors)
    return (*grads, None)[:2]


BACKWARD = register(
    "swiglu_backward", fake=_backward_fake, setup_context=lambda ctx, inputs, output: None, backward=_refuse
)
OP = register("swiglu", fake=_fake, setup_context=_setup_context, backward=_backward)
IN_PLACE = register("swiglu_", fake=lambda gate, value: None)


def rows_of(t: Tensor) -> Tensor:  # (..., C) to (N, C), channels dense
    """A view where all rows are at one distance and channels dense, else a copy (which autograd sees)."""
    rows = t[None] if t.ndim == 1 else t.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def swiglu_cpu(
    gate: Tensor,  # (..., hidden), or (..., 2*hidden), any strides
    value: Tensor | None,  # (..., hidden), any strides
    inplace: bool,
) -> Tensor:  # (..., hidden), contiguous unless in place
    """`swiglu_ref` in one pass; what `rows_of` cannot take as it lies is copied first.

    Raises NotImplementedError for forward mode, torch.func's transforms or a second derivative.
    """
    refuse_transforms("swiglu", "cpu")
    rows, values = rows_of(gate), None if value is None else rows_of(value)
    if (
        inplace
        and value is not None
        and gate.is_contiguous()
        and gate.dtype == torch.promote_types(gate.dtype, value.dtype)
    ):
        IN_PLACE(rows, values)
        return gate
    out = OP(rows, values)
    out = out.view(*gate.shape[:-1], out.shape[1])
    return gate.copy_(out) if inplace else out
