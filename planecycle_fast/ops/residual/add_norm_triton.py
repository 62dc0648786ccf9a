"""add_norm on NVIDIA GPUs, and plane_switch in full: one launch for sum, change of planes, pooling and norm.

A program holds whole rows. Patches come from the old row that `planes.row_map` names, as in
`plane_switch_triton`; the sum is rounded first and normalised then, so that backward sees what forward saw. Rows of
globals have programs of their own, the first ones. PCm's new rows are all alike: summed and normalised once, then
written to every slice.

Statistics are float32 (float64 for float64) and kept for backward, which is in `add_norm_backward_triton`, with what
both hold rows by.
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
from ..registry import Cost
from ..scalars_triton import scalars
from ..tiles import tile
from .add_norm_autograd import backward_by, calls_of, fake, outputs, setup_context
from .add_norm_backward_triton import BACKWARD, load_rows, load_vector, rows_of, store_rows, sum_rows


@triton.jit
def _added(stream, place, ok, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """x + scale * branch: (R, W)."""
    x, branch, scale = stream
    total = load_rows(x, place, ok, c, CHANNELS, ACC)
    if branch is not None:
        added = load_rows(branch, place, ok, c, CHANNELS, ACC)
        if scale is not None:
            added *= load_vector(scale, c, CHANNELS, ACC)
        total += added
    return total


@triton.jit
def _rounded(total, stream, outs, ACC: tl.constexpr):
    """As it is stored, or was."""
    if outs[0] is None:
        rounded = total.to(stream[0].dtype.element_ty)
    else:
        rounded = total.to(outs[0].dtype.element_ty)
    return rounded.to(ACC)


@triton.jit
def _squares(piece, mean, c, CHANNELS: tl.constexpr):
    """Of distances from the mean: (R, W)."""
    distance = tl.where((c < CHANNELS)[None, :], piece - mean[:, None], 0)
    return distance * distance


@triton.jit
def _statistics(
    head, tail, c, d, eps, CHANNELS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):
    """Mean, 0 for an RMSNorm, and 1 / deviation of rows: (R,) each."""
    count, mean = tl.full([1], CHANNELS, ACC), tl.zeros([head.shape[0]], ACC)
    if NORM == "layer":
        mean = _divide(sum_rows(head, tail, TAIL), count, ACC)
    squares = _squares(head, mean, c, CHANNELS)
    rest = _squares(tail, mean, d, CHANNELS)
    variance = _divide(sum_rows(squares, rest, TAIL), count, ACC) + eps
    if ACC == tl.float64:  # noqa: SIM300  (a constexpr compares from the left only)
        deviation = tl.sqrt(variance)
    else:
        deviation = tl.sqrt_rn(variance)
    return mean, _divide(tl.full([1], 1, ACC), deviation, ACC)


@triton.jit
def _store_piece(
    piece, statistics, norm, outs, place, ok, c, CHANNELS: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):
    if outs[0] is not None:
        store_rows(outs[0], piece, place, ok, c, CHANNELS)
    if NORM != "none":
        result = (piece - statistics[0][:, None]) * statistics[1][:, None]
        if norm[0] is not None:
            result *= load_vector(norm[0], c, CHANNELS, ACC)
        if norm[1] is not None:
            result += load_vector(norm[1], c, CHANNELS, ACC)
        store_rows(outs[1], result, place, ok, c, CHANNELS)


@triton.jit
def _store(
    head, tail, statistics, norm, outs, place, ok, c, d, CHANNELS: tl.constexpr, TAIL: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows, their norm and their statistics."""
    _store_piece(head, statistics, norm, outs, place, ok, c, CHANNELS, NORM, ACC)
    if TAIL:
        _store_piece(tail, statistics, norm, outs, place, ok, d, CHANNELS, NORM, ACC)
    if NORM == "layer":
        tl.store(outs[2] + place, statistics[0], mask=ok)
    if NORM != "none":
        tl.store(outs[3] + place, statistics[1], mask=ok)


