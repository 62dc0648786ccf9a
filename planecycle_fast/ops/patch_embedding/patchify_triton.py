"""patchify on NVIDIA GPUs: one Triton kernel there, one back, no copies. `patchify_ref` says what it computes.

There a program writes a tile of neighbouring rows, in 16-byte accesses: it decodes channel, line and column of each
place in a row once. Back a program writes a tile of lines and columns of one channel of a slice, and looks up the row
of each. No atomics: every pixel is in one row at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton  # by this name, so that torch finds the kernels for its compile caches

from ..registration import INTERPRETED, launch, register
from ..registry import Cost, linear, more_volumes
from ..scalars_triton import scalars
from ..tiles import LIMIT, MAX_PROGRAMS
from .pixel_rows import row_length

_SIZES = "depth columns length num_globals v_batch v_channel v_slice v_line"


@triton.jit(do_not_specialize=_SIZES.split())  # a new volume shape compiles nothing
def patchify_kernel(
    volume,  # (B, channels, D, height, width), any strides
    rows,  # (B*D, g + L, LENGTH), contiguous
    depth, columns, length, num_globals,  # D; patches side by side; rows of a slice, g + L; g
    v_batch: tl.int64, v_channel: tl.int64, v_slice: tl.int64, v_line: tl.int64,  # strides, which count UNIT elements
    v_pixel,  # stride of pixels in elements; specialised, so that 1 is a constant
    PH: tl.constexpr, PW: tl.constexpr,  # a patch
    PIXELS: tl.constexpr, LENGTH: tl.constexpr,  # of a row: pixels, and elements with the zeros behind them
    UNIT: tl.constexpr,  # elements of volume in one access: 16 bytes where patch and strides allow it
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,  # rows of a tile, and elements of a row
):  # fmt: skip
    depth, columns, length, num_globals = scalars((depth, columns, length, num_globals), tl.int32)
    v_batch, v_channel, v_slice, v_line, v_pixel = scalars((v_batch, v_channel, v_slice, v_line, v_pixel), tl.int64)
    pid = tl.program_id(0)
    blocks: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    block, job = pid % blocks, pid // blocks
    tiles = tl.cdiv(length, BLOCK_R)
    tile, sequence = job % tiles, job // tiles
    row, k = tile * BLOCK_R + tl.arange(0, BLOCK_R), block * BLOCK_K + tl.arange(0, BLOCK_K)
    there, patch = row < length, row - num_globals
    at = (sequence // depth) * v_batch + (sequence % depth) * v_slice + (patch // columns) * (v_line * PH)
    start = at * UNIT + (patch % columns) * (v_pixel * PW)
    channel, line, pixel = k // (PH * PW), k // PW % PH, k % PW
    within = (channel * v_channel + line * v_line) * UNIT + pixel * v_pixel
    read = (there & (patch >= 0))[:, None] & (k < PIXELS)[None, :]
    found = tl.load(volume + start[:, None] + within[None, :], mask=read, other=0)
    target = (sequence.to(tl.int64) * length + row) * LENGTH
    mask = there[:, None] & (k < LENGTH)[None, :]
    tl.store(rows + target[:, None] + k.to(tl.int64)[None, :], found.to(rows.dtype.element_ty), mask=mask)


_SIZES_BACK = "channels depth height width lines columns num_globals r_sequence r_row"


@triton.jit(do_not_specialize=_SIZES_BACK.split())
def patchify_back_kernel(
    rows,  # (B*D, g + L, LENGTH), any strides
    volume,  # (B, channels, D, height, width), contiguous
    channels, depth,
    height, width,  # in pixels; width counts UNIT of them
    lines, columns,  # patches below each other and side by side
    num_globals,
    r_sequence: tl.int64, r_row: tl.int64,  # strides, which count UNIT elements
    r_element,  # stride in elements; specialised, so that 1 is a constant
    PH: tl.constexpr, PW: tl.constexpr,  # a patch
    UNIT: tl.constexpr,  # elements in one access: 16 bytes where patch, width and strides allow it
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,  # lines and pixels of a tile
):  # fmt: skip
    channels, depth, height, lines, columns = scalars((channels, depth, height, lines, columns), tl.int32)
    num_globals = tl.cast(num_globals, tl.int32)
    width, r_sequence, r_row, r_element = scalars((width, r_sequence, r_row, r_element), tl.int64)
    pid = tl.program_id(0)
    across, down = tl.cdiv(width * UNIT, BLOCK_X).to(tl.int32), tl.cdiv(height, BLOCK_Y)
    tile_x, job = pid % across, pid // across
    tile_y, plane = job % down, job // down  # of the volume's B * channels * D planes
    d, channel, b = plane % depth, plane // depth % channels, plane // depth // channels
    y, x = tile_y * BLOCK_Y + tl.arange(0, BLOCK_Y), tile_x * BLOCK_X + tl.arange(0, BLOCK_X)
    row_y, row_x = num_globals + (y // PH).to(tl.int64) * columns, x // PW
    start = (b.to(tl.int64) * depth + d) * r_sequence + row_y * r_row
    start = start * UNIT + ((channel * PH + y % PH) * PW).to(tl.int64) * r_element
    within = row_x * r_row * UNIT + (x % PW) * r_element
    read = (y < lines * PH)[:, None] & (x < columns * PW)[None, :]
    found = tl.load(rows + start[:, None] + within[None, :], mask=read, other=0)
    target = (plane.to(tl.int64) * height + y) * width * UNIT
    mask = (y < height)[:, None] & (x < width * UNIT)[None, :]
    tl.store(volume + target[:, None] + x.to(tl.int64)[None, :], found.to(volume.dtype.element_ty), mask=mask)


def _unit(itemsize: int, pw: int, offsets: Sequence[int | torch.SymInt]) -> int:
    """The most elements, up to 16 bytes, that divide a patch's lines and all offsets.

    The patch first: offsets may be symbols, which what is asked of them fixes.
    """
    wide = [unit for unit in (16 // itemsize, 8 // itemsize, 4 // itemsize) if unit > 1 and pw % unit == 0]
    return next((unit for unit in wide if all([offset % unit == 0 for offset in offsets])), 1)


def _check(programs: int, rows: int, *counts: int) -> None:
    if programs > MAX_PROGRAMS or any([count > LIMIT for count in (rows, *counts)]):
        raise ValueError(
            f"volume is too large for backend 'triton': {rows} rows of a slice, {programs} programs; expected at most "
            "2**30 rows of a slice and pixels along an axis, and 2**31 - 1 programs"
        )


def _numbers(patch: list[int]) -> list[int]:
    """(channels, ph, pw) as numbers, also where torch traces sizes."""
    return [int(n) for n in patch]


def _patchify(
    x: Tensor,  # (B, channels, D, height, width); transposed (B*D, g + L, K)
    patch: list[int],  # (channels, ph, pw): what kernels are compiled for, as a model has one for good
    size: list[int],  # (D, height, width) of a volume
    num_globals: int,  # g
    volume_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    transposed: bool,  # from rows to a volume
) -> Tensor:  # (B*D, g + L, K); transposed (B, channels, D, height, width)
    (channels, ph, pw), (depth, height, width), g = _numbers(patch), size, num_globals
    pixels = channels * ph * pw
    lines, columns = height // ph, width // pw
    out = fake(x, patch, size, num_globals, volume_dtype, rows_dtype, transposed)
    if out.numel() == 0:
        return out
    length = g + lines * columns
    if transposed:
        r_sequence, r_row, r_element = x.stride()
        offsets = (x.storage_offset(), r_sequence, r_row, width)
        unit = _unit(min(x.element_size(), out.element_size()), pw, offsets) if r_element == 1 else 1
        block_y = 16 if ph > 8 else 8
        block_x = (2048 if unit > 1 else 512) // block_y
        programs = x.shape[0] * channels * triton.cdiv(width, block_x) * triton.cdiv(height, block_y)
        _check(programs, length, height, width, channels)
        launch(
            patchify_back_kernel if INTERPRETED else wrap_triton(patchify_back_kernel), (programs,), x.device,
            x, out, channels, depth, height, width // unit, lines, columns, g, r_sequence // unit, r_row // unit,
            r_element, PH=ph, PW=pw, UNIT=unit, BLOCK_Y=block_y, BLOCK_X=block_x,
        )  # fmt: skip
        return out
    *strides, v_pixel = x.stride()
    v_batch, v_channel, v_slice, v_line = strides
    unit = _unit(x.element_size(), pw, (x.storage_offset(), *strides)) if v_pixel == 1 else 1
    row = row_length(pixels, rows_dtype)
    block_k = min((256, 128, 64), key=lambda block: (-(-row // block) * block, -block))  # the fewest idle lanes
    block_r = (2048 if unit > 1 else 512) // block_k
    programs = triton.cdiv(row, block_k) * triton.cdiv(length, block_r) * out.shape[0]
    _check(programs, length, height, width, pixels)
    launch(
        patchify_kernel if INTERPRETED else wrap_triton(patchify_kernel), (programs,), x.device,
        x, out, depth, columns, length, g, v_batch // unit, v_channel // unit, v_slice // unit, v_line // unit,
        v_pixel, PH=ph, PW=pw, PIXELS=pixels, LENGTH=row, UNIT=unit, BLOCK_R=block_r, BLOCK_K=block_k,
    )  # fmt: skip
    return out


def fake(
    x: Tensor,  # as of `_patchify`
    patch: list[int],
    size: list[int],
    num_globals: int,
    volume_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    (channels, ph, pw), (depth, height, width) = _numbers(patch), size
    if transposed:
        return x.new_empty(x.shape[0] // depth, channels, *size, dtype=volume_dtype)
    row = row_length(channels * ph * pw, rows_dtype)
    length = num_globals + (height // ph) * (width // pw)
    return x.new_empty(x.shape[0] * depth, length, row, dtype=rows_dtype)


def adjoint(*arguments: Any) -> tuple[Any, ...]:
    return *arguments[:-1], not arguments[-1]


def _cost(
    x: Tensor,
    patch: list[int],
    size: list[int],
    num_globals: int,
    volume_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    transposed: bool,
) -> Cost:
    (channels, ph, pw), (depth, height, width) = _numbers(patch), size
    h, w, pixels = height // ph, width // pw, channels * ph * pw
    slices = x.shape[0] if transposed else x.shape[0] * depth
    if transposed:
        written = slices * channels * height * width * volume_dtype.itemsize
    else:
        written = slices * (num_globals + h * w) * row_length(pixels, rows_dtype) * rows_dtype.itemsize
    read = slices * h * w * pixels * x.element_size()
    return Cost(read, written, launches=1 if written else 0)


OP, _rows = linear(register, _patchify, adjoint, more_volumes, fake=fake, cost=_cost)


def patchify_triton(
    volume: Tensor,  # (B, channels, D, height, width), any strides
    patch: Sequence[int],  # (ph, pw) in pixels
    num_globals: int,  # g
    dtype: torch.dtype | None,
) -> Tensor:  # (B*D, g + L, K)
    """`patchify_ref` in one pass."""
    return _rows(
        volume, [volume.shape[1], *patch], [*volume.shape[2:]], num_globals, volume.dtype, dtype or volume.dtype, False
    )
