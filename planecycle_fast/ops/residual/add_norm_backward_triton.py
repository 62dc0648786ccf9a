"""The backward of add_norm and of plane_switch in full, on NVIDIA GPUs.

One launch runs backward through the norm at each new row, changes planes back, and writes the gradients of x and
branch at the old row; the gradients of scale, weight and bias, sums over all rows, are kept per program and summed by
a second, small launch. No atomics, and as many programs on every GPU: the order of all sums is fixed.

Globals of an old slice get M transposed times the gradients of the new ones, whose norm is computed again wherever a
band needs it; of the bands that share a new slice the first one's program adds it to the sums of weight and bias.
PCm's new rows are all alike, so their gradients are summed first and go through the norm once.

A row is held in a head and a tail, powers of two of channels (`tiles`): 384 = 256 + 128 leaves no lane idle. Where
TAIL is 0 there is no tail, and what stands for it is never used. `add_norm_triton` holds rows by the same functions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernel for its compile caches

from ..plane_change.plane_switch_shapes import Shapes
from ..plane_change.plane_switch_triton import _bin_size, _divide, _last_divisor, _share
from ..registration import INTERPRETED, launch, register
from ..registry import Cost, refused_again
from ..scalars_triton import scalars
from ..tiles import tile
from .add_norm_autograd import fake_backward, gradients

PATCH_PROGRAMS, GLOBAL_PROGRAMS = 1024, 128  # at most; each leaves a row of partial sums
COLUMNS, PARTIALS = 32, 128  # the tile that sums them


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


@triton.jit
def _normalized(saved, place, ok, c, average, inverse, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Rows before weight and bias: (R, W)."""
    return (load_rows(saved[0], place, ok, c, CHANNELS, ACC) - average[:, None]) * inverse[:, None]


