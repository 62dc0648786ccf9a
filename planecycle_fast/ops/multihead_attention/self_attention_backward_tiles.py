"""How the backward kernels of self_attention cut their rows, chosen without a GPU or a timing.

Found by compiling for all GPUs: the largest tiles that keep no register in memory on any of them (sm_80, 90, 100, 120).
Three products of tf32 for one of float32 ("tf32x3") hold more than there are; fused multiply-adds ("ieee"), which are
more exact, run instead. In one tile, where memory is what takes the time, they do so for "tf32" as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .self_attention_tiles import WIDE  # of wider heads a program holds half as many rows

ONE_TILE = 64  # rows of a sequence that one program holds, at most


class Tiles(NamedTuple):
    """How a kernel is launched."""

    block: int  # rows of the tile that stays
    step: int  # of the tiles that pass; 0: there are none
    warps: int
    stages: int
    apart: bool = False  # keys only: their gradients and those of values one after the other
    precision: str = ""  # of products of float32, if it is not as asked


class Passes(NamedTuple):
    """Of more rows than a program holds."""

    queries: Tiles
    keys: Tiles


# by kind of products and whether heads are wide
GENERAL = {
    ("16-bit", False): Passes(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    ("16-bit", True): Passes(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
    ("tf32", False): Passes(Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 2, apart=True)),
    ("tf32", True): Passes(Tiles(64, 16, 4, 1), Tiles(32, 16, 4, 1, apart=True)),
}
EXACT = {  # whatever else was asked for, by whether heads are wide
    False: Passes(Tiles(32, 16, 8, 2, precision="ieee"), Tiles(32, 32, 8, 1, apart=True, precision="ieee")),
    True: Passes(Tiles(32, 16, 16, 2, precision="ieee"), Tiles(32, 16, 8, 1, apart=True, precision="ieee")),
}
# by whether products are of 16 bits, whether heads are wide, and rows: warps
ONE = {
    (True, False): {16: 1, 32: 2, 64: 8},
    (True, True): {16: 4, 32: 8},
    (False, False): {16: 4, 32: 8},
    (False, True): {16: 8},
}


def one_tile(
    rows: int | torch.SymInt,  # of a sequence
    dtype: torch.dtype,
    head_dim: int,
    axes: int = 2,  # of tables that queries and keys turn by
) -> Tiles | None:
    """Where a program can hold all rows; not where torch traces sizes, which may be any then."""
    if not isinstance(rows, int) or rows > ONE_TILE:
        return None
    block = next(size for size in (16, 32, 64) if size >= rows)
    warps = ONE[dtype.itemsize == 2, head_dim > WIDE].get(block)
    if warps == 2 and axes == 3:  # the third table is more than two warps hold, by 8 bytes
        warps = 4
    return None if warps is None else Tiles(block, 0, warps, 1, precision="ieee")


def passes(dtype: torch.dtype, head_dim: int, precision: str) -> Passes:
    """Of any number of rows."""
    kind, wide = "16-bit" if dtype.itemsize == 2 else precision, head_dim > WIDE
    return GENERAL.get((kind, wide), EXACT[wide])
