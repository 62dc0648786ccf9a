"""Queries and keys turned when a kernel loads them, and gradients turned back before it stores them.

As `ops.rope` does it, from tables: rounded to the dtype of x before anything else is computed from them.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(v, DTYPE: tl.constexpr):  # to another dtype, and back to the one that is computed in
    return v.to(DTYPE).to(v.dtype)


@triton.jit
def section(t0, t1, t2, row0, row1, row2, j, mask, filling, S0: tl.constexpr, S1: tl.constexpr):
    """Elements j of one row per axis put side by side; the rows of a table are given by their offsets."""
    v = tl.load(t0 + (row0 + j), mask=mask & (j < S0), other=filling)
    if t1 is not None:
        v = tl.where(j < S0, v, tl.load(t1 + (row1 + (j - S0)), mask=mask & (j >= S0) & (j < S0 + S1), other=filling))
    if t2 is not None:
        v = tl.where(j < S0 + S1, v, tl.load(t2 + (row2 + (j - S0 - S1)), mask=mask & (j >= S0 + S1), other=filling))
    return v


@triton.jit
def sincos(
    sin0, sin1, sin2, cos0, cos1, cos2,  # tables of the axes, (n_i, s_i), dense; None where there are fewer
    row,  # rows of a sequence, globals first
    rows, num_globals, n1, n2,  # rows of a sequence, g, sizes of the last axes
    j,  # channels of half a head
    HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sine and cosine (row, j), 0 and 1 of globals: they stay as they are."""
    token = tl.maximum(row - num_globals, 0)
    i0, i1, i2 = token, token * 0, token * 0
    if sin2 is not None:
        i0, i1, i2 = token // (n1 * n2), token // n2 % n1, token % n2
    elif sin1 is not None:
        i0, i1 = token // n1, token % n1
    j = j[None, :]
    mask = ((row >= num_globals) & (row < rows))[:, None] & (j < HALF)
    row0, row1 = i0.to(tl.int64)[:, None] * S0, i1.to(tl.int64)[:, None] * S1
    row2 = i2.to(tl.int64)[:, None] * (HALF - S0 - S1)
    sin = section(sin0, sin1, sin2, row0, row1, row2, j, mask, 0.0, S0, S1)
    cos = section(cos0, cos1, cos2, row0, row1, row2, j, mask, 1.0, S0, S1)
    return sin.to(ACC), cos.to(ACC)


@triton.jit
def turned(a, b, sin, cos, COMPUTE: tl.constexpr, ACC: tl.constexpr, patch=None):
    """Halves of heads (rows, hd/2) turned; by minus `sin` turned back.

    `patch` (rows,) says which rows are no globals: these stay as they are, infinities too, whose products with a sine
    of 0 would be NaN.
    """
    x, y = rounded(a.to(ACC), COMPUTE), rounded(b.to(ACC), COMPUTE)
    p, q = x * cos - y * sin, y * cos + x * sin
    if patch is not None:
        p, q = tl.where(patch[:, None], p, x), tl.where(patch[:, None], q, y)
    return rounded(p, COMPUTE).to(a.dtype), rounded(q, COMPUTE).to(b.dtype)
