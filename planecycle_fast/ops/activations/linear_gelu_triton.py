"""linear_gelu on NVIDIA GPUs: one persistent Triton kernel, whose loads and stores go by tensor descriptors.

Descriptors are made on the host: none that is made on the GPU needs memory, for which a process has one allocator. As
torch shows no such kernel to its compiler (its tracer of operations takes none), the operation is opaque to it.

GELU of v is v * Phi(v), and Phi(-a) for a >= 0 is 2 to a polynomial of a that falls without end: one exponential, no
division, and small values of negative v have small relative errors too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..registration import launch, register
from ..registry import Cost, refuse_transforms
from ..tiles import LIMIT
from .linear_gelu_table import ALIGNED, Tiling, tiling

PROGRAMS = 132  # multiprocessors, where there is no GPU to ask
INFERENCE = "linear_gelu on backend 'triton' has no gradients: training keeps what goes into GELU; use 'reference'"


@triton.jit
def _gelu(v, COARSE: tl.constexpr):
    """Exact GELU of float32, to 7e-6 of each value, COARSE to 2.9e-4, down to v = -5.5; 1e-7 in all beyond.

    Half a rounding of float16 is 2.4e-4 and of bfloat16 2e-3. Fitted to log2(Phi(-a)), largest error least, exact at 0.
    """
    a = tl.abs(v)
    if COARSE:
        p = (-0.000241196292 * a + 0.00498826476) * a - 0.0452387445
        p = ((p * a - 0.468181193) * a - 1.14767551) * a - 1.0
    else:
        p = ((-1.79377969e-06 * a + 6.07261463e-05) * a - 0.000923185609) * a + 0.00847684685
        p = (((p * a - 0.0538909361) * a - 0.458541572) * a - 1.15121436) * a - 1.0
    tail = tl.exp2(p)
    return v * tl.where(v > 0, 1 - tail, tail)


@triton.jit
def _store(out, bias, total, row, column, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, COARSE: tl.constexpr):
    """GELU of a part of a tile, WIDTH hidden channels from `column` on, rounded."""
    if bias is not None:
        c = tl.cast(column, tl.int64) + tl.arange(0, WIDTH)
        total += tl.load(bias + c, mask=c < HIDDEN).to(total.dtype)[None, :]
    out.store([row, column], _gelu(total, COARSE).to(out.dtype))


@triton.jit(do_not_specialize=["rows"])
def linear_gelu_kernel(
    x,  # descriptor of (rows, C), tiles BLOCK_R x BLOCK_C
    weight,  # of (hidden, C), BLOCK_H x BLOCK_C
    bias,  # (hidden,), or None
    out,  # of (rows, hidden), BLOCK_R x BLOCK_H / PARTS
    rows,
    STEPS: tl.constexpr,  # of a product
    HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2
    PROGRAMS: tl.constexpr,  # of a launch with more tiles than that
    COARSE: tl.constexpr,  # see `_gelu`
    ACC: tl.constexpr,  # what is summed in
):  # fmt: skip
    rows = tl.cast(rows, tl.int32)
    across: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    tiles = tl.cdiv(rows, BLOCK_R) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):  # the next tile's loads begin in this one
        row, column = tile // across * BLOCK_R, tile % across * BLOCK_H
        total = tl.zeros([BLOCK_R, BLOCK_H], ACC)
        for step in range(STEPS):
            a, b = x.load([row, step * BLOCK_C]), weight.load([column, step * BLOCK_C])  # zeros beyond the ends
            total = tl.dot(a, b.T, total, input_precision="ieee", out_dtype=ACC)
        if PARTS == 1:
            _store(out, bias, total, row, column, HIDDEN, BLOCK_H, COARSE)
        else:
            half: tl.constexpr = BLOCK_H // 2
            first, second = tl.split(tl.permute(tl.reshape(total, [BLOCK_R, 2, half]), [0, 2, 1]))
            _store(out, bias, first, row, column, HIDDEN, half, COARSE)
            _store(out, bias, second, row, column + half, HIDDEN, half, COARSE)


def _linear_gelu(
    x: Tensor,  # (rows, C), rows 16-byte aligned
    weight: Tensor,  # (hidden, C), rows 16-byte aligned
    bias: Tensor | None,  # (hidden,)
) -> Tensor:  # (rows, hidden)
    out = fake(x, weight, bias)
    if out.numel() == 0:
        return out
    tile, programs = tiling(weight.shape[0]), PROGRAMS
    if x.device.type == "cuda":
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count * tile.programs
    tiles = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(weight.shape[0], tile.hidden)
    if x.shape[0] > LIMIT or tiles > LIMIT:
        raise ValueError(
            f"x is too large for backend 'triton': {x.shape[0]} rows in {tiles} tiles; expected at most 2**30 of either"
        )
    for name, t in (("x", x), ("weight", weight)):
        if t.data_ptr() % ALIGNED:
            raise ValueError(f"{name} must start at a multiple of {ALIGNED} bytes, got address {t.data_ptr()}")
    launch(
        linear_gelu_kernel, (min(tiles, programs),), x.device,
        _described(x, tile.rows, tile.channels), _described(weight, tile.hidden, tile.channels), bias,
        _described(out, tile.rows, tile.hidden // tile.parts), x.shape[0], **_constants(x, weight, tile, programs),
    )  # fmt: skip
    return out


def _described(
    t: Tensor,  # (rows, any)
    *block: int,
) -> TensorDescriptor:
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [*block])


def _constants(
    x: Tensor,  # (rows, C)
    weight: Tensor,  # (hidden, C)
    tile: Tiling,
    programs: int,
) -> dict[str, Any]:
    return dict(
        STEPS=triton.cdiv(weight.shape[1], tile.channels), HIDDEN=weight.shape[0],
        BLOCK_R=tile.rows, BLOCK_H=tile.hidden, BLOCK_C=tile.channels, PARTS=tile.parts, PROGRAMS=programs,
        COARSE=x.dtype == torch.bfloat16, ACC=tl.float32, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def fake(
    x: Tensor,  # (rows, C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> Tensor:  # (rows, hidden)
    return x.new_empty(x.shape[0], weight.shape[0])


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    read, written = x.numel(), x.shape[0] * weight.shape[0]
    return Cost(read * x.element_size() if written else 0, written * x.element_size(), launches=1 if written else 0)


def _refused(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(INFERENCE)


def rows_of(
    x: Tensor,  # (..., C), of what the kernel takes
) -> Tensor:  # (rows, C)
    """A view."""
    return x if x.ndim == 2 else x.view(-1, x.shape[-1])


def _flops(x: torch.Size, weight: torch.Size, bias: torch.Size | None, *, out_shape: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


OP = register(_linear_gelu, fake=fake, backward=_refused, cost=_cost, flops=_flops, opaque=True)


def linear_gelu_triton(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> Tensor:  # (..., hidden)
    """`linear_gelu_ref` of what the kernel takes (`why_not_linear_gelu`), without gradients: NotImplementedError."""
    refuse_transforms("linear_gelu", "triton")
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, weight, bias)]):
        raise NotImplementedError(INFERENCE)
    return OP(rows_of(x), weight, bias).view(*x.shape[:-1], weight.shape[0])
