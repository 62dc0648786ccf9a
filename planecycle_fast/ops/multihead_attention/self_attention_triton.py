"""self_attention on NVIDIA GPUs: one launch of one of three Triton kernels. `self_attention_ref` says what it computes.

All take q, k and v as they lie, turn what they are told to when they load it, and write the context as the projection
wants it. Heads are read in halves, as they turn, and scores are the sum of two products.

- One tile, for few rows: a program has all rows of a sequence, makes sine and cosine once, and goes through heads.
- Short: a program has all keys of a sequence and head, turned once, in tiles of 64 and one that is less (256 + 5 are
  four and one of 16), and goes through tiles of queries.
- General: a program has a tile of queries and goes through tiles of keys, which have turned before, with an online
  softmax. A plain kernel of pointers was the fastest on an H100 (0.6258 ms against 0.8559 with tensor descriptors and
  warp specialisation at 261 rows, 1.3898 against 1.4884 at 1029).

Exponentials are powers of 2, of scores times `scale` times log2(e); the logarithms of sums are natural.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernels for its compile caches

from ..registration import INTERPRETED, launch, register
from ..registry import Cost
from ..rotary.rope_triton import _TYPES, _padded
from ..scalars_triton import scalars
from .self_attention_autograd import backward_by, call_of, setup_context
from .self_attention_backward_triton import BACKWARD, _check, _unit
from .self_attention_load import check_load
from .self_attention_shapes import fake, parts
from .self_attention_tiles import channel_tiles, tiles
from .self_attention_turning_triton import sincos, turned

LOG2_E = math.log2(math.e)


@triton.jit
def _tile(x, place, valid, c, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Rows at the offsets `place` (rows, 1), channels c of which there are SIZE; zeros beyond. WHOLE: all are there."""
    pointers = x + (place + c[None, :])
    if WHOLE and c.shape[0] == SIZE:
        t = tl.load(pointers)
    elif WHOLE:
        t = tl.load(pointers, mask=(c < SIZE)[None, :], other=0.0)
    else:
        t = tl.load(pointers, mask=valid[:, None] & (c < SIZE)[None, :], other=0.0)
    return t


@triton.jit
def _halves(
    x, place, row, rows, num_globals, j, sin, cos,
    HALF: tl.constexpr, TURN: tl.constexpr, WHOLE: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Both halves (rows, hd/2) of a head, turned by sine and cosine if they are to TURN."""
    a = _tile(x, place, row < rows, j, HALF, WHOLE)
    b = _tile(x, place + HALF, row < rows, j, HALF, WHOLE)
    if TURN:
        a, b = turned(a, b, sin, cos, COMPUTE, WIDE, row >= num_globals)
    return a, b


@triton.jit
def _turned_halves(
    x, row, x_row, rows, num_globals, n1, n2, j, sin0, sin1, sin2, cos0, cos1, cos2,
    UNIT: tl.constexpr, HALF: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, TURN: tl.constexpr,
    WHOLE: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same with sine and cosine of these rows."""
    sin, cos = None, None
    if TURN:
        sin, cos = sincos(sin0, sin1, sin2, cos0, cos1, cos2, row, rows, num_globals, n1, n2, j, HALF, S0, S1, WIDE)
    place = (row * x_row * UNIT)[:, None]
    return _halves(x, place, row, rows, num_globals, j, sin, cos, HALF, TURN, WHOLE, COMPUTE, WIDE)


@triton.jit
def _keys(
    k, v, start, k_row, v_row, rows, num_globals, n1, n2, j, c, sin0, sin1, sin2, cos0, cos1, cos2,
    UNIT: tl.constexpr, HD: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, TURN: tl.constexpr,
    WHOLE: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers, halves and values of the keys from `start` on; WHOLE: all of them are there."""
    within, HALF = tl.arange(0, BLOCK), tl.constexpr(HD // 2)
    key = start + within
    sin, cos = None, None
    if TURN:
        sin, cos = sincos(sin0, sin1, sin2, cos0, cos1, cos2, key, rows, num_globals, n1, n2, j, HALF, S0, S1, WIDE)
    place = (within * k_row * UNIT)[:, None]
    k += start * k_row * UNIT
    k1, k2 = _halves(k, place, key, rows, num_globals, j, sin, cos, HALF, TURN, WHOLE, COMPUTE, WIDE)
    place = (within * v_row * UNIT)[:, None]
    return key, k1, k2, _tile(v + start * v_row * UNIT, place, key < rows, c, HD, WHOLE)


@triton.jit
def _scores(q1, q2, k1, k2, key, rows, WHOLE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(queries, keys), minus infinity where there is no key."""
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION, out_dtype=ACC)
    s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION, out_dtype=ACC)
    if not WHOLE:
        s = tl.where((key < rows)[None, :], s, float("-inf"))
    return s


