"""What both directions of add_norm share on NVIDIA GPUs: where rows come from, and rows in two pieces.

A row is held in a head and a tail, powers of two of channels (`configs`): 384 = 256 + 128 leaves no lane idle. Where
TAIL is 0 there is no tail, and what stands for it is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(job, num_globals, sizes, x_strides, out_strides, BLOCK_R: tl.constexpr):
    """BLOCK_R patches of one plane i0 of volume b: rows of x, rows of out (int64), which of them there are."""
    n0, n1, n2 = sizes  # of the new plane's axes, slowest first
    x_volume, x_0, x_1, x_2 = x_strides  # rows from one volume to the next, and along the axes
    out_volume, out_0 = out_strides
    tiles = tl.cdiv(n1 * n2, BLOCK_R)
    tile, job = job % tiles, job // tiles
    i0, b = job % n0, job // n0
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    i1, i2 = row // n2, row % n2
    source = b * x_volume + num_globals + i0 * x_0 + i1 * x_1 + i2 * x_2
    target = b * out_volume + num_globals + i0 * out_0 + row
    return source, target, row < n1 * n2


@triton.jit
def load_rows(x, place, ok, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Channels c (W,) of the rows at `place` (R,): (R, W), 0 where there are none."""
    mask = ok[:, None] & (c < CHANNELS)[None, :]
    return tl.load(x + (place * CHANNELS)[:, None] + c[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def store_rows(out, piece, place, ok, c, CHANNELS: tl.constexpr):
    """The piece (R, W) into channels c (W,) of the rows at `place` (R,)."""
    mask = ok[:, None] & (c < CHANNELS)[None, :]
    tl.store(out + (place * CHANNELS)[:, None] + c[None, :], piece.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(vector, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Channels c (W,) of a vector: (1, W)."""
    return tl.load(vector + c, mask=c < CHANNELS, other=0).to(ACC)[None, :]


@triton.jit
def sum_rows(head, tail, TAIL: tl.constexpr):
    """Sums over channels: (R,)."""
    total = tl.sum(head, 1)
    if TAIL:
        total += tl.sum(tail, 1)
    return total
