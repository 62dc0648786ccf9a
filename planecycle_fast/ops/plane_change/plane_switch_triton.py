"""plane_switch on NVIDIA GPUs: one Triton kernel, one launch, no copies. `plane_switch_ref` says what it computes.

Patches. The old row of each new patch row is an affine function of its coordinates (i0, i1, i2) along the new
plane's axes (`planes.row_map`), so a program that holds BLOCK_R rows of one (i1, i2) grid decodes its place once.

Globals. M of `pooling.Transition` is never stored. A row of it averages a few consecutive slices, and an element
has a closed form, A(via -> num_next) @ A(num_prev -> via) with overlapping bins:

    M[i, p] = 1/|bin(i)| * sum of 1/|bin(d)| over the d in `via` that row i averages and that average column p

PCm's rows are all that of num_next = 1, whose bin is all of `via`, so one program reduces once per volume and
token and writes every slice.

Backward is the same kernel from new to old with M transposed: M[i, p] by p instead of by i. No atomics: every
output row is written by one program, and its sums run in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernel for its compile caches

from ...geometry.planes import PLANES, row_map
from ..registration import INTERPRETED, launch, register
from ..registry import Cost, linear, more_volumes
from ..scalars_triton import scalars
from .plane_switch_shapes import Shapes, _check_limits, adjoint, call_of, fake

BLOCK_G = 8  # global tokens of a tile


@triton.jit
def _divide(a, b, ACC: tl.constexpr):  # rounded to nearest: fp32's `/` is not, on a GPU
    if ACC == tl.float64:  # noqa: SIM300  (a constexpr compares from the left only)
        quotient = a.to(ACC) / b.to(ACC)
    else:
        quotient = tl.div_rn(a.to(ACC), b.to(ACC))
    return quotient


@triton.jit
def _bin_size(i, n, m):  # of row i of A(n -> m)
    return tl.cdiv((i + 1) * n, m) - i * n // m


@triton.jit
def _share(i, p, num_next, num_prev, via, ACC: tl.constexpr):  # M[i, p] * |bin(i)|, one element or a block of them
    first = tl.maximum(i * via // num_next, p * via // num_prev)
    end = tl.minimum(tl.cdiv((i + 1) * via, num_next), tl.cdiv((p + 1) * via, num_prev))
    total = (first * 0).to(ACC)
    for k in range(tl.cdiv(via, tl.maximum(num_next, num_prev)) + 1):  # no overlap of bins is longer
        d = first + k
        total += tl.where(d < end, _divide(d * 0 + 1, _bin_size(d, num_prev, via), ACC), 0)
    return total


@triton.jit
def _last_divisor(size, via, num_prev):
    """What of a bin's size divides the sum, after it; weights take the rest.

    One step has equal weights, so dividing last rounds like a mean (fp32's `/` on a GPU: to 2 ulp; `_divide` on a
    whole tile spills). Of two steps, M = 1 must come out as exactly 1.
    """
    return tl.where(via == num_prev, size, 1)


@triton.jit
def _patches(
    x, out, job, c, channels, num_globals, n0, n1, n2, x_batch, x_row, x_0, x_1, x_2, x_channel, out_batch, out_0,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of the plane i0 of volume b."""
    tiles = tl.cdiv(n1 * n2, BLOCK_R)
    tile, job = job % tiles, job // tiles
    i0, b = job % n0, job // n0
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    i1, i2 = row // n2, row % n2
    source = b * x_batch + num_globals * x_row + i0 * x_0 + i1 * x_1 + i2 * x_2
    target = b * out_batch + i0 * out_0 + (num_globals + row).to(tl.int64) * channels
    mask = (row < n1 * n2)[:, None] & (c < channels * UNIT)[None, :]
    tile_of_x = tl.load(x + (source * UNIT)[:, None] + (c * x_channel)[None, :], mask=mask)
    tl.store(out + (target * UNIT)[:, None] + c[None, :], tile_of_x, mask=mask)


