"""Gradients of tiles of rows, for add_norm's backward on NVIDIA GPUs: through the norm, and into vectors' sums."""

from __future__ import annotations

import triton
import triton.language as tl

from .add_norm_rows_triton import load_rows, load_vector, store_rows, sum_rows


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