@triton.jit
def _weighted(grad, saved, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    if saved[3] is not None:
        grad = grad * load_vector(saved[3], c, CHANNELS, ACC)
    return grad


@triton.jit
def through_norm(
    grad_head, grad_tail, saved, place, ok, c, d, CHANNELS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From gradients of the norm to those of what was normalised, and to the terms of weight's: 4 tiles (R, W)."""
    average = tl.zeros([grad_head.shape[0]], ACC)
    if NORM == "layer":
        average = tl.load(saved[1] + place, mask=ok, other=0)
    inverse = tl.load(saved[2] + place, mask=ok, other=0)
    head = _normalized(saved, place, ok, c, average, inverse, CHANNELS, ACC)
    of_head = _weighted(grad_head, saved, c, CHANNELS, ACC)
    tail, of_tail = grad_tail, grad_tail
    if TAIL:
        tail = _normalized(saved, place, ok, d, average, inverse, CHANNELS, ACC)
        of_tail = _weighted(grad_tail, saved, d, CHANNELS, ACC)
    along = (sum_rows(of_head * head, of_tail * tail, TAIL) / CHANNELS)[:, None]
    common = tl.zeros([grad_head.shape[0], 1], ACC)
    if NORM == "layer":
        common = (sum_rows(of_head, of_tail, TAIL) / CHANNELS)[:, None]
    inverse = inverse[:, None]
    return (
        (of_head - common - head * along) * inverse, (of_tail - common - tail * along) * inverse,
        grad_head * head, grad_tail * tail,
    )  # fmt: skip


@triton.jit
def gradient(
    grads, saved, place, ok, c, d, CHANNELS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):
    """Gradients of new rows, and the terms of weight's and bias's: 6 tiles (R, W)."""
    head = tl.zeros([place.shape[0], c.shape[0]], ACC)
    tail = tl.zeros([place.shape[0], d.shape[0]], ACC)
    weight_head, weight_tail, bias_head, bias_tail = head, tail, head, tail
    if NORM != "none":
        bias_head = load_rows(grads[1], place, ok, c, CHANNELS, ACC)
        if TAIL:
            bias_tail = load_rows(grads[1], place, ok, d, CHANNELS, ACC)
        head, tail, weight_head, weight_tail = through_norm(
            bias_head, bias_tail, saved, place, ok, c, d, CHANNELS, TAIL, NORM, ACC
        )
    if grads[0] is not None:
        head += load_rows(grads[0], place, ok, c, CHANNELS, ACC)
        if TAIL:
            tail += load_rows(grads[0], place, ok, d, CHANNELS, ACC)
    return head, tail, weight_head, weight_tail, bias_head, bias_tail


@triton.jit
def store_piece(piece, inputs, outs, sums, place, ok, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """Gradients of old rows; the terms of scale's (R, W)."""
    branch, scale = inputs
    store_rows(outs[0], piece, place, ok, c, CHANNELS)
    terms = piece
    if sums[0] is not None:
        terms = piece * load_rows(branch, place, ok, c, CHANNELS, ACC)
    if outs[1] is not None:
        if scale is not None:
            piece = piece * load_vector(scale, c, CHANNELS, ACC)
        store_rows(outs[1], piece, place, ok, c, CHANNELS)
    return terms


@triton.jit
def _store_sum(terms, sums, c, CHANNELS: tl.constexpr):
    """This program's part of a vector's gradient, from tiles (R, W)."""
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * CHANNELS + c, tl.sum(terms, 0), mask=c < CHANNELS)


@triton.jit
def store_sums(heads, tails, sums, c, d, CHANNELS: tl.constexpr, TAIL: tl.constexpr):
    """Of scale's, weight's and bias's."""
    _store_sum(heads[0], sums[0], c, CHANNELS)
    _store_sum(heads[1], sums[1], c, CHANNELS)
    _store_sum(heads[2], sums[2], c, CHANNELS)
    if TAIL:
        _store_sum(tails[0], sums[0], d, CHANNELS)
        _store_sum(tails[1], sums[1], d, CHANNELS)
        _store_sum(tails[2], sums[2], d, CHANNELS)


@triton.jit
def _patches(
    grads, saved, inputs, outs, sums, c, d, num_globals, jobs, sizes, x_strides, out_strides, CHANNELS: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_R rows that move."""
    scale_head = tl.zeros([BLOCK_R, c.shape[0]], ACC)
    scale_tail = tl.zeros([BLOCK_R, d.shape[0]], ACC)
    weight_head, weight_tail, bias_head, bias_tail = scale_head, scale_tail, scale_head, scale_tail
    for job in range(jobs[0], jobs[1]):
        source, target, ok = rows_of(job, num_globals, sizes, x_strides, out_strides, BLOCK_R)
        head, tail, w_head, w_tail, b_head, b_tail = gradient(grads, saved, target, ok, c, d, CHANNELS, TAIL, NORM, ACC)
        scale_head += store_piece(head, inputs, outs, sums, source, ok, c, CHANNELS, ACC)
        weight_head += w_head
        bias_head += b_head
        if TAIL:
            scale_tail += store_piece(tail, inputs, outs, sums, source, ok, d, CHANNELS, ACC)
            weight_tail += w_tail
            bias_tail += b_tail
    heads, tails = (scale_head, weight_head, bias_head), (scale_tail, weight_tail, bias_tail)
    store_sums(heads, tails, sums, c, d, CHANNELS, TAIL)


@triton.jit
def _bands(
    grads, saved, inputs, outs, sums, c, d, num_globals, jobs, slices, x_strides, out_strides,
    CHANNELS: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_R tokens of an old slice p of volume b: weighted sums over a band of new slices."""
    num_in, num_out, via = slices
    scale_head = tl.zeros([BLOCK_R, c.shape[0]], ACC)
    scale_tail = tl.zeros([BLOCK_R, d.shape[0]], ACC)
    weight_head, weight_tail, bias_head, bias_tail = scale_head, scale_tail, scale_head, scale_tail
    tiles = tl.cdiv(num_globals, BLOCK_R)
    for job in range(jobs[0], jobs[1]):
        token = job % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
        p, b = job // tiles % num_in, job // tiles // num_in
        ok = token < num_globals
        head = tl.zeros([BLOCK_R, c.shape[0]], ACC)
        tail = tl.zeros([BLOCK_R, d.shape[0]], ACC)
        first = (p * via // num_in) * num_out // via
        end = tl.cdiv(tl.cdiv((p + 1) * via, num_in) * num_out, via)
        for k in range(first, end):
            share = _divide(_share(k, p, num_out, num_in, via, ACC), _bin_size(k, via, num_out), ACC)
            place = b * out_strides[0] + k * out_strides[1] + token
            part, rest, w_head, w_tail, b_head, b_tail = gradient(
                grads, saved, place, ok, c, d, CHANNELS, TAIL, NORM, ACC
            )
            own = (k * via // num_out) * num_in // via == p  # the first of the slices that k averages
            head += share * part
            weight_head += tl.where(own, w_head, 0)
            bias_head += tl.where(own, b_head, 0)
            if TAIL:
                tail += share * rest
                weight_tail += tl.where(own, w_tail, 0)
                bias_tail += tl.where(own, b_tail, 0)
        place = b * x_strides[0] + p * x_strides[1] + token
        scale_head += store_piece(head, inputs, outs, sums, place, ok, c, CHANNELS, ACC)
        if TAIL:
            scale_tail += store_piece(tail, inputs, outs, sums, place, ok, d, CHANNELS, ACC)
    heads, tails = (scale_head, weight_head, bias_head), (scale_tail, weight_tail, bias_tail)
    store_sums(heads, tails, sums, c, d, CHANNELS, TAIL)


@triton.jit
def _sum_slices(grad, place, step, count, c, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr):
    """Of `count` rows, `step` apart: (1, W)."""
    total = tl.zeros([1, c.shape[0]], ACC)
    if grad is not None:
        for start in range(0, count, BLOCK_R):
            k = start + tl.arange(0, BLOCK_R)
            total += tl.sum(load_rows(grad, place + k * step, k < count, c, CHANNELS, ACC), 0)[None, :]
    return total


@triton.jit
def _mean(
    grads, saved, inputs, outs, sums, c, d, num_globals, jobs, slices, x_strides, out_strides,
    CHANNELS: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tokens of all slices of volume b: summed over the new ones, through the norm once, then to all old ones."""
    num_in, num_out, via = slices
    scale_head = tl.zeros([BLOCK_R, c.shape[0]], ACC)
    scale_tail = tl.zeros([BLOCK_R, d.shape[0]], ACC)
    weight_head, bias_head = tl.zeros([1, c.shape[0]], ACC), tl.zeros([1, c.shape[0]], ACC)
    weight_tail, bias_tail = tl.zeros([1, d.shape[0]], ACC), tl.zeros([1, d.shape[0]], ACC)
    last = _last_divisor(via, via, num_in)
    for job in range(jobs[0], jobs[1]):
        token, b = job % num_globals, job // num_globals
        new = b * out_strides[0] + token + tl.zeros([1], tl.int64)
        head = _sum_slices(grads[0], new, out_strides[1], num_out, c, CHANNELS, BLOCK_R, ACC)
        tail = _sum_slices(grads[0], new, out_strides[1], num_out, d, CHANNELS, BLOCK_R, ACC)
        if NORM != "none":
            b_head = _sum_slices(grads[1], new, out_strides[1], num_out, c, CHANNELS, BLOCK_R, ACC)
            b_tail = _sum_slices(grads[1], new, out_strides[1], num_out, d, CHANNELS, BLOCK_R, ACC)
            here = tl.full([1], 1, tl.int1)
            part, rest, w_head, w_tail = through_norm(b_head, b_tail, saved, new, here, c, d, CHANNELS, TAIL, NORM, ACC)
            head += part
            weight_head += w_head
            bias_head += b_head
            if TAIL:
                tail += rest
                weight_tail += w_tail
                bias_tail += b_tail
        head /= last
        tail /= last
        for start in range(0, num_in, BLOCK_R):
            k = start + tl.arange(0, BLOCK_R)
            share = _divide(_share(0, k, 1, num_in, via, ACC), via // last, ACC)[:, None]
            place = b * x_strides[0] + k * x_strides[1] + token
            scale_head += store_piece(share * head, inputs, outs, sums, place, k < num_in, c, CHANNELS, ACC)
            if TAIL:
                scale_tail += store_piece(share * tail, inputs, outs, sums, place, k < num_in, d, CHANNELS, ACC)
    heads, tails = (scale_head, weight_head, bias_head), (scale_tail, weight_tail, bias_tail)
    store_sums(heads, tails, sums, c, d, CHANNELS, TAIL)


_SIZES = """num_globals n0 n1 n2 x_volume x_seq x_0 x_1 x_2 out_volume out_seq out_0 num_in num_out via
global_programs global_steps global_tiles steps tiles"""


@triton.jit(do_not_specialize=_SIZES.split())  # a new volume shape compiles nothing
def add_norm_backward_kernel(
    grad,  # of the sum, (B*num_out, g + L2, C), contiguous, or None
    grad_normed,  # of its norm, like grad, or None
    y,  # the sum, like grad
    mean, rstd,  # (B*num_out, g + L2) each
    weight,  # (C,), or None
    branch,  # (B*num_in, g + L1, C), contiguous, or None
    scale,  # (C,), or None
    grad_x, grad_branch,  # like branch; grad_branch may be None
    scale_sums, weight_sums, bias_sums,  # (programs, C) each, or None
    num_globals,  # g
    n0, n1, n2,  # sizes of the new plane's axes, slowest first
    x_volume: tl.int64, x_seq: tl.int64,  # rows of an old volume and of an old sequence; so wide are offsets
    x_0: tl.int64, x_1: tl.int64, x_2: tl.int64,  # old rows along the new plane's axes
    out_volume: tl.int64, out_seq: tl.int64, out_0: tl.int64,  # of volumes, sequences, the new plane's slowest axis
    num_in, num_out, via,  # old and new slices; of the step between them
    global_programs, global_steps, global_tiles,  # programs, the first, of globals; tiles of each, of all
    steps, tiles,  # tiles of patches, of each of the other programs and of all
    CHANNELS: tl.constexpr,  # C
    HEAD: tl.constexpr, TAIL: tl.constexpr,  # of them in both pieces of a row
    BLOCK_R: tl.constexpr,  # rows of a tile
    POOL: tl.constexpr,  # "none" (g = 0), "bands" (PCg), "mean" (PCm)
    NORM: tl.constexpr,  # "none", "layer", "rms"
    ACC: tl.constexpr,  # dtype of sums
):  # fmt: skip
    pid = tl.program_id(0)
    c = tl.arange(0, HEAD).to(tl.int64)
    d = HEAD + tl.arange(0, TAIL if TAIL else 1).to(tl.int64)
    num_globals, n0, n1, n2 = scalars((num_globals, n0, n1, n2), tl.int32)
    num_in, num_out, via, steps, tiles = scalars((num_in, num_out, via, steps, tiles), tl.int32)
    global_programs, global_steps, global_tiles = scalars((global_programs, global_steps, global_tiles), tl.int32)
    x_volume, x_seq, x_0, x_1, x_2 = scalars((x_volume, x_seq, x_0, x_1, x_2), tl.int64)
    out_volume, out_seq, out_0 = scalars((out_volume, out_seq, out_0), tl.int64)
    grads, saved, inputs, outs = (grad, grad_normed), (y, mean, rstd, weight), (branch, scale), (grad_x, grad_branch)
    sums, slices = (scale_sums, weight_sums, bias_sums), (num_in, num_out, via)
    if pid >= global_programs:
        first = (pid - global_programs) * steps
        _patches(
            grads, saved, inputs, outs, sums, c, d, num_globals, (first, tl.minimum(first + steps, tiles)),
            (n0, n1, n2), (x_volume, x_0, x_1, x_2), (out_volume, out_0), CHANNELS, TAIL, BLOCK_R, NORM, ACC,
        )  # fmt: skip
    elif POOL != "none":
        first = pid * global_steps
        jobs = (first, tl.minimum(first + global_steps, global_tiles))
        if POOL == "bands":
            _bands(
                grads, saved, inputs, outs, sums, c, d, num_globals, jobs, slices, (x_volume, x_seq),
                (out_volume, out_seq), CHANNELS, TAIL, BLOCK_R, NORM, ACC,
            )  # fmt: skip
        else:
            _mean(
                grads, saved, inputs, outs, sums, c, d, num_globals, jobs, slices, (x_volume, x_seq),
                (out_volume, out_seq), CHANNELS, TAIL, BLOCK_R, NORM, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def column_sums_kernel(
    partials,  # (vectors, programs, C)
    sums,  # (vectors, C)
    programs,
    CHANNELS: tl.constexpr,  # C
    BLOCK_R: tl.constexpr,  # rows and channels of a tile
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.cast(programs, tl.int32)
    blocks = tl.cdiv(CHANNELS, BLOCK_C)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    vector = pid // blocks
    total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for start in range(0, programs, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < programs)[:, None] & (c < CHANNELS)[None, :]
        places = ((vector * programs + row) * CHANNELS)[:, None] + c[None, :]
        total += tl.load(partials + places, mask=mask, other=0)
    tl.store(sums + vector * CHANNELS + c, tl.sum(total, 0).to(sums.dtype.element_ty), mask=c < CHANNELS)


def _add_norm_backward(
    grad: Tensor | None,  # of the sum, (B*P2, g + L2, C), contiguous
    grad_normed: Tensor | None,  # of its norm, like grad
    y: Tensor,  # the sum, like grad
    mean: Tensor,  # (B*P2, g + L2)
    rstd: Tensor,  # (B*P2, g + L2)
    weight: Tensor | None,  # (C,)
    branch: Tensor | None,  # (B*P1, g + L1, C), contiguous; only for scale's gradient
    scale: Tensor | None,  # (C,)
    old: str,
    new: str,
    sizes: list[int],  # (D, H, W) in tokens
    num_globals: int,  # g
    via: int,  # slices between the two steps of M
    mean_pooled: bool,  # whether the last step of M is a mean (PCm)
    norm: str,  # "none", "layer" or "rms"
    wanted: list[bool],  # gradients of scale, weight and bias
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,  # None: no gradient of branch
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B*P1, g + L1, C), of branch like it, and of the wanted vectors (vectors, C)."""
    shapes = Shapes.of(y, new, old, new, sizes, num_globals, via, mean_pooled)
    grad_x, grad_branch, sums = gradients(y, shapes, sum(wanted), x_dtype, branch_dtype, sums_dtype)
    if y.shape[2] == 0:
        return grad_x, grad_branch, sums
    head, tail, block_r, warps = tile("backward", shapes.channels)
    tiles, global_tiles = shapes.patch_tiles(block_r), shapes.global_tiles(block_r, shapes.old.slices(sizes))
    steps = triton.cdiv(tiles, PATCH_PROGRAMS) if tiles else 1
    global_steps = triton.cdiv(global_tiles, GLOBAL_PROGRAMS) if global_tiles else 1
    global_programs = triton.cdiv(global_tiles, global_steps)
    programs = global_programs + triton.cdiv(tiles, steps)
    shapes.check(tiles + global_tiles)
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    partials = y.new_empty((sum(wanted), programs, y.shape[2]), dtype=acc)
    rows = iter(range(sum(wanted)))
    parts = [partials[next(rows)] if one else None for one in wanted]
    constants = {"CHANNELS": shapes.channels, "ACC": tl.float64 if acc == torch.float64 else tl.float32}
    if programs:
        launch(
        add_norm_backward_kernel if INTERPRETED else wrap_triton(add_norm_backward_kernel), (programs,), y.device,
        grad, grad_normed, y, mean, rstd, weight, branch, scale, grad_x,
        None if branch_dtype is None else grad_branch, *parts, *shapes.arguments, global_programs, global_steps,
        global_tiles, steps, tiles, HEAD=head, TAIL=tail, BLOCK_R=block_r, POOL=shapes.pool, NORM=norm,
        num_warps=warps, **constants,
    )  # fmt: skip
    if any(wanted):
        launch(
            column_sums_kernel if INTERPRETED else wrap_triton(column_sums_kernel),
            (sum(wanted) * triton.cdiv(y.shape[2], COLUMNS),), y.device,
            partials, sums, programs, BLOCK_R=PARTIALS, BLOCK_C=COLUMNS, **constants,
        )  # fmt: skip
    return grad_x, grad_branch, sums


def _backward_cost(grad: Tensor | None, grad_normed: Tensor | None, y: Tensor, *rest: Any) -> Cost:
    _, _, _, branch, _, old, new, sizes, num_globals, via, pooled, norm, wanted, *dtypes = rest
    shapes = Shapes.of(y, new, old, new, sizes, num_globals, via, pooled)
    bands = None if shapes.pool == "mean" else shapes.bands if num_globals else 0
    sizes_of = [t.element_size() for t in (grad, grad_normed) if t is not None]
    read = shapes.moved(shapes.new, bands) * sum(sizes_of)
    if norm != "none":  # of the rows that PCm made alike one is read
        read += shapes.moved(shapes.new, 1 if bands is None else bands) * y.element_size()
    if wanted[0]:
        read += shapes.moved(shapes.old) * branch.element_size()
    written = shapes.moved(shapes.old) * sum([dtype.itemsize for dtype in dtypes[:2] if dtype is not None])
    launches = (1 if y.numel() else 0) + (1 if any(wanted) and y.shape[2] else 0)
    return Cost(read * y.shape[2], written * y.shape[2], launches)


BACKWARD = register(
    _add_norm_backward, fake=fake_backward, cost=_backward_cost, backward=refused_again("add_norm_backward", "triton")
)