@triton.jit
def _started(q1, q2, tile, rows, scale, WHOLE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """A softmax with a first tile of keys: largest scores, in powers of 2, sums of exponentials, weighted values."""
    key, k1, k2, values = tile
    s = _scores(q1, q2, k1, k2, key, rows, WHOLE, ACC, PRECISION)
    top = tl.max(s, 1) * scale
    base = tl.where(top == float("-inf"), 0.0, top)  # of a row that has had nothing else
    p = tl.exp2(s * scale - base[:, None])
    return top, tl.sum(p, 1), tl.dot(p.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _continued(
    top, total, acc, q1, q2, tile, rows, scale, WHOLE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with one more tile."""
    key, k1, k2, values = tile
    s = _scores(q1, q2, k1, k2, key, rows, WHOLE, ACC, PRECISION)
    new = tl.maximum(top, tl.max(s, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    kept = tl.exp2(top - base)
    p = tl.exp2(s * scale - base[:, None])
    acc = tl.dot(p.to(values.dtype), values, acc * kept[:, None], input_precision=PRECISION, out_dtype=ACC)
    return new, total * kept + tl.sum(p, 1), acc


@triton.jit
def _store(out, lse, top, total, acc, head, row, rows, heads, c, HD: tl.constexpr):
    """Context of one head of a sequence, `head` counted over all sequences, and logarithms of sums."""
    n, h = head // heads, head % heads
    place = (n * rows + row) * heads + h
    pointers = out + ((place * HD)[:, None] + c[None, :])
    result = acc / total[:, None]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (c < HD)[None, :])
    if lse is not None:
        sums = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + (head * rows + row), sums, mask=row < rows)


_SIZES = "rows heads num_globals n1 n2 per_program q_seq q_row q_head k_seq k_row k_head v_seq v_row v_head scale"


@triton.jit(do_not_specialize=_SIZES.split())  # a new volume shape compiles nothing, but for the sizes of tiles
def self_attention_tile_kernel(
    q,  # (N, rows, heads, hd), channels dense; (N, rows, 3*heads, hd) where k and v are None
    k, v,  # (N, rows, heads, hd)
    out,  # (N, rows, heads, hd), contiguous
    lse,  # (N, heads, rows), or None
    sin0, sin1, sin2, cos0, cos1, cos2,  # tables of the axes, (n_i, s_i), dense; None where there are fewer
    rows, heads, num_globals, n1, n2,  # n1, n2: sizes of the last axes
    per_program,  # heads
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,  # strides, which count UNIT elements
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64, v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    scale: tl.float64,  # of scores, times log2(e)
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    LOAD: tl.constexpr,  # what turns: "", "q", "qk"
    HD: tl.constexpr,
    BLOCK_J: tl.constexpr,  # channels of half a head, and of a head, rounded up to powers of two
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr,  # sections of the first two axes
    COMPUTE: tl.constexpr,  # that torch turns in
    WIDE: tl.constexpr,  # that this kernel turns in
    ACC: tl.constexpr,  # of sums
    PRECISION: tl.constexpr,  # of products of float32
):  # fmt: skip
    rows, heads, num_globals, n1, n2 = scalars((rows, heads, num_globals, n1, n2), tl.int32)
    q_seq, q_row, q_head, k_seq, k_row, k_head = scalars((q_seq, q_row, q_head, k_seq, k_row, k_head), tl.int64)
    v_seq, v_row, v_head, per_program = scalars((v_seq, v_row, v_head, per_program), tl.int64)
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
    HALF: tl.constexpr = HD // 2
    TURN: tl.constexpr = LOAD != ""
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(heads, per_program)
    n, group = pid // groups, pid % groups
    row, j, c = tl.arange(0, QUERIES), tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_C)
    sin, cos = None, None
    if TURN:
        sin, cos = sincos(sin0, sin1, sin2, cos0, cos1, cos2, row, rows, num_globals, n1, n2, j, HALF, S0, S1, WIDE)
    wide = row[:, None]
    for h in range(group * per_program, tl.minimum((group + 1) * per_program, heads)):
        place = (n * q_seq + h * q_head + wide * q_row) * UNIT
        q1, q2 = _halves(q, place, row, rows, num_globals, j, sin, cos, HALF, TURN, False, COMPUTE, WIDE)
        place = (n * k_seq + h * k_head + wide * k_row) * UNIT
        k1, k2 = _halves(k, place, row, rows, num_globals, j, sin, cos, HALF, LOAD == "qk", False, COMPUTE, WIDE)
        values = _tile(v, (n * v_seq + h * v_head + wide * v_row) * UNIT, row < rows, c, HD, False)
        top, total, acc = _started(q1, q2, (row, k1, k2, values), rows, scale, False, ACC, PRECISION)
        _store(out, lse, top, total, acc, n * heads + h, row, rows, heads, c, HD)


@triton.jit(do_not_specialize=_SIZES.split())
def self_attention_short_kernel(
    q, k, v, out, lse, sin0, sin1, sin2, cos0, cos1, cos2,  # all of these as of the first kernel
    rows, heads, num_globals, n1, n2,
    per_program,  # 1
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64, v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    scale: tl.float64,
    UNIT: tl.constexpr,
    LOAD: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FULL: tl.constexpr,  # tiles of KEYS
    TAIL: tl.constexpr,  # keys of another one; 0: none
    S0: tl.constexpr, S1: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows, heads, num_globals, n1, n2 = scalars((rows, heads, num_globals, n1, n2), tl.int32)
    q_seq, q_row, q_head, k_seq, k_row, k_head = scalars((q_seq, q_row, q_head, k_seq, k_row, k_head), tl.int64)
    v_seq, v_row, v_head = scalars((v_seq, v_row, v_head), tl.int64)
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
    head = tl.program_id(0).to(tl.int64)  # counted over all sequences
    n, h = head // heads, head % heads
    q += (n * q_seq + h * q_head) * UNIT
    k += (n * k_seq + h * k_head) * UNIT
    v += (n * v_seq + h * v_head) * UNIT
    j, c = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_C)
    held = ()
    for i in tl.static_range(FULL):
        tile = _keys(
            k, v, i * KEYS, k_row, v_row, rows, num_globals, n1, n2, j, c, sin0, sin1, sin2, cos0, cos1, cos2,
            UNIT, HD, S0, S1, LOAD == "qk", True, COMPUTE, WIDE, KEYS,
        )  # fmt: skip
        held = held + (tile,)  # type: ignore[assignment]  # noqa: RUF005  (kernels have no stars)
    if TAIL > 0:
        tail = _keys(
            k, v, FULL * KEYS, k_row, v_row, rows, num_globals, n1, n2, j, c, sin0, sin1, sin2, cos0, cos1, cos2,
            UNIT, HD, S0, S1, LOAD == "qk", False, COMPUTE, WIDE, TAIL,
        )  # fmt: skip
    for start in range(0, rows, QUERIES):
        row = start + tl.arange(0, QUERIES)
        q1, q2 = _turned_halves(
            q, row, q_row, rows, num_globals, n1, n2, j, sin0, sin1, sin2, cos0, cos1, cos2,
            UNIT, HD // 2, S0, S1, LOAD != "", False, COMPUTE, WIDE,
        )  # fmt: skip
        top, total, acc = _started(q1, q2, held[0], rows, scale, True, ACC, PRECISION)  # type: ignore[misc]
        for i in tl.static_range(1, FULL):
            top, total, acc = _continued(top, total, acc, q1, q2, held[i], rows, scale, True, ACC, PRECISION)
        if TAIL > 0:
            top, total, acc = _continued(top, total, acc, q1, q2, tail, rows, scale, False, ACC, PRECISION)
        _store(out, lse, top, total, acc, head, row, rows, heads, c, HD)


@triton.jit(do_not_specialize=_SIZES.split())
def self_attention_kernel(
    q, k, v, out, lse, sin0, sin1, sin2, cos0, cos1, cos2,  # all of these as of the first kernel
    rows, heads, num_globals, n1, n2,
    per_program,  # 1
    q_seq: tl.int64, q_row: tl.int64, q_head: tl.int64,
    k_seq: tl.int64, k_row: tl.int64, k_head: tl.int64, v_seq: tl.int64, v_row: tl.int64, v_head: tl.int64,
    scale: tl.float64,
    UNIT: tl.constexpr,
    LOAD: tl.constexpr,  # "", "q"
    HD: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows, heads, num_globals, n1, n2 = scalars((rows, heads, num_globals, n1, n2), tl.int32)
    q_seq, q_row, q_head, k_seq, k_row, k_head = scalars((q_seq, q_row, q_head, k_seq, k_row, k_head), tl.int64)
    v_seq, v_row, v_head = scalars((v_seq, v_row, v_head), tl.int64)
    scale = tl.cast(scale, ACC)
    if k is None:
        k, v = q + heads * q_head * UNIT, q + 2 * heads * q_head * UNIT
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, QUERIES)
    head = (pid // blocks).to(tl.int64)  # counted over all sequences
    n, h = head // heads, head % heads
    q += (n * q_seq + h * q_head) * UNIT
    k += (n * k_seq + h * k_head) * UNIT
    v += (n * v_seq + h * v_head) * UNIT
    j, c = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_C)
    row = pid % blocks * QUERIES + tl.arange(0, QUERIES)
    q1, q2 = _turned_halves(
        q, row, q_row, rows, num_globals, n1, n2, j, sin0, sin1, sin2, cos0, cos1, cos2,
        UNIT, HD // 2, S0, S1, LOAD != "", False, COMPUTE, WIDE,
    )  # fmt: skip
    top = tl.full([QUERIES], float("-inf"), ACC)
    total = tl.zeros([QUERIES], ACC)
    acc = tl.zeros([QUERIES, BLOCK_C], ACC)
    whole = rows // KEYS * KEYS
    for start in range(0, whole, KEYS):
        tile = _keys(
            k, v, start, k_row, v_row, rows, num_globals, n1, n2, j, c, sin0, sin1, sin2, cos0, cos1, cos2,
            UNIT, HD, S0, S1, False, True, COMPUTE, WIDE, KEYS,
        )  # fmt: skip
        top, total, acc = _continued(top, total, acc, q1, q2, tile, rows, scale, True, ACC, PRECISION)
    if whole < rows:  # a tile that is masked, which the others pay nothing for
        tile = _keys(
            k, v, whole, k_row, v_row, rows, num_globals, n1, n2, j, c, sin0, sin1, sin2, cos0, cos1, cos2,
            UNIT, HD, S0, S1, False, False, COMPUTE, WIDE, KEYS,
        )  # fmt: skip
        top, total, acc = _continued(top, total, acc, q1, q2, tile, rows, scale, False, ACC, PRECISION)
    _store(out, lse, top, total, acc, head, row, rows, heads, c, HD)


def _self_attention(
    q: Tensor,  # (N, rows, heads, hd), channels dense, as in k and v; packed without these: (N, rows, 3*heads, hd)
    k: Tensor | None,  # (N, rows, heads, hd)
    v: Tensor | None,  # like k
    scale: float,  # of scores
    num_globals: int,  # g
    grid: list[int],  # sizes of the axes; (L,) of a dense table, empty where nothing turns
    sin: list[Tensor],  # per axis (n_i, s_i), contiguous
    cos: list[Tensor],  # like sin
    load: str,  # what turns when it is loaded: "", "q", "qk"
    in_table_dtype: bool,
    keep: bool,  # whether to write logarithms of sums
    precision: str,  # of products of float32: "tf32", "tf32x3", "ieee"
) -> tuple[Tensor, Tensor]:  # out (N, rows, heads, hd); lse (N, heads, rows), or (0,)
    out, lse = fake(q, k, v, scale, num_globals, grid, sin, cos, load, in_table_dtype, keep, precision)
    if out.numel() == 0:
        return out, lse
    n, rows, heads, head_dim = *out.shape[:3], int(out.shape[3])  # a number, also where torch traces sizes
    rows = int(rows) if load else rows  # how many there are decides what turns on load
    check_load(load, rows, head_dim, q.dtype, keep)
    chosen = tiles(rows, head_dim, q.dtype, precision)
    programs = n * triton.cdiv(heads, chosen.heads)
    if chosen.regime == "general":
        programs *= triton.cdiv(rows, chosen.queries)
    _check(rows, heads, head_dim, programs)
    held = [q, q, q] if k is None or v is None else [q, k, v]
    unit = _unit(held, head_dim)
    strides = [stride // unit for t in held for stride in t.stride()[:3]]
    sections = [int(t.shape[1]) for t in sin]
    block_j, block_c = channel_tiles(head_dim)
    compute = q.dtype
    if sin:
        compute = sin[0].dtype if in_table_dtype else torch.promote_types(q.dtype, sin[0].dtype)
    short = dict(FULL=chosen.full, TAIL=chosen.tail) if chosen.regime == "short" else {}
    kernel: Any = self_attention_kernel if INTERPRETED else wrap_triton(self_attention_kernel)
    if chosen.regime == "tile":
        kernel = self_attention_tile_kernel if INTERPRETED else wrap_triton(self_attention_tile_kernel)
    elif chosen.regime == "short":
        kernel = self_attention_short_kernel if INTERPRETED else wrap_triton(self_attention_short_kernel)
    launch(
        kernel, (programs,), q.device,
        q, k, v, out, lse if keep else None, *_padded(sin), *_padded(cos), rows, heads, num_globals,
        *_padded(grid, 1)[1:], chosen.heads, *strides, scale * LOG2_E,
        UNIT=unit, LOAD=load, HD=head_dim, BLOCK_J=block_j, BLOCK_C=block_c, QUERIES=chosen.queries, KEYS=chosen.keys,
        S0=sum(sections[:1]), S1=sum(sections[1:2]), COMPUTE=_TYPES[compute], WIDE=_wide(compute), ACC=_wide(q.dtype),
        PRECISION=chosen.precision or precision, num_warps=chosen.warps, num_stages=chosen.stages, **short,
    )  # fmt: skip
    return out, lse


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _cost(q: Tensor, k: Tensor | None, v: Tensor | None, *settings: Any) -> Cost:
    one = parts(q, k, v)[0]
    if one.numel() == 0:
        return Cost(0, 0, 0)
    size = one.numel() * one.element_size()
    return Cost(3 * size, size, launches=1)


def _flops(q: torch.Size, k: torch.Size | None, v: torch.Size | None, *settings: Any, out_shape: Any) -> int:
    n, rows, heads, head_dim = out_shape[0]
    return 4 * n * heads * rows**2 * head_dim  # scores, and weighted values


OP = register(
    _self_attention, fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD), cost=_cost, flops=_flops
)  # fmt: skip

self_attention_triton = call_of(OP, "triton")
