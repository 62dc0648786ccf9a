"""rope on NVIDIA GPUs: one Triton kernel, one launch. `rope_ref` says what it computes.

A program takes BLOCK_R rows, counted over all sequences, and a few heads. It makes sine and cosine of its rows once:
reads them from tables, or makes the angles from sizes and periods, rounding after every step as torch's operations do
where coordinates, periods or tables are of 16 bits. Rows of globals are copied.

Turning by the negative angles is the transpose of turning: backward is the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernel for its compile caches

from ..registration import INTERPRETED, launch, register
from ..registry import Cost, linear
from ..scalars_triton import scalars
from ..tiles import LIMIT, MAX_PROGRAMS
from .angles import Axial, Tables
from .rope_autograd import Turning, adjoint, vmap_by

HEADS = 8  # of a program at most: enough to share sine and cosine, few enough for many programs
MAX_HEAD_DIM = 1024
THREADS = 128  # of a program
_TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}  # fmt: skip


@triton.jit
def _rounded(v, DTYPE: tl.constexpr):  # to another dtype, and back to the one that is computed in
    return v.to(DTYPE).to(v.dtype)


@triton.jit
def _halves(v):
    """A float32 as two of 12 bits each, whose products are exact."""
    high = (v.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, v - high


@triton.jit
def _divide(a, b):
    """Rounded to nearest, which float32's `/` is not on a GPU; `tl.div_rn` calls a function, around which it spills."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:  # one step of Newton with the exact remainder, with or without fma
        inverse = 1.0 / b
        quotient = a * inverse
        q1, q0 = _halves(quotient)
        b1, b0 = _halves(b)
        quotient += (a - q1 * b1 - q1 * b0 - q0 * b1 - q0 * b0) * inverse
    return quotient


@triton.jit
def _sincos(x, WIDE: tl.constexpr):
    """Sine and cosine, off by about an ulp: triton's own take large angles through local memory.

    x minus the nearest multiple n of pi/2, of which the parts have so few bits that products with n are exact, with
    or without fma: up to 4096 in float32, 2^20 in float64 (constants of fdlibm). Then polynomials on +-pi/4.
    """
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    if WIDE == tl.float64:  # noqa: SIM300  (a constexpr compares from the left only)
        r = x - n * 1.57079632673412561417e00
        r = r - n * 6.07710050630396597660e-11
        r = r - n * 2.02226624879595063154e-21
        z = r * r
        s = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
        s = -1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * s)
        s = -1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * s)
        c = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
        c = 2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * c)
        c = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * c)
    else:
        r = x - n * 1.57080078125
        r = r - n * -4.453584551811218e-06
        r = r - n * -8.705515752716053e-10
        z = r * r
        s = -1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4)
        c = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    s = r + r * z * s
    c = 1 - z * 0.5 + z * z * c
    quadrant = n.to(tl.int32)
    odd = quadrant & 1 != 0
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where(quadrant & 2 != 0, -sin, sin), tl.where((quadrant + 1) & 2 != 0, -cos, cos)


@triton.jit
def _turns(
    i, n, n0, n1, n2, shift, jitter, rescale,
    AXIS: tl.constexpr, AXES: tl.constexpr, NORMALIZE: tl.constexpr, COORDINATE: tl.constexpr, PROMOTED: tl.constexpr,
):  # fmt: skip
    """2*pi times the coordinates of indices i on an axis of length n: `rope.coordinates`, augmented.

    Divided as torch does on a CPU. On a GPU it multiplies by 1/n, which may be an ulp off.
    """
    WIDE: tl.constexpr = tl.float64 if COORDINATE == tl.float64 else tl.float32  # noqa: SIM300
    if NORMALIZE == "min":
        n = tl.minimum(tl.minimum(n0, n1), n2) if AXES == 3 else tl.minimum(n0, n1)
    elif NORMALIZE == "max":
        n = tl.maximum(tl.maximum(n0, n1), n2) if AXES == 3 else tl.maximum(n0, n1)
    c = _rounded(i.to(WIDE) + 0.5, COORDINATE)
    c = _rounded(_divide(c, n.to(WIDE)), COORDINATE)
    c = _rounded(2 * c - 1, COORDINATE)
    axis = tl.full([], AXIS, tl.int64)
    if shift is not None:
        c = _rounded(c + tl.load(shift + axis).to(WIDE), COORDINATE)
    if jitter is not None:
        c = _rounded(c * tl.load(jitter + axis).to(WIDE), COORDINATE)
    if rescale is not None:
        c = _rounded(c * tl.load(rescale).to(WIDE), COORDINATE)
    c = c.to(tl.float64 if PROMOTED == tl.float64 else tl.float32)  # noqa: SIM300
    return _rounded(c * 6.283185307179586, PROMOTED)


