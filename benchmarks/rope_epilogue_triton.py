"""A candidate, not part of the package: the product that makes q, k and v, with RoPE in its epilogue.

The persistent product of `linear_gelu`, but that queries and keys are turned before they are stored: attention then
turns nothing, and no pass over the keys is left. Sums are turned as they are, in float32, and rounded once; a linear
layer and `ops.rope` after it round before they turn as well, so the two differ by about a rounding.
`gpu_rope_epilogue.py` times it against what the engine does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from planecycle_fast.ops import Tables
from planecycle_fast.ops.activations.linear_gelu_table import NARROW, WIDE, Tiling, tiling
from planecycle_fast.ops.activations.linear_gelu_triton import PROGRAMS, _described
from planecycle_fast.ops.multihead_attention.self_attention_backward_triton import _padded
from planecycle_fast.ops.multihead_attention.self_attention_turning_triton import sincos, turned
from planecycle_fast.ops.registration import launch
from planecycle_fast.ops.scalars_triton import scalars
from planecycle_fast.ops.tiles import LIMIT

HEADS = (32, 64, 128)  # channels of a head: a part of a tile, 128 columns, holds whole heads
# Those of `linear_gelu`, by columns. The wide one loads a step less ahead: sine and cosine pass through shared memory.
# On sm_90, heads of 64, tables of two axes: 166 registers and 180,256 bytes; wide 238 and 196,632. None is spilled.
WIDE_HEAD = 64  # channels; of more a wide tile spills
TILES = {NARROW.hidden: NARROW, WIDE.hidden: WIDE._replace(stages=3)}


@triton.jit
def _in_halves(t, HEADS: tl.constexpr, HALF: tl.constexpr):
    """First and second halves of heads side by side (rows, HEADS*2*HALF): (rows, HEADS*HALF) each."""
    t = tl.permute(tl.reshape(t, [t.shape[0], HEADS, 2, HALF]), [0, 1, 3, 2])
    a, b = tl.split(t)
    return tl.reshape(a, [t.shape[0], HEADS * HALF]), tl.reshape(b, [t.shape[0], HEADS * HALF])


@triton.jit
def _joined(a, b, HEADS: tl.constexpr, HALF: tl.constexpr):
    """What `_in_halves` took apart."""
    a, b = tl.reshape(a, [a.shape[0], HEADS, HALF]), tl.reshape(b, [b.shape[0], HEADS, HALF])
    return tl.reshape(tl.permute(tl.join(a, b), [0, 1, 3, 2]), [a.shape[0], HEADS * 2 * HALF])


@triton.jit
def _of_all(t, HEADS: tl.constexpr):
    """One half of a head (rows, HALF) for all of them: (rows, HEADS*HALF)."""
    wide = tl.broadcast_to(t[:, None, :], [t.shape[0], HEADS, t.shape[1]])
    return tl.reshape(wide, [t.shape[0], HEADS * t.shape[1]])


@triton.jit
def _store(
    out, bias, total, first, column, sin0, sin1, sin2, cos0, cos1, cos2, rows, num_globals, n1, n2,
    TURNED: tl.constexpr, HD: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A part of a tile, from a row and a column on: biased, turned where it is of queries or keys, rounded."""
    WIDTH: tl.constexpr = total.shape[1]
    HALF: tl.constexpr = HD // 2
    if bias is not None:
        c = tl.cast(column, tl.int64) + tl.arange(0, WIDTH)
        total += tl.load(bias + c, mask=c < TURNED // 2 * 3).to(ACC)[None, :]
    if column < TURNED:
        row, j = (first + tl.arange(0, total.shape[0])) % rows, tl.arange(0, HALF)
        sin, cos = sincos(sin0, sin1, sin2, cos0, cos1, cos2, row, rows, num_globals, n1, n2, j, HALF, S0, S1, ACC)
        sin, cos = _of_all(sin, WIDTH // HD), _of_all(cos, WIDTH // HD)
        a, b = _in_halves(total, WIDTH // HD, HALF)
        a, b = turned(a, b, sin, cos, ACC, ACC, row >= num_globals)
        total = _joined(a, b, WIDTH // HD, HALF)
    out.store([first, column], total.to(out.dtype))


@triton.jit(do_not_specialize=["all_rows", "rows", "num_globals", "n1", "n2"])
def linear_rope_kernel(
    x,  # descriptor of (N*rows, C), tiles BLOCK_R x BLOCK_C
    weight,  # of (3*C, C), BLOCK_H x BLOCK_C
    bias,  # (3*C,), or None
    out,  # of (N*rows, 3*C), BLOCK_R x BLOCK_H / PARTS
    sin0, sin1, sin2, cos0, cos1, cos2,  # tables of the axes, (n_i, s_i), dense; None where there are fewer
    all_rows, rows, num_globals, n1, n2,  # N*rows; n1, n2: sizes of the last axes
    STEPS: tl.constexpr,  # of a product
    TURNED: tl.constexpr,  # columns of queries and keys: 2*C
    HD: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr,  # sections of the first two axes
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,  # 1 or 2
    PROGRAMS: tl.constexpr,  # of a launch with more tiles than that
    ACC: tl.constexpr,  # what is summed and turned in
):  # fmt: skip
    all_rows, rows, num_globals, n1, n2 = scalars((all_rows, rows, num_globals, n1, n2), tl.int32)
    across: tl.constexpr = (TURNED // 2 * 3 + BLOCK_H - 1) // BLOCK_H
    for tile in tl.range(tl.program_id(0), tl.cdiv(all_rows, BLOCK_R) * across, PROGRAMS, flatten=True):
        first, column = tile // across * BLOCK_R, tile % across * BLOCK_H
        total = tl.zeros([BLOCK_R, BLOCK_H], ACC)
        for step in range(STEPS):
            a, b = x.load([first, step * BLOCK_C]), weight.load([column, step * BLOCK_C])
            total = tl.dot(a, b.T, total, input_precision="ieee", out_dtype=ACC)
        if PARTS == 1:
            _store(
                out, bias, total, first, column, sin0, sin1, sin2, cos0, cos1, cos2, rows, num_globals, n1, n2,
                TURNED, HD, S0, S1, ACC,
            )  # fmt: skip
        else:
            half: tl.constexpr = BLOCK_H // 2
            left, right = tl.split(tl.permute(tl.reshape(total, [BLOCK_R, 2, half]), [0, 2, 1]))
            _store(
                out, bias, left, first, column, sin0, sin1, sin2, cos0, cos1, cos2, rows, num_globals, n1, n2,
                TURNED, HD, S0, S1, ACC,
            )  # fmt: skip
            _store(
                out, bias, right, first, column + half, sin0, sin1, sin2, cos0, cos1, cos2, rows, num_globals, n1, n2,
                TURNED, HD, S0, S1, ACC,
            )  # fmt: skip


def linear_rope(
    x: Tensor,  # (N, rows, C), contiguous, 16 bits, globals first
    weight: Tensor,  # (3*C, C), contiguous
    bias: Tensor | None,  # (3*C,)
    tables: Tables,  # of the rows after the globals, float32, contiguous
    num_globals: int,  # g
    heads: int,
    tile: Tiling | None = None,  # None: by the columns
) -> Tensor:  # (N, rows, 3*heads, hd), heads of q, k and v
    """A linear layer, then RoPE of queries and keys; without gradients, on sm_90.

    Raises ValueError for what the candidate does not take.
    """
    n, rows, channels = x.shape
    head_dim = channels // heads
    tile = tile or TILES[tiling(3 * channels).hidden if head_dim <= WIDE_HEAD else NARROW.hidden]
    width = tile.hidden // tile.parts
    if x.dtype.itemsize != 2 or head_dim not in HEADS or 2 * channels % width:
        raise ValueError(
            f"x must be of 16 bits, with heads of 32, 64 or 128 channels, and queries and keys that are a multiple of "
            f"{width} columns, got {x.dtype} and {heads} heads of {head_dim}"
        )
    if n * rows > LIMIT:
        raise ValueError(f"x must have at most 2**30 rows, got {n * rows}")
    out, programs = x.new_empty(n * rows, 3 * channels), PROGRAMS
    if x.device.type == "cuda":
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count * tile.programs
    all_tiles = triton.cdiv(n * rows, tile.rows) * triton.cdiv(3 * channels, tile.hidden)
    sections = [int(t.shape[1]) for t in tables.sin]
    launch(
        linear_rope_kernel, (min(all_tiles, programs),), x.device,
        _described(x.view(-1, channels), tile.rows, tile.channels), _described(weight, tile.hidden, tile.channels),
        bias, _described(out, tile.rows, width), *_padded(tables.sin), *_padded(tables.cos),
        n * rows, rows, num_globals, *_padded([len(t) for t in tables.sin], 1)[1:],
        STEPS=triton.cdiv(channels, tile.channels), TURNED=2 * channels, HD=head_dim, S0=sum(sections[:1]),
        S1=sum(sections[1:2]), BLOCK_R=tile.rows, BLOCK_H=tile.hidden, BLOCK_C=tile.channels, PARTS=tile.parts,
        PROGRAMS=programs, ACC=tl.float32, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.view(n, rows, 3 * heads, head_dim)
