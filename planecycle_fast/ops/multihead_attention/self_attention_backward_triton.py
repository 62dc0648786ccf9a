"""The backward of self_attention on NVIDIA GPUs: gradients of q, k and v, written once each, where they belong.

Weights are computed again from queries, keys and the logarithms of sums. Of few rows (`one_tile`) a program holds all
of a sequence and head: five products, one launch; neither context nor exact sums are needed, as all weights are there.
Beyond, tiles of queries run over all keys for dq, and leave delta, the sums of grad times out, for tiles of keys that
run over all queries for dk and dv: seven products in two launches, or eight where dk and dv wait for each other. No
atomics, and every sum in a fixed order.

Queries and keys lie in halves of their channels (`self_attention_turning_triton`), and so do dq and dk, which turn
back before they are stored. Products take what came, in its dtype, and sum in ACC.
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
from ..rotary.rope_triton import _TYPES, _padded
from ..scalars_triton import scalars
from ..tiles import LIMIT, MAX_PROGRAMS
from .self_attention_backward_tiles import one_tile, passes
from .self_attention_load import check_load
from .self_attention_shapes import fake_backward, lse_dtype, parts
from .self_attention_turning_triton import sincos, turned

HEADS = 2  # of a program that holds all rows, at most: enough to share sine and cosine, few enough for many programs
MAX_HEAD_DIM = 128
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pair(x, place, ok, j, HALF: tl.constexpr):
    """Both halves of the rows at `place` (R,), 0 where there are none: 2 tiles (R, BLOCK_J)."""
    offsets, mask = place[:, None] + j[None, :], ok[:, None] & (j < HALF)[None, :]
    return tl.load(x + offsets, mask=mask, other=0), tl.load(x + (offsets + HALF), mask=mask, other=0)


@triton.jit
def _halves(
    x, place, row, sizes, tables, j, HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, TURNS: tl.constexpr,
    COMPUTE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """`_pair`, turned if TURNS."""
    rows, num_globals, n1, n2 = sizes
    a, b = _pair(x, place, row < rows, j, HALF)
    if TURNS:
        sin, cos = sincos(*tables, row, rows, num_globals, n1, n2, j, HALF, S0, S1, TURN)
        a, b = turned(a, b, sin, cos, COMPUTE, TURN, row >= num_globals)
    return a, b


@triton.jit
def _whole(x, place, ok, d, HALF: tl.constexpr):
    """The rows at `place` (R,), 0 where there are none: (R, BLOCK_D)."""
    return tl.load(x + (place[:, None] + d[None, :]), mask=ok[:, None] & (d < 2 * HALF)[None, :], other=0)


@triton.jit
def _store_halves(
    x, a, b, place, row, sizes, tables, j, HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, BACK: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Gradients of halves, if BACK turned back, by sine and cosine that are read again: kept, they take registers."""
    rows, num_globals, n1, n2 = sizes
    if BACK:
        sin, cos = sincos(*tables, row, rows, num_globals, n1, n2, j, HALF, S0, S1, TURN)
        a, b, patch = a.to(TURN), b.to(TURN), (row >= num_globals)[:, None]
        a, b = tl.where(patch, a * cos + b * sin, a), tl.where(patch, b * cos - a * sin, b)
    offsets, mask = place[:, None] + j[None, :], (row < rows)[:, None] & (j < HALF)[None, :]
    tl.store(x + offsets, a.to(x.dtype.element_ty), mask=mask)
    tl.store(x + (offsets + HALF), b.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _store_whole(x, tile, place, ok, d, HALF: tl.constexpr):
    mask = ok[:, None] & (d < 2 * HALF)[None, :]
    tl.store(x + (place[:, None] + d[None, :]), tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _weights(a, b, c, d, shift, ok, factor, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Of the products of rows, in halves (a, b), with others, (c, d): exponentials, 0 where not `ok`."""
    scores = _product(b, d.T, _product(a, c.T, None, PRECISION, ACC), PRECISION, ACC)
    return tl.exp2(tl.where(ok, scores * factor - shift * LOG2E, float("-inf")))


_SIZES = """rows num_globals n1 n2 heads per_group scale grad_seq grad_row grad_head q_seq q_row q_head
k_seq k_row k_head v_seq v_row v_head grads_row"""


@triton.jit(do_not_specialize=_SIZES.split())  # a new volume shape compiles nothing
def self_attention_tile_backward_kernel(
    grad,  # (N, rows, heads, hd), channels dense
    q,  # (N, rows, heads, hd), channels dense; without k and v (N, rows, 3*heads, hd)
    k, v,  # (N, rows, heads, hd), channels dense, or None
    lse,  # (N, heads, rows)
    grad_q, grad_k, grad_v,  # like q, k and v, contiguous
    sin0, sin1, sin2, cos0, cos1, cos2,  # tables of the axes, (n_i, s_i), dense; None where there are fewer
    rows, num_globals, n1, n2,  # of a sequence, g, sizes of the last axes
    heads, per_group,  # of all and of one program
    scale: tl.float64,
    grad_seq: tl.int64, grad_row: tl.int64, grad_head: tl.int64,  # strides; all count UNIT elements
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64,
    v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    grads_row,  # of all gradients
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    BLOCK: tl.constexpr,  # rows, rounded up to a power of two
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,  # channels of half a head and of a head, rounded up likewise
    HALF: tl.constexpr,  # hd/2
    S0: tl.constexpr, S1: tl.constexpr,  # sections of the first two axes
    LOAD_Q: tl.constexpr, LOAD_K: tl.constexpr,  # whether they are turned when they are loaded
    BACK_Q: tl.constexpr, BACK_K: tl.constexpr,  # whether their gradients are turned back
    COMPUTE: tl.constexpr,  # that torch turns in
    TURN: tl.constexpr,  # that this kernel turns in
    ACC: tl.constexpr,  # of sums
    PRECISION: tl.constexpr,  # of products of float32
):  # fmt: skip
    """All of a sequence's rows, and per_group of its heads."""
    rows, num_globals, n1, n2 = scalars((rows, num_globals, n1, n2), tl.int32)
    heads, per_group = scalars((heads, per_group), tl.int32)
    grad_seq, grad_row, grad_head, grads_row = scalars((grad_seq, grad_row, grad_head, grads_row), tl.int64)
    q_seq, q_row, q_head, k_seq, k_row = scalars((q_seq, q_row, q_head, k_seq, k_row), tl.int64)
    k_head, v_seq, v_row, v_head = scalars((k_head, v_seq, v_row, v_head), tl.int64)
    factor = tl.cast(tl.cast(scale, tl.float64) * LOG2E, ACC)  # as forward has it: weights are as close as they can be
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
        grad_k, grad_v = grad_q + heads.to(tl.int64) * (2 * HALF), grad_q + heads.to(tl.int64) * (4 * HALF)
    tables, sizes = (sin0, sin1, sin2, cos0, cos1, cos2), (rows, num_globals, n1, n2)
    pid = tl.program_id(0)
    groups = tl.cdiv(heads, per_group)
    group, n = pid % groups, (pid // groups).to(tl.int64)
    row = tl.arange(0, BLOCK)
    ok = row < rows
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    for head in range(group * per_group, tl.minimum((group + 1) * per_group, heads)):
        h = tl.cast(head, tl.int64)
        x = q + (n * q_seq + h * q_head) * UNIT
        qa, qb = _halves(x, row * q_row * UNIT, row, sizes, tables, j, HALF, S0, S1, LOAD_Q, COMPUTE, TURN)
        x = k + (n * k_seq + h * k_head) * UNIT
        ka, kb = _halves(x, row * k_row * UNIT, row, sizes, tables, j, HALF, S0, S1, LOAD_K, COMPUTE, TURN)
        shift = tl.load(lse + ((n * heads + h) * rows + row), mask=ok, other=0)
        weights = _weights(qa, qb, ka, kb, shift[:, None], ok[None, :], factor, PRECISION, ACC)
        weights = tl.where(
            ok[:, None], weights * (1 / tl.sum(weights, 1))[:, None], 0
        )  # all are here: exactly 1 in all
        g = _whole(grad + (n * grad_seq + h * grad_head) * UNIT, row * grad_row * UNIT, ok, d, HALF)
        place = (n * rows + row) * grads_row * UNIT + h * (2 * HALF)
        of_v = _product(weights.to(g.dtype).T, g, None, PRECISION, ACC)
        _store_whole(grad_v, of_v, place, ok, d, HALF)
        value = _whole(v + (n * v_seq + h * v_head) * UNIT, row * v_row * UNIT, ok, d, HALF)
        of_weights = _product(g, value.T, None, PRECISION, ACC)
        along = tl.sum(weights * of_weights, 1)
        of_scores = (weights * (of_weights - along[:, None])).to(g.dtype)
        a, b = _product(of_scores.T, qa, None, PRECISION, ACC), _product(of_scores.T, qb, None, PRECISION, ACC)
        _store_halves(grad_k, a * scale, b * scale, place, row, sizes, tables, j, HALF, S0, S1, BACK_K, TURN)
        a, b = _product(of_scores, ka, None, PRECISION, ACC), _product(of_scores, kb, None, PRECISION, ACC)
        _store_halves(grad_q, a * scale, b * scale, place, row, sizes, tables, j, HALF, S0, S1, BACK_Q, TURN)


@triton.jit(do_not_specialize=_SIZES.split())
def self_attention_queries_backward_kernel(
    grad, q, k, v,  # all as of `self_attention_tile_backward_kernel`, where not said
    out,  # (N, rows, heads, hd), contiguous
    lse,
    delta,  # (N, heads, rows), written
    grad_q,
    sin0, sin1, sin2, cos0, cos1, cos2,
    rows, num_globals, n1, n2, heads,
    scale: tl.float64,
    grad_seq: tl.int64, grad_row: tl.int64, grad_head: tl.int64,
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64,
    v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    grads_row,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,  # rows of the tile that stays, and of those that pass
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BACK: tl.constexpr, TURN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: their gradients, and delta."""
    rows, num_globals, n1, n2, heads = scalars((rows, num_globals, n1, n2, heads), tl.int32)
    grad_seq, grad_row, grad_head, grads_row = scalars((grad_seq, grad_row, grad_head, grads_row), tl.int64)
    q_seq, q_row, q_head, k_seq, k_row = scalars((q_seq, q_row, q_head, k_seq, k_row), tl.int64)
    k_head, v_seq, v_row, v_head = scalars((k_head, v_seq, v_row, v_head), tl.int64)
    factor = tl.cast(tl.cast(scale, tl.float64) * LOG2E, ACC)  # as forward has it: weights are as close as they can be
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
    tables, sizes = (sin0, sin1, sin2, cos0, cos1, cos2), (rows, num_globals, n1, n2)
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK)
    h, n = (pid // tiles % heads).to(tl.int64), (pid // tiles // heads).to(tl.int64)
    row = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    q += (n * q_seq + h * q_head) * UNIT
    k += (n * k_seq + h * k_head) * UNIT
    v += (n * v_seq + h * v_head) * UNIT
    qa, qb = _pair(q, row * q_row * UNIT, ok, j, HALF)
    g = _whole(grad + (n * grad_seq + h * grad_head) * UNIT, row * grad_row * UNIT, ok, d, HALF)
    context = _whole(out, ((n * rows + row) * heads + h) * (2 * HALF), ok, d, HALF)
    along = tl.sum(g.to(ACC) * context.to(ACC), 1)
    per_row = (n * heads + h) * rows + row
    tl.store(delta + per_row, along, mask=ok)
    shift = tl.load(lse + per_row, mask=ok, other=0)
    a, b = tl.zeros([BLOCK, BLOCK_J], ACC), tl.zeros([BLOCK, BLOCK_J], ACC)
    for start in range(0, rows, STEP):
        key = start + tl.arange(0, STEP)
        there = key < rows
        ka, kb = _pair(k, key * k_row * UNIT, there, j, HALF)
        value = _whole(v, key * v_row * UNIT, there, d, HALF)
        weights = _weights(qa, qb, ka, kb, shift[:, None], there[None, :], factor, PRECISION, ACC)
        of_scores = (weights * (_product(g, value.T, None, PRECISION, ACC) - along[:, None])).to(g.dtype)
        a, b = _product(of_scores, ka, a, PRECISION, ACC), _product(of_scores, kb, b, PRECISION, ACC)
    place = (n * rows + row) * grads_row * UNIT + h * (2 * HALF)
    _store_halves(grad_q, a * scale, b * scale, place, row, sizes, tables, j, HALF, S0, S1, BACK, TURN)


@triton.jit
def _through_queries(
    grad, q, lse, delta, ka, kb, value, rows, q_row, grad_row, j, d, factor,
    UNIT: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    OF_K: tl.constexpr, OF_V: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys, in halves and not yet scaled, of its values, or of both."""
    a, b = tl.zeros([ka.shape[0], j.shape[0]], ACC), tl.zeros([ka.shape[0], j.shape[0]], ACC)
    of_v = tl.zeros([ka.shape[0], d.shape[0]], ACC)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        ok = row < rows
        qa, qb = _pair(q, row * q_row * UNIT, ok, j, HALF)
        g = _whole(grad, row * grad_row * UNIT, ok, d, HALF)
        shift = tl.load(lse + row.to(tl.int64), mask=ok, other=0)
        weights = _weights(ka, kb, qa, qb, shift[None, :], ok[None, :], factor, PRECISION, ACC)
        if OF_V:
            of_v = _product(weights.to(g.dtype), g, of_v, PRECISION, ACC)
        if OF_K:
            along = tl.load(delta + row.to(tl.int64), mask=ok, other=0)
            of_scores = (weights * (_product(value, g.T, None, PRECISION, ACC) - along[None, :])).to(g.dtype)
            a, b = _product(of_scores, qa, a, PRECISION, ACC), _product(of_scores, qb, b, PRECISION, ACC)
    return a, b, of_v


@triton.jit(do_not_specialize=_SIZES.split())
def self_attention_keys_backward_kernel(
    grad, q, k, v, lse, delta,  # all as of `self_attention_queries_backward_kernel`, where not said
    grad_q,  # where k is None all gradients, else not used
    grad_k, grad_v,
    sin0, sin1, sin2, cos0, cos1, cos2,
    rows, num_globals, n1, n2, heads,
    scale: tl.float64,
    grad_seq: tl.int64, grad_row: tl.int64, grad_head: tl.int64,
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64,
    v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    grads_row,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr,  # whether values wait for a second pass over the queries: fewer registers, a product more
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BACK: tl.constexpr, TURN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys: their gradients, and those of their values. Weights are transposed: (keys, queries)."""
    rows, num_globals, n1, n2, heads = scalars((rows, num_globals, n1, n2, heads), tl.int32)
    grad_seq, grad_row, grad_head, grads_row = scalars((grad_seq, grad_row, grad_head, grads_row), tl.int64)
    q_seq, q_row, q_head, k_seq, k_row = scalars((q_seq, q_row, q_head, k_seq, k_row), tl.int64)
    k_head, v_seq, v_row, v_head = scalars((k_head, v_seq, v_row, v_head), tl.int64)
    factor = tl.cast(tl.cast(scale, tl.float64) * LOG2E, ACC)  # as forward has it: weights are as close as they can be
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
        grad_k, grad_v = grad_q + heads.to(tl.int64) * (2 * HALF), grad_q + heads.to(tl.int64) * (4 * HALF)
    tables, sizes = (sin0, sin1, sin2, cos0, cos1, cos2), (rows, num_globals, n1, n2)
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK)
    h, n = (pid // tiles % heads).to(tl.int64), (pid // tiles // heads).to(tl.int64)
    row = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    grad += (n * grad_seq + h * grad_head) * UNIT
    q += (n * q_seq + h * q_head) * UNIT
    lse += (n * heads + h) * rows
    delta += (n * heads + h) * rows
    x = k + (n * k_seq + h * k_head) * UNIT
    ka, kb = _pair(x, row * k_row * UNIT, ok, j, HALF)
    value = _whole(v + (n * v_seq + h * v_head) * UNIT, row * v_row * UNIT, ok, d, HALF)
    place = (n * rows + row) * grads_row * UNIT + h * (2 * HALF)
    a, b, of_v = _through_queries(
        grad, q, lse, delta, ka, kb, value, rows, q_row, grad_row, j, d, factor,
        UNIT, STEP, HALF, ACC, PRECISION, True, not APART,
    )  # fmt: skip
    _store_halves(grad_k, a * scale, b * scale, place, row, sizes, tables, j, HALF, S0, S1, BACK, TURN)
    if APART:
        a, b, of_v = _through_queries(
            grad, q, lse, delta, ka, kb, value, rows, q_row, grad_row, j, d, factor,
            UNIT, STEP, HALF, ACC, PRECISION, False, True,
        )  # fmt: skip
    _store_whole(grad_v, of_v, place, ok, d, HALF)


def _unit(tensors: list[Tensor], head_dim: int) -> int:
    """The elements of 16 bytes where every head of every row starts at a multiple of so many, else 1."""
    vector = 16 // tensors[0].element_size()
    offsets = [head_dim, *[offset for t in tensors for offset in (t.storage_offset(), *t.stride()[:3])]]
    return vector if all([offset % vector == 0 for offset in offsets]) else 1


def _self_attention_backward(
    grad: Tensor,  # (N, rows, heads, hd), channels dense
    q: Tensor,  # (N, rows, heads, hd), channels dense; without k and v (N, rows, 3*heads, hd)
    k: Tensor | None,  # (N, rows, heads, hd), channels dense
    v: Tensor | None,  # like k
    out: Tensor,  # (N, rows, heads, hd), contiguous
    lse: Tensor,  # (N, heads, rows), contiguous: natural logarithms of the sums of exponentials
    scale: float,  # of scores
    num_globals: int,  # g
    grid: list[int],  # sizes of the axes; (L,) of a dense table
    sin: list[Tensor],  # per axis (n_i, s_i), dense; none where nothing turns
    cos: list[Tensor],  # like sin
    load: str,  # which of q and k are turned when they are loaded: "", "q", "qk"; beyond one tile none
    back: str,  # which gradients are turned back: "", "q", "qk"
    in_table_dtype: bool,
    precision: str,  # of products of float32: "ieee" or "tf32"
) -> list[Tensor]:  # gradients of q, k and v, or of the packed tensor, contiguous
    grads = fake_backward(grad, q, k, v)
    if not grads[0].numel():
        return grads
    sequences, rows, heads, head_dim = *grad.shape[:3], int(grad.shape[3])  # a number, also where torch traces sizes
    rows = int(rows) if load else rows  # how many there are decides what turns on load
    check_load(load, rows, head_dim, q.dtype, training=True)
    held = [q, q, q] if k is None or v is None else [q, k, v]
    unit = _unit([grad, *held], head_dim)
    acc = lse_dtype(q)
    table = sin[0].dtype if sin else q.dtype
    compute = table if in_table_dtype else torch.promote_types(q.dtype, table)
    sections = [int(t.shape[-1]) for t in sin] or [head_dim // 2]
    strides = [stride // unit for t in (grad, *held) for stride in t.stride()[:3]]
    settings = [rows, num_globals, *_padded(grid, 1)[1:], heads]
    last = [scale, *strides, grads[0].stride(1) // unit]
    tables = [*_padded(sin), *_padded(cos)]
    constants = dict(
        UNIT=unit, BLOCK_J=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), HALF=head_dim // 2, S0=sections[0], S1=sum(sections[1:2]),
        TURN=tl.float64 if torch.float64 in (compute, acc) else tl.float32, ACC=_TYPES[acc],
    )  # fmt: skip
    grad_q, grad_k, grad_v = _padded(grads)
    if one := one_tile(rows, q.dtype, head_dim, len(grid)):
        per_group = triton.cdiv(heads, triton.cdiv(heads, HEADS))
        programs = sequences * triton.cdiv(heads, per_group)
        _check(rows, heads, head_dim, programs)
        launch(
            self_attention_tile_backward_kernel if INTERPRETED else wrap_triton(self_attention_tile_backward_kernel),
            (programs,), q.device,
            grad, q, k, v, lse, grad_q, grad_k, grad_v, *tables, *settings, per_group, *last,
            BLOCK=one.block, LOAD_Q="q" in load, LOAD_K="k" in load, BACK_Q="q" in back, BACK_K="k" in back,
            COMPUTE=_TYPES[compute], PRECISION=one.precision or precision, **constants,
            num_warps=one.warps, num_stages=one.stages,
        )  # fmt: skip
        return grads
    delta = lse.new_empty(lse.shape)
    tiles = passes(q.dtype, head_dim, precision).queries
    programs = sequences * heads * triton.cdiv(rows, tiles.block)
    _check(rows, heads, head_dim, programs)
    launch(
        self_attention_queries_backward_kernel if INTERPRETED else wrap_triton(self_attention_queries_backward_kernel),
        (programs,), q.device,
        grad, q, k, v, out, lse, delta, grad_q, *tables, *settings, *last,
        BLOCK=tiles.block, STEP=tiles.step, BACK="q" in back, PRECISION=tiles.precision or precision, **constants,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tiles = passes(q.dtype, head_dim, precision).keys
    programs = sequences * heads * triton.cdiv(rows, tiles.block)
    _check(rows, heads, head_dim, programs)
    launch(
        self_attention_keys_backward_kernel if INTERPRETED else wrap_triton(self_attention_keys_backward_kernel),
        (programs,), q.device,
        grad, q, k, v, lse, delta, grad_q if k is None else None, grad_k, grad_v, *tables, *settings, *last,
        BLOCK=tiles.block, STEP=tiles.step, APART=tiles.apart, BACK="k" in back,
        PRECISION=tiles.precision or precision, **constants, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return grads


def _check(rows: int, heads: int, head_dim: int, programs: int) -> None:
    if rows > LIMIT or heads > LIMIT or programs > MAX_PROGRAMS or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"q is too large for backend 'triton': {rows} rows, {heads} heads, hd = {head_dim}, {programs} programs; "
            f"expected at most 2**30 rows, 2**30 heads, hd = {MAX_HEAD_DIM} and 2**31 - 1 programs"
        )


def _cost(
    grad: Tensor,  # all as of the operation
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *settings: Any,
) -> Cost:
    size = parts(q, k, v)[0].numel() * q.element_size()  # of one of them
    if not size:
        return Cost(0, 0, 0)
    rows, head_dim = grad.shape[1], grad.shape[3]
    if one_tile(rows, q.dtype, head_dim):
        return Cost(4 * size, 3 * size, launches=1)
    return Cost(9 * size, 3 * size, launches=2)  # out by the first alone


def _flops(grad: torch.Size, *others: Any, out_shape: Any) -> int:
    n, rows, heads, head_dim = grad
    return 10 * n * heads * rows**2 * head_dim  # of five products, as torch counts its own, be some computed twice


BACKWARD = register(
    _self_attention_backward, fake=fake_backward, cost=_cost, flops=_flops,
    backward=refused_again("self_attention_backward", "triton"),
)  # fmt: skip