@triton.jit
def _section(t0, t1, t2, row0, row1, row2, j, S0: tl.constexpr, S1: tl.constexpr, HALF: tl.constexpr):
    """Element j of one row per axis put side by side; the rows of a table are given by their offsets."""
    c = j.to(tl.int64)
    v = tl.load(t0 + (row0 + c), mask=j < S0, other=1)
    if t1 is not None:
        v = tl.where(j < S0, v, tl.load(t1 + (row1 + (c - S0)), mask=(j >= S0) & (j < S0 + S1), other=1))
    if t2 is not None:
        v = tl.where(j < S0 + S1, v, tl.load(t2 + (row2 + (c - S0 - S1)), mask=(j >= S0 + S1) & (j < HALF), other=1))
    return v


_SIZES = "count rows num_globals heads turned per_group n0 n1 n2 x_seq x_row x_head out_seq out_row out_head t0 t1 t2"


@triton.jit(do_not_specialize=[*_SIZES.split(), "sign"])  # a new volume shape compiles nothing
def rope_kernel(
    x,  # (N, g + L, heads, hd), any strides
    out,  # like x, contiguous; x itself in place
    sin0, sin1, sin2, cos0, cos1, cos2,  # tables of the axes, (n_i, s_i); None where there are periods
    period0, period1, period2,  # of the axes, (s_i,); None where there are tables
    shift, jitter, rescale,  # augmentation of coordinates: (axes,), (axes,), (1,), or None
    count, rows, num_globals,  # rows in all, of a sequence, g
    heads, turned, per_group,  # those that programs see; how many turn; of one program
    n0, n1, n2,  # sizes of the axes, slowest first; 1 where there are fewer
    x_seq: tl.int64, x_row: tl.int64, x_head: tl.int64,  # strides; those of x and out count UNIT elements
    x_channel,  # in elements; specialised, so that 1 is a constant
    out_seq: tl.int64, out_row: tl.int64, out_head: tl.int64, out_channel,
    t0: tl.int64, t1: tl.int64, t2: tl.int64,  # strides of the tables' rows, which count T_UNIT elements
    sign,  # -1 to turn back
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    T_UNIT: tl.constexpr,  # the same for tables
    BLOCK_R: tl.constexpr,  # rows of a tile
    BLOCK_J: tl.constexpr,  # channels of half a head, rounded up to a power of two
    HALF: tl.constexpr,  # hd/2
    S0: tl.constexpr, S1: tl.constexpr,  # sections of the first two axes
    AXES: tl.constexpr,
    NORMALIZE: tl.constexpr,  # of coordinates; "" where there are tables
    INVERSE: tl.constexpr,  # periods are 1/period
    COORDINATE: tl.constexpr,  # dtype of coordinates
    PROMOTED: tl.constexpr,  # of 2*pi times them
    ANGLE: tl.constexpr,  # of angles and of their sine and cosine
    TABLE: tl.constexpr,  # of tables
    COMPUTE: tl.constexpr,  # that torch turns in
    ACC: tl.constexpr,  # that this kernel turns in
    SKIP: tl.constexpr,  # leave globals as they are
):  # fmt: skip
    count, rows, num_globals, n0, n1, n2 = scalars((count, rows, num_globals, n0, n1, n2), tl.int32)
    heads, turned, per_group, sign = scalars((heads, turned, per_group, sign), tl.int32)
    x_seq, x_row, x_head, x_channel = scalars((x_seq, x_row, x_head, x_channel), tl.int64)
    out_seq, out_row, out_head, out_channel = scalars((out_seq, out_row, out_head, out_channel), tl.int64)
    t0, t1, t2 = scalars((t0, t1, t2), tl.int64)
    pid = tl.program_id(0)
    groups = tl.cdiv(heads, per_group)
    group, tile = pid % groups, pid // groups
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    row = r % rows
    j = tl.arange(0, BLOCK_J)[None, :]
    token = tl.maximum(row - num_globals, 0)
    i0, i1, i2 = token, token * 0, token * 0
    if AXES == 2:
        i0, i1 = token // n1, token % n1
    elif AXES == 3:
        i0, i1, i2 = token // (n1 * n2), token // n2 % n1, token % n2
    if NORMALIZE == "":
        row0, row1, row2 = (i0 * t0 * T_UNIT)[:, None], (i1 * t1 * T_UNIT)[:, None], (i2 * t2 * T_UNIT)[:, None]
        sin = _section(sin0, sin1, sin2, row0, row1, row2, j, S0, S1, HALF)
        cos = _section(cos0, cos1, cos2, row0, row1, row2, j, S0, S1, HALF)
    else:
        WIDE: tl.constexpr = tl.float64 if ANGLE == tl.float64 else tl.float32  # noqa: SIM300
        angle = _turns(
            i0, n0, n0, n1, n2, shift, jitter, rescale, 0, AXES, NORMALIZE, COORDINATE, PROMOTED
        )[:, None].to(WIDE)  # fmt: skip
        turns = _turns(i1, n1, n0, n1, n2, shift, jitter, rescale, 1, AXES, NORMALIZE, COORDINATE, PROMOTED)
        angle = tl.where(j < S0, angle, turns[:, None].to(WIDE))
        if AXES == 3:
            turns = _turns(i2, n2, n0, n1, n2, shift, jitter, rescale, 2, AXES, NORMALIZE, COORDINATE, PROMOTED)
            angle = tl.where(j < S0 + S1, angle, turns[:, None].to(WIDE))
        period = _section(period0, period1, period2, 0, 0, 0, j, S0, S1, HALF).to(WIDE)
        if INVERSE:
            angle = tl.fma(angle, period, 0.0)  # a product that no later sum is fused with
        else:
            angle = _divide(angle, period)
        sin, cos = _sincos(_rounded(angle, ANGLE), WIDE)
        sin, cos = _rounded(_rounded(sin, ANGLE), TABLE), _rounded(_rounded(cos, ANGLE), TABLE)
    sin, cos = sin.to(ACC) * sign, cos.to(ACC)

    n = r // rows
    patch = (row >= num_globals)[:, None]
    mask = (r < count)[:, None] & (j < HALF)
    mask = mask & patch if SKIP else mask
    source = x + (((n * x_seq + row * x_row) * UNIT)[:, None] + j.to(tl.int64) * x_channel)
    target = out + (((n * out_seq + row * out_row) * UNIT)[:, None] + j.to(tl.int64) * out_channel)
    x_half, out_half = tl.full([], HALF, tl.int64) * x_channel, tl.full([], HALF, tl.int64) * out_channel
    for h in range(group * per_group, tl.minimum((group + 1) * per_group, heads)):
        a = tl.load(source + h * x_head * UNIT, mask=mask)
        b = tl.load(source + (h * x_head * UNIT + x_half), mask=mask)
        p, q = _rounded(a.to(ACC), COMPUTE), _rounded(b.to(ACC), COMPUTE)
        p, q = tl.where(patch, p * cos - q * sin, p), tl.where(patch, q * cos + p * sin, q)
        p, q = _rounded(p, COMPUTE).to(a.dtype), _rounded(q, COMPUTE).to(b.dtype)
        tl.store(target + h * out_head * UNIT, tl.where(h < turned, p, a), mask=mask)
        tl.store(target + (h * out_head * UNIT + out_half), tl.where(h < turned, q, b), mask=mask)


