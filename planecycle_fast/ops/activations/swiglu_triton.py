"""swiglu on NVIDIA GPUs: one Triton kernel forward, one backward; each tensor is read or written once.

Everything is rows of `hidden` channels at one distance, as the halves of a packed tensor are. Sigmoid and gradients
are computed again in backward, from gate and value, as reading a saved one would take longer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernels for its compile caches

from ..registration import INTERPRETED, launch, register
from ..registry import Cost, refused_again
from ..scalars_triton import scalars
from ..tiles import MAX_PROGRAMS
from .swiglu_autograd import _dtype, _hidden, _like, backward_by, call_of, fake, setup_context


@triton.jit
def _tile(rows, hidden, blocks, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of this program, and which of them there are. Offsets are as wide as these: 64 bits."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row[:, None], c[None, :], (row < rows)[:, None] & (c < hidden * UNIT)[None, :]


@triton.jit(do_not_specialize=["rows", "hidden", "blocks", "gate_row", "value_row", "out_row"])  # one for all sizes
def swiglu_kernel(
    gate,  # (rows, hidden), or (rows, 2*hidden), channels dense
    value,  # (rows, hidden), or None: the second half of gate
    out,  # (rows, hidden), maybe gate itself
    rows: tl.int64,
    hidden: tl.int64,  # like strides it counts UNIT elements
    blocks,  # of channels
    gate_row: tl.int64, value_row: tl.int64, out_row: tl.int64,  # strides of rows
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    BLOCK_R: tl.constexpr,  # rows and channels of a tile
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,  # what is computed in
):  # fmt: skip
    rows, hidden, gate_row, value_row, out_row = scalars((rows, hidden, gate_row, value_row, out_row), tl.int64)
    blocks = tl.cast(blocks, tl.int32)
    if value is None:
        value, value_row = gate + hidden * UNIT, gate_row
    row, c, mask = _tile(rows, hidden, blocks, UNIT, BLOCK_R, BLOCK_C)
    g = tl.load(gate + row * gate_row * UNIT + c, mask=mask).to(ACC)
    v = tl.load(value + row * value_row * UNIT + c, mask=mask).to(ACC)
    result = g / (1 + tl.exp(-g)) * v
    tl.store(out + row * out_row * UNIT + c, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "hidden", "blocks", "grad_row", "gate_row", "value_row", "grads_row"])
def swiglu_backward_kernel(
    grad,  # (rows, hidden), channels dense
    gate,  # (rows, hidden), or (rows, 2*hidden), channels dense
    value,  # (rows, hidden), or None: the second half of gate
    grad_gate,  # like gate, contiguous
    grad_value,  # like value, contiguous
    rows: tl.int64,
    hidden: tl.int64,  # like strides it counts UNIT elements
    blocks,  # of channels
    grad_row: tl.int64, gate_row: tl.int64, value_row: tl.int64, grads_row: tl.int64,  # strides of rows
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    BLOCK_R: tl.constexpr,  # rows and channels of a tile
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,  # what is computed in
):  # fmt: skip
    rows, hidden, grad_row, grads_row = scalars((rows, hidden, grad_row, grads_row), tl.int64)
    gate_row, value_row = scalars((gate_row, value_row), tl.int64)
    blocks = tl.cast(blocks, tl.int32)
    if value is None:
        value, value_row = gate + hidden * UNIT, gate_row
        grad_value = grad_gate + hidden * UNIT
    row, c, mask = _tile(rows, hidden, blocks, UNIT, BLOCK_R, BLOCK_C)
    d = tl.load(grad + row * grad_row * UNIT + c, mask=mask).to(ACC)
    g = tl.load(gate + row * gate_row * UNIT + c, mask=mask).to(ACC)
    v = tl.load(value + row * value_row * UNIT + c, mask=mask).to(ACC)
    sigmoid = 1 / (1 + tl.exp(-g))
    of_gate = d * v * sigmoid * (1 + g * (1 - sigmoid))
    of_value = d * (g * sigmoid)
    place = row * grads_row * UNIT + c
    tl.store(grad_gate + place, of_gate.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_value + place, of_value.to(grad_value.dtype.element_ty), mask=mask)


def _plan(hidden: int, *tensors: Tensor | None) -> tuple[int, list[int], dict[str, Any]]:
    """Programs, sizes and strides, and constants of a launch. Tensors are (rows, any), or None if not there.

    A thread has 16 elements of each tensor in 16-byte accesses, or 4 where rows do not start at such.
    """
    hidden = int(hidden)  # a number, also where torch traces sizes: tiles follow it
    held = [t for t in tensors if t is not None]
    vector = 16 // min([t.element_size() for t in held])
    offsets = [hidden, *[offset for t in held for offset in (t.storage_offset(), t.stride(0))]]
    unit = vector if all([offset % vector == 0 for offset in offsets]) else 1
    most, elements = (256, 2048) if unit > 1 else (64, 512)  # an address per element: larger tiles spill
    whole = [block for block in (256, 128, 64) if block <= most and hidden % block == 0]  # no idle lanes
    block_c = whole[0] if whole else min(most, triton.next_power_of_2(hidden))
    block_r = elements // block_c
    rows, blocks = held[0].shape[0], triton.cdiv(hidden, block_c)
    programs = blocks * triton.cdiv(rows, block_r)
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"gate is too large for backend 'triton': {rows} rows of {hidden} channels are {programs} programs; "
            "expected at most 2**31 - 1"
        )
    strides = [0 if t is None else t.stride(0) // unit for t in tensors]
    acc = tl.float64 if torch.float64 in [t.dtype for t in held] else tl.float32
    constants = dict(UNIT=unit, BLOCK_R=block_r, BLOCK_C=block_c, ACC=acc)
    return programs, [rows, hidden // unit, blocks, *strides], constants


def _swiglu(
    gate: Tensor,  # (rows, hidden), or (rows, 2*hidden); channels dense, as in all below
    value: Tensor | None,  # (rows, hidden)
) -> Tensor:  # (rows, hidden)
    hidden = _hidden(gate, value)
    out = gate.new_empty(gate.shape[0], hidden, dtype=_dtype(gate, value))
    if out.numel() == 0:
        return out
    programs, sizes, constants = _plan(hidden, gate, value, out)
    kernel = swiglu_kernel if INTERPRETED else wrap_triton(swiglu_kernel)
    launch(kernel, (programs,), gate.device, gate, value, out, *sizes, **constants)
    return out


def _swiglu_(
    gate: Tensor,  # (rows, hidden), written to
    value: Tensor,  # (rows, hidden)
) -> None:
    if gate.numel() == 0:
        return
    programs, sizes, constants = _plan(gate.shape[1], gate, value, gate)
    kernel = swiglu_kernel if INTERPRETED else wrap_triton(swiglu_kernel)
    launch(kernel, (programs,), gate.device, gate, value, gate, *sizes, **constants)


def _swiglu_backward(
    grad: Tensor,  # (rows, hidden)
    gate: Tensor,  # (rows, hidden), or (rows, 2*hidden)
    value: Tensor | None,  # (rows, hidden)
) -> list[Tensor]:  # of each tensor, like it
    grads = _like(grad, gate, value)
    if grad.numel() == 0:
        return grads
    grad_gate, grad_value = (*grads, None)[:2]
    programs, sizes, constants = _plan(grad.shape[1], grad, gate, value, grad_gate)
    kernel = swiglu_backward_kernel if INTERPRETED else wrap_triton(swiglu_backward_kernel)
    launch(kernel, (programs,), grad.device, grad, gate, value, grad_gate, grad_value, *sizes, **constants)
    return grads


def _bytes(*tensors: Tensor | None) -> int:
    return sum([t.numel() * t.element_size() for t in tensors if t is not None])


def _cost(gate: Tensor, value: Tensor | None) -> Cost:
    elements = gate.shape[0] * _hidden(gate, value)
    return Cost(_bytes(gate, value), elements * _dtype(gate, value).itemsize, launches=1 if elements else 0)


def _cost_(gate: Tensor, value: Tensor) -> Cost:
    return Cost(_bytes(gate, value), _bytes(gate), launches=1 if gate.numel() else 0)


def _backward_cost(grad: Tensor, gate: Tensor, value: Tensor | None) -> Cost:
    return Cost(_bytes(grad, gate, value), _bytes(gate, value), launches=1 if grad.numel() else 0)


BACKWARD = register(
    _swiglu_backward, fake=_like, cost=_backward_cost, backward=refused_again("swiglu_backward", "triton")
)
OP = register(_swiglu, fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD), cost=_cost)
INPLACE = register(_swiglu_, fake=lambda gate, value: None, mutates=("gate",), cost=_cost_)

swiglu_triton = call_of(OP, INPLACE, "triton")