@triton.jit
def _patches(
    stream, norm, outs, source, target, ok, c, d, CHANNELS: tl.constexpr, TAIL: tl.constexpr, NORM: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows that move."""
    head = _rounded(_added(stream, source, ok, c, CHANNELS, ACC), stream, outs, ACC)
    tail = tl.zeros([head.shape[0], 1], ACC)
    if TAIL:
        tail = _rounded(_added(stream, source, ok, d, CHANNELS, ACC), stream, outs, ACC)
    statistics = (None, None)
    if NORM != "none":
        statistics = _statistics(head, tail, c, d, norm[2], CHANNELS, TAIL, NORM, ACC)
    _store(head, tail, statistics, norm, outs, target, ok, c, d, CHANNELS, TAIL, NORM, ACC)


@triton.jit
def _bands(
    stream, norm, outs, job, c, d, num_globals, x_strides, out_strides, slices, CHANNELS: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_R tokens of slice o of volume b: weighted sums over a band of slices."""
    num_in, num_out, via = slices
    tiles = tl.cdiv(num_globals, BLOCK_R)
    tile, job = job % tiles, job // tiles
    o, b = job % num_out, job // num_out
    token = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = token < num_globals
    first = (o * via // num_out) * num_in // via
    end = tl.cdiv(tl.cdiv((o + 1) * via, num_out) * num_in, via)
    size = _bin_size(o, via, num_out)
    last = _last_divisor(size, via, num_in)
    head = tl.zeros([BLOCK_R, c.shape[0]], ACC)
    tail = tl.zeros([BLOCK_R, d.shape[0]], ACC)
    for k in range(first, end):
        share = _divide(_share(o, k, num_out, num_in, via, ACC), size // last, ACC)
        place = b * x_strides[0] + k * x_strides[1] + token
        head += share * _added(stream, place, ok, c, CHANNELS, ACC)
        if TAIL:
            tail += share * _added(stream, place, ok, d, CHANNELS, ACC)
    head = _rounded(head / last, stream, outs, ACC)
    tail = _rounded(tail / last, stream, outs, ACC)
    statistics = (None, None)
    if NORM != "none":
        statistics = _statistics(head, tail, c, d, norm[2], CHANNELS, TAIL, NORM, ACC)
    place = b * out_strides[0] + o * out_strides[1] + token
    _store(head, tail, statistics, norm, outs, place, ok, c, d, CHANNELS, TAIL, NORM, ACC)


@triton.jit
def _mean(
    stream, norm, outs, job, c, d, num_globals, x_strides, out_strides, slices, CHANNELS: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One token of volume b: reduced over all slices and normalised once, then written to all."""
    num_in, num_out, via = slices
    token, b = job % num_globals, job // num_globals
    last = _last_divisor(via, via, num_in)
    head = tl.zeros([1, c.shape[0]], ACC)
    tail = tl.zeros([1, d.shape[0]], ACC)
    for start in range(0, num_in, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        share = _divide(_share(0, k, 1, num_in, via, ACC), via // last, ACC)[:, None]
        place, ok = b * x_strides[0] + k * x_strides[1] + token, k < num_in
        part = share * _added(stream, place, ok, c, CHANNELS, ACC)
        head += tl.sum(tl.where(ok[:, None], part, 0), 0)[None, :]  # an infinite scale makes NaN of slices not there
        if TAIL:
            part = share * _added(stream, place, ok, d, CHANNELS, ACC)
            tail += tl.sum(tl.where(ok[:, None], part, 0), 0)[None, :]
    head = _rounded(head / last, stream, outs, ACC)
    tail = _rounded(tail / last, stream, outs, ACC)
    statistics = (None, None)
    if NORM != "none":
        average, inverse = _statistics(head, tail, c, d, norm[2], CHANNELS, TAIL, NORM, ACC)
        statistics = (tl.broadcast_to(average, [BLOCK_R]), tl.broadcast_to(inverse, [BLOCK_R]))
    head = tl.broadcast_to(head, [BLOCK_R, c.shape[0]])
    tail = tl.broadcast_to(tail, [BLOCK_R, d.shape[0]])
    for start in range(0, num_out, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        place = b * out_strides[0] + k * out_strides[1] + token
        _store(head, tail, statistics, norm, outs, place, k < num_out, c, d, CHANNELS, TAIL, NORM, ACC)


_SIZES = """num_globals n0 n1 n2 x_volume x_seq x_0 x_1 x_2 out_volume out_seq out_0 num_in num_out via
global_programs"""


@triton.jit(do_not_specialize=_SIZES.split())  # a new volume shape compiles nothing
def add_norm_kernel(
    x,  # (B*num_in, g + L1, C), contiguous
    branch,  # like x, or None
    scale,  # (C,), or None: 1
    weight, bias, eps,  # (C,) each, or None
    out,  # (B*num_out, g + L2, C), contiguous; None where it would be x
    normed,  # like out
    mean, rstd,  # (B*num_out, g + L2) each
    num_globals,  # g
    n0, n1, n2,  # sizes of the new plane's axes, slowest first
    x_volume: tl.int64, x_seq: tl.int64,  # rows of a volume and of a sequence; so wide are offsets
    x_0: tl.int64, x_1: tl.int64, x_2: tl.int64,  # rows along the new plane's axes
    out_volume: tl.int64, out_seq: tl.int64, out_0: tl.int64,  # of volumes, sequences, the new plane's slowest axis
    num_in, num_out, via,  # slices of x and out; of the step between them
    global_programs,  # how many of the programs, the first, write globals
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
    num_in, num_out, via, global_programs = scalars((num_in, num_out, via, global_programs), tl.int32)
    x_volume, x_seq, x_0, x_1, x_2 = scalars((x_volume, x_seq, x_0, x_1, x_2), tl.int64)
    out_volume, out_seq, out_0 = scalars((out_volume, out_seq, out_0), tl.int64)
    stream, norm, outs = (x, branch, scale), (weight, bias, tl.cast(eps, ACC)), (out, normed, mean, rstd)
    if pid >= global_programs:
        source, target, ok = rows_of(
            pid - global_programs, num_globals, (n0, n1, n2), (x_volume, x_0, x_1, x_2), (out_volume, out_0), BLOCK_R
        )
        _patches(stream, norm, outs, source, target, ok, c, d, CHANNELS, TAIL, NORM, ACC)
    elif POOL == "bands":
        _bands(
            stream, norm, outs, pid, c, d, num_globals, (x_volume, x_seq), (out_volume, out_seq),
            (num_in, num_out, via), CHANNELS, TAIL, BLOCK_R, NORM, ACC,
        )  # fmt: skip
    elif POOL == "mean":
        _mean(
            stream, norm, outs, pid, c, d, num_globals, (x_volume, x_seq), (out_volume, out_seq),
            (num_in, num_out, via), CHANNELS, TAIL, BLOCK_R, NORM, ACC,
        )  # fmt: skip


def _add_norm(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`, contiguous
    branch: Tensor | None,  # like x
    scale: Tensor | None,  # (C,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    old: str,
    new: str,
    sizes: list[int],  # (D, H, W) in tokens
    num_globals: int,  # g
    via: int,  # slices between the two steps of M
    mean: bool,  # whether the last step of M is a mean (PCm)
    norm: str,  # "none", "layer" or "rms"
    eps: float,
    dtype: torch.dtype | None,  # of the norm; None: of the sum
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (B*P2, g + L2, C), its norm, and mean and 1 / deviation (B*P2, g + L2); nothing where not computed."""
    shapes = Shapes.of(x, old, old, new, sizes, num_globals, via, mean)
    out, normed, average, inverse = outputs(x, branch, scale, shapes, norm, dtype)
    if x.numel() == 0:
        return out, normed, average, inverse
    head, tail, block_r, warps = tile("forward", shapes.channels)
    global_programs = shapes.global_tiles(block_r, shapes.new.slices(sizes))
    programs = global_programs + shapes.patch_tiles(block_r)
    shapes.check(programs)
    kept = None if shapes.is_identity and branch is None else out
    launch(
        add_norm_kernel if INTERPRETED else wrap_triton(add_norm_kernel), (programs,), x.device,
        x, branch, scale, weight, bias, eps, kept, normed, average, inverse, *shapes.arguments,
        global_programs, CHANNELS=shapes.channels, HEAD=head, TAIL=tail, BLOCK_R=block_r, POOL=shapes.pool, NORM=norm,
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32, num_warps=warps,
    )  # fmt: skip
    return out, normed, average, inverse


def _cost(x: Tensor, branch: Tensor | None, scale: Tensor | None, *rest: Any) -> Cost:
    _, _, old, new, sizes, num_globals, via, mean, norm, _, dtype = rest
    shapes = Shapes.of(x, old, old, new, sizes, num_globals, via, mean)
    read = shapes.moved(shapes.old, None if shapes.pool == "mean" else shapes.bands if num_globals else 0)
    size = sum([t.element_size() for t in (x, branch) if t is not None])
    made = outputs(x.to("meta"), branch, scale, shapes, norm, dtype)
    written = sum([t.numel() * t.element_size() for t in made[:2]])
    return Cost(read * x.shape[2] * size, written, launches=1 if x.numel() else 0)


OP = register(_add_norm, fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD), cost=_cost)


add_norm_triton, add_rows_triton = calls_of(OP, "triton", rows_are_wide=False)