def _run(
    kernel: Any,
    x: Tensor,  # (N, g + L, heads, hd), any strides
    out: Tensor,  # like x, contiguous; x itself in place
    back: bool,
    num_globals: int,
    turned: int,
    in_table_dtype: bool,
    grid: list[int],
    sin: list[Tensor],  # per axis (n_i, s_i)
    cos: list[Tensor],  # like sin
    periods: list[Tensor],  # per axis (s_i,)
    augmentation: list[Tensor | None],  # shift, jitter (axes,), rescale (1,)
    normalize: str,
    inverse: bool,
    promote: bool,
    coord_dtype: torch.dtype,
    table_dtype: torch.dtype,
) -> None:
    sequences, rows, heads, head_dim = *x.shape[:3], int(x.shape[3])  # a number, also where torch traces sizes
    half, count, inplace = head_dim // 2, sequences * rows, out is x
    heads = turned if inplace else heads
    compute = table_dtype if in_table_dtype else torch.promote_types(x.dtype, table_dtype)
    angle = torch.promote_types(coord_dtype, periods[0].dtype) if periods else table_dtype
    sections = [int(t.shape[-1]) for t in (sin or periods)]
    unit = _unit(x, [*x.stride()[:3], head_dim]) if x.stride(3) == 1 else 1
    t_unit = min([_unit(t, [t.stride(0), t.shape[1]]) for t in [*sin, *cos]], default=1)
    block_j = triton.next_power_of_2(half)
    block_r = max(1, THREADS * 16 // x.element_size() // block_j)  # a thread has 16 bytes of half a head
    per_group = triton.cdiv(heads, triton.cdiv(heads, HEADS))
    programs = triton.cdiv(count, block_r) * triton.cdiv(heads, per_group)
    if count > LIMIT or heads > LIMIT or programs > MAX_PROGRAMS or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"x is too large for backend 'triton': {count} rows, {heads} heads, hd = {head_dim}, {programs} programs; "
            f"expected at most 2**30 rows, 2**30 heads, hd = {MAX_HEAD_DIM} and 2**31 - 1 programs"
        )
    launch(
        kernel, (programs,), x.device,
        x, out, *_padded(sin), *_padded(cos), *_padded(periods), *_padded(augmentation),
        count, rows, num_globals, heads, turned, per_group, *_padded(grid, 1),
        *[stride // unit for stride in x.stride()[:3]], x.stride(3),
        *[stride // unit for stride in out.stride()[:3]], out.stride(3),
        *_padded([t.stride(0) // t_unit for t in sin], 0), -1 if back else 1,
        UNIT=unit, T_UNIT=t_unit, BLOCK_R=block_r, BLOCK_J=block_j, HALF=half, S0=sections[0], S1=sum(sections[1:2]),
        AXES=len(sections), NORMALIZE=normalize, INVERSE=inverse, COORDINATE=_TYPES[coord_dtype],
        PROMOTED=_TYPES[angle if promote and not inverse else coord_dtype], ANGLE=_TYPES[angle],
        TABLE=_TYPES[table_dtype], COMPUTE=_TYPES[compute], ACC=tl.float64 if compute == torch.float64 else tl.float32,
        SKIP=inplace and keeps_globals(x.dtype, in_table_dtype, table_dtype), num_warps=THREADS // 32,
    )  # fmt: skip


def keeps_globals(dtype: torch.dtype, in_table_dtype: bool, table_dtype: torch.dtype) -> bool:
    """Whether globals stay as they are: not where `rope_ref` computes in a dtype narrower than that of x."""
    return not in_table_dtype or torch.promote_types(table_dtype, dtype) == table_dtype


def _unit(t: Tensor, offsets: list[int]) -> int:
    """The elements of 16 bytes where rows at any multiple of `offsets` start at a multiple of so many, else 1."""
    vector = 16 // t.element_size()
    return vector if all([offset % vector == 0 for offset in (t.storage_offset(), *offsets)]) else 1


def _padded(values: list[Any], filling: Any = None) -> list[Any]:
    """Three of them, one per axis or kind of augmentation."""
    return [*values, *[filling] * (3 - len(values))]


def _rope(
    x: Tensor,  # (N, g + L, heads, hd), any strides
    back: bool,  # whether to turn by the negative angles
    num_globals: int,  # g
    turned: int,  # heads, the first ones
    in_table_dtype: bool,
    grid: list[int],  # sizes of the axes; (L,) of a dense table
    sin: list[Tensor],  # per axis (n_i, s_i), channels dense; none where there are periods
    cos: list[Tensor],  # like sin, also in strides
    periods: list[Tensor],  # per axis (s_i,), dense; none where there are tables
    augmentation: list[Tensor | None],  # shift, jitter (axes,), rescale (1,), dense; or empty
    normalize: str,  # of coordinates; "" where there are tables
    inverse: bool,  # whether periods are 1/period
    promote: bool,  # coordinates to wider periods before they are multiplied by 2*pi
    coord_dtype: torch.dtype,
    table_dtype: torch.dtype,
) -> Tensor:  # like x, contiguous
    out = x.new_empty(x.shape)
    if x.numel():
        kernel = rope_kernel if INTERPRETED else wrap_triton(rope_kernel)
        _run(
            kernel, x, out, back, num_globals, turned, in_table_dtype, grid, sin, cos, periods, augmentation,
            normalize, inverse, promote, coord_dtype, table_dtype,
        )  # fmt: skip
    return out


def _rope_(
    x: Tensor,  # (N, g + L, heads, hd), any strides; written to
    back: bool,
    num_globals: int,
    turned: int,
    in_table_dtype: bool,
    grid: list[int],
    sin: list[Tensor],  # all of these as in `_rope`
    cos: list[Tensor],
    periods: list[Tensor],
    augmentation: list[Tensor | None],
    normalize: str,
    inverse: bool,
    promote: bool,
    coord_dtype: torch.dtype,
    table_dtype: torch.dtype,
) -> None:
    """`_rope` in place: globals, unless they are rounded, and heads that do not turn are neither read nor written."""
    if x.numel() and turned:
        kernel = rope_kernel if INTERPRETED else wrap_triton(rope_kernel)
        _run(
            kernel, x, x, back, num_globals, turned, in_table_dtype, grid, sin, cos, periods, augmentation,
            normalize, inverse, promote, coord_dtype, table_dtype,
        )  # fmt: skip


def _cost(x: Tensor, *_: object) -> Cost:
    return Cost(x.nbytes, x.nbytes, launches=1 if x.numel() else 0)


def _cost_in_place(x: Tensor, back: bool, num_globals: int, turned: int, in_table_dtype: bool, *rest: Any) -> Cost:
    rows = x.shape[1] - (num_globals if keeps_globals(x.dtype, in_table_dtype, rest[-1]) else 0)
    moved = x.shape[0] * rows * turned * x.shape[3] * x.element_size()
    return Cost(moved, moved, launches=1 if x.numel() and turned else 0)


OP, _turn = linear(register, _rope, adjoint, vmap_by("triton"), fake=lambda x, *_: x.new_empty(x.shape), cost=_cost)
IN_PLACE = register(_rope_, fake=lambda x, *_: None, mutates=("x",), cost=_cost_in_place)


def arguments_of(
    x: Tensor, angles: Tables | Axial, num_globals: int, turned: int | None, in_table_dtype: bool
) -> tuple[Any, ...]:
    """What the operations take after x."""
    turned = x.shape[2] if turned is None else turned
    if isinstance(angles, Axial) and angles.rope.narrows:  # kernels know wider periods only
        angles = angles.tables()
    if isinstance(angles, Tables):
        sin, cos = [[t if t.stride() == (t.stride(0), 1) else t.contiguous() for t in ts] for ts in angles]
        if [t.stride() for t in sin] != [t.stride() for t in cos]:
            sin, cos = [[t.contiguous() for t in ts] for ts in (sin, cos)]
        dtype = sin[0].dtype
        rest: tuple[Any, ...] = [t.shape[0] for t in sin], sin, cos, [], [], "", False, False, dtype, dtype
    else:
        rope, augmentation = angles.rope, angles.augmentation
        periods = [p.contiguous() for p in angles.periods or rope.axis_periods(len(angles.grid))]
        drawn = [] if augmentation is None else [augmentation.shift, augmentation.jitter, augmentation.rescale]
        drawn = [t if t is None else t.contiguous() for t in drawn]
        table_dtype = rope.table_dtype or torch.promote_types(rope.coord_dtype, rope.periods.dtype)
        settings = (rope.normalize, rope.periods_are_inverse, rope.promote_coords, rope.coord_dtype, table_dtype)
        rest = list(angles.grid), [], [], periods, drawn, *settings
    return False, num_globals, turned, in_table_dtype, *rest


rope_triton = Turning("triton", arguments_of, _turn, IN_PLACE)
