"""Which kernel of self_attention takes how many rows, in which tiles; and what share of its products is useful.

Chosen without a GPU, but for what is said to be measured on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ONE_TILE = 64  # rows that one tile takes
SHORT = 320  # rows whose keys one program holds


class Tiles(NamedTuple):
    """Of a launch."""

    regime: str  # "tile", "short", "general"
    queries: int  # rows of a tile
    keys: tuple[int, ...]  # of a tile; "short": of all three, 0 where there are fewer
    warps: int
    stages: int
    heads: int = 1  # of a program


def tiles(
    rows: int | torch.SymInt,  # of a sequence; of a symbol nothing is asked
    head_dim: int,
    dtype: torch.dtype,
) -> Tiles:
    """What a launch takes."""
    if not isinstance(rows, int) or rows > SHORT:
        return Tiles("general", 64, (64,), 4, 3)
    if rows <= 32:
        block = 16 if rows <= 16 else 32
        return Tiles("tile", block, (block,), 1, 1, 2)
    if rows <= ONE_TILE:
        return Tiles("tile", 64, (64,), 4, 1, 2)
    return Tiles("short", 64, key_tiles(rows), 4, 1)


def key_tiles(rows: int) -> tuple[int, int, int]:
    """Powers of two, the larger first, that cover the keys of at most 320 rows with the fewest idle lanes; 0: none.

    All but the last are full.
    """
    sizes = (128, 64, 32, 16)
    found = [(a, b, c) for a in sizes for b in (*sizes, 0) for c in (*sizes, 0) if a >= b >= c and a + b + c >= rows]
    full = [tiles for tiles in found if sum(tiles) - min([size for size in tiles if size]) < rows]
    return min(full, key=lambda tiles: (sum(tiles), -tiles.count(0)))