@triton.jit
def _bands(
    x, out, job, c, channels, num_globals, x_batch, x_seq, x_row, x_channel, out_batch, out_seq, num_in, num_out, via,
    UNIT: tl.constexpr, BLOCK_G: tl.constexpr, TRANSPOSED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_G tokens of slice o of volume b: weighted sums over a band of slices."""
    tiles = tl.cdiv(num_globals, BLOCK_G)
    tile, job = job % tiles, job // tiles
    o, b = job % num_out, job // num_out
    token = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    source = b * x_batch + token * x_row
    target = b * out_batch + o * out_seq + token.to(tl.int64) * channels
    mask = (token < num_globals)[:, None] & (c < channels * UNIT)[None, :]
    first = (o * via // num_out) * num_in // via
    end = tl.cdiv(tl.cdiv((o + 1) * via, num_out) * num_in, via)
    size = _bin_size(o, via, num_out)
    last = _last_divisor(size, via, num_in)
    total = tl.zeros([BLOCK_G, c.shape[0]], ACC)
    for k in range(first, end):
        if TRANSPOSED:
            weight = _divide(_share(k, o, num_in, num_out, via, ACC), _bin_size(k, via, num_in), ACC)
        else:
            weight = _divide(_share(o, k, num_out, num_in, via, ACC), size // last, ACC)
        rows = (source + k * x_seq) * UNIT
        values = tl.load(x + rows[:, None] + (c * x_channel)[None, :], mask=mask, other=0)
        total += weight * values.to(ACC)
    if not TRANSPOSED:
        total /= last
    tl.store(out + (target * UNIT)[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _mean(
    x, out, job, c, channels, num_globals, x_batch, x_seq, x_row, x_channel, out_batch, out_seq, num_in, num_out, via,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, TRANSPOSED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One token of volume b: reduced over all slices once, then written to all."""
    token, b = job % num_globals, job // num_globals
    source = b * x_batch + token * x_row
    target = b * out_batch + token.to(tl.int64) * channels
    in_row = (c < channels * UNIT)[None, :]
    last = _last_divisor(via, via, num_out if TRANSPOSED else num_in)
    total = tl.zeros([c.shape[0]], ACC)
    for start in range(0, num_in, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        rows = (source + k * x_seq) * UNIT
        mask = (k < num_in)[:, None] & in_row
        values = tl.load(x + rows[:, None] + (c * x_channel)[None, :], mask=mask, other=0).to(ACC)
        if not TRANSPOSED:
            values *= _divide(_share(0, k, 1, num_in, via, ACC), via // last, ACC)[:, None]
        total += tl.sum(values, 0)
    total /= last
    for start in range(0, num_out, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        rows = (target + k * out_seq) * UNIT
        mask = (k < num_out)[:, None] & in_row
        values = tl.broadcast_to(total[None, :], [BLOCK_R, c.shape[0]])
        if TRANSPOSED:
            values *= _divide(_share(0, k, 1, num_out, via, ACC), via // last, ACC)[:, None]
        tl.store(out + rows[:, None] + c[None, :], values.to(out.dtype.element_ty), mask=mask)


_SIZES = "channels num_globals n0 n1 n2 x_batch x_seq x_row x_0 x_1 x_2 out_batch out_seq out_0 num_in num_out via"


@triton.jit(do_not_specialize=[*_SIZES.split(), "global_programs"])  # a new volume shape compiles nothing
def plane_switch_kernel(
    x,  # (B*num_in, g + L1, C), any strides
    out,  # (B*num_out, g + L2, C), contiguous
    channels,  # C; like all strides below but x_channel it counts UNIT elements
    num_globals,  # g
    n0, n1, n2,  # sizes of the new plane's axes, slowest first
    x_batch: tl.int64, x_seq: tl.int64, x_row: tl.int64,  # strides of volumes, sequences and rows; so wide are offsets
    x_0: tl.int64, x_1: tl.int64, x_2: tl.int64,  # strides of patches along the new plane's axes
    x_channel,  # stride of channels in elements; specialised, so that 1 is a constant
    out_batch: tl.int64, out_seq: tl.int64, out_0: tl.int64,  # of volumes, sequences, the new plane's slowest axis
    num_in, num_out, via,  # slices of x and out; of the step between them
    global_programs,  # how many of the programs, the first, write globals
    UNIT: tl.constexpr,  # 16 bytes of elements where all strides allow it, else 1
    BLOCK_R: tl.constexpr,  # rows and channels of a tile
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # global tokens of a tile
    POOL: tl.constexpr,  # "none" (g = 0), "bands" (PCg), "mean" (PCm)
    TRANSPOSED: tl.constexpr,  # apply the transpose of M, which leads from out to x
    ACC: tl.constexpr,  # dtype of sums
):  # fmt: skip
    channels, num_globals, n0, n1, n2 = scalars((channels, num_globals, n0, n1, n2), tl.int32)
    num_in, num_out, via, global_programs = scalars((num_in, num_out, via, global_programs), tl.int32)
    x_batch, x_seq, x_row, x_channel = scalars((x_batch, x_seq, x_row, x_channel), tl.int64)
    x_0, x_1, x_2, out_batch, out_seq, out_0 = scalars((x_0, x_1, x_2, out_batch, out_seq, out_0), tl.int64)
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels * UNIT, BLOCK_C)
    block, job = pid % blocks, pid // blocks
    c = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    if pid >= global_programs:
        job -= global_programs // blocks
        _patches(
            x, out, job, c, channels, num_globals, n0, n1, n2, x_batch, x_row, x_0, x_1, x_2, x_channel, out_batch,
            out_0, UNIT, BLOCK_R,
        )  # fmt: skip
    elif POOL == "bands":
        _bands(
            x, out, job, c, channels, num_globals, x_batch, x_seq, x_row, x_channel, out_batch, out_seq, num_in,
            num_out, via, UNIT, BLOCK_G, TRANSPOSED, ACC,
        )  # fmt: skip
    elif POOL == "mean":
        _mean(
            x, out, job, c, channels, num_globals, x_batch, x_seq, x_row, x_channel, out_batch, out_seq, num_in,
            num_out, via, UNIT, BLOCK_R, TRANSPOSED, ACC,
        )  # fmt: skip


def _tile(itemsize: int, channels: int, offsets: tuple[int | torch.SymInt, ...]) -> tuple[int, int, int]:
    """UNIT, BLOCK_R, BLOCK_C: 16 elements per thread in 16-byte accesses, or 4 where rows do not start at such."""
    vector = 16 // itemsize
    unit = vector if all([offset % vector == 0 for offset in (channels, *offsets)]) else 1
    whole = [block for block in (256, 128, 64) if channels % block == 0]  # no idle lanes
    block_c = whole[0] if whole else min(256, max(32, triton.next_power_of_2(channels)))
    if unit == 1:  # an address per element: larger tiles spill
        return unit, 8, min(64, block_c)
    return unit, 2048 // block_c, block_c


def _plane_switch(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`
    old: str,
    new: str,
    sizes: list[int],  # (D, H, W) in tokens
    num_globals: int,  # g
    via: int,  # slices between the two steps of M
    mean: bool,  # whether the last step of M is a mean (PCm)
    transposed: bool,  # whether globals go through the transpose of M, which then leads from new to old
) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`
    before, after, g = PLANES[old], PLANES[new], num_globals
    channels = int(x.shape[2])  # a number, also where torch traces sizes: tiles follow it
    num_in, num_out = before.slices(sizes), after.slices(sizes)
    batch = x.shape[0] // num_in
    out = x.new_empty(batch * num_out, g + after.length(sizes), channels)
    if x.numel() == 0:
        return out
    n0, n1, n2 = after.ordered(sizes)
    x_seq, x_row, x_channel = x.stride()
    steps = zip(after.axes, row_map(before, after, sizes).strides)  # of the old patches, in rows
    x_axes = [x_seq if axis in before.batch else rows * x_row for axis, rows in steps]
    offsets = (x.storage_offset(), x_seq, x_row) if x_channel == 1 else (1,)
    unit, block_r, block_c = _tile(x.element_size(), channels, offsets)
    blocks = triton.cdiv(channels, block_c)
    pool = "none" if g == 0 else "mean" if mean else "bands"
    global_programs = batch * blocks * {"none": 0, "mean": g, "bands": num_out * triton.cdiv(g, BLOCK_G)}[pool]
    programs = global_programs + batch * blocks * n0 * triton.cdiv(n1 * n2, block_r)
    _check_limits(before, after, sizes, channels, g, via, programs)
    out_seq = out.shape[1] * channels
    out_0 = out_seq if after.batch else n1 * n2 * channels
    x_strides = [stride // unit for stride in (num_in * x_seq, x_seq, x_row, *x_axes)]
    out_strides = [stride // unit for stride in (num_out * out_seq, out_seq, out_0)]
    launch(
        plane_switch_kernel if INTERPRETED else wrap_triton(plane_switch_kernel), (programs,), x.device,
        x, out, channels // unit, g, n0, n1, n2, *x_strides, x_channel, *out_strides, num_in, num_out, via,
        global_programs, UNIT=unit, BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_G=BLOCK_G, POOL=pool,
        TRANSPOSED=transposed and pool != "none", ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return out


def _cost(
    x: Tensor, old: str, new: str, sizes: list[int], num_globals: int, via: int, mean: bool, transposed: bool
) -> Cost:
    way = (new, old) if transposed else (old, new)
    shapes = Shapes.of(x, old, *way, sizes, num_globals, via, mean)
    row = x.shape[2] * x.element_size()
    read = row * shapes.moved(PLANES[old], None if mean else shapes.bands)  # M's bands, which the transpose shares
    return Cost(read, row * shapes.moved(PLANES[new]), launches=1 if read else 0)


OP, _switch = linear(register, _plane_switch, adjoint, more_volumes, fake=fake, cost=_cost)

plane_switch_triton = call_of(_switch)
