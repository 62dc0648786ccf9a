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
    keys: int
    warps: int
    stages: int
    heads: int = 1  # of a program
    full: int = 0  # tiles of keys, "short" only,
    tail: int = 0  # and keys of one that is less; 0: none


def tiles(
    rows: int | torch.SymInt,  # of a sequence; of a symbol nothing is asked
    head_dim: int,
    dtype: torch.dtype,
) -> Tiles:
    """What a launch takes."""
    if not isinstance(rows, int) or rows > SHORT:
        return Tiles("general", 64, 64, 4, 3)
    if rows <= 32:
        block = 16 if rows <= 16 else 32
        return Tiles("tile", block, block, 1, 1, 2)
    if rows <= ONE_TILE:
        return Tiles("tile", 64, 64, 4, 1, 2)
    return Tiles("short", 64, 64, 4, 1, 1, *in_tiles(rows, 64))


def in_tiles(rows: int, size: int) -> tuple[int, int]:
    """Full tiles of keys, and a power of two from 16 on that takes the rest, or 0."""
    full, rest = divmod(rows, size)
    return full, max(16, 1 << (rest - 1).bit_length()) if rest else 0
