"""Which kernel of self_attention takes how many rows, in which tiles; and what share of its products is useful.

Chosen without a GPU, but for what is said to be measured on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SHORT = 320  # rows whose keys one program holds
HEADS = 2  # of a program with one tile: enough to share sine and cosine, few enough for many programs
WIDE = 64  # channels of a head


class LaunchTiles(NamedTuple):
    """Of a launch."""

    regime: str  # "tile", "short", "general"
    queries: int  # rows of a tile
    keys: int
    warps: int
    stages: int
    heads: int = 1  # of a program
    full: int = 0  # tiles of keys, "short" only,
    tail: int = 0  # and keys of one that is less; 0: none
    precision: str = ""  # of products of float32, if it is not as asked


# One tile, by whether products are of 16 bits, whether heads are wide, and rows: warps.
TILE = {
    # 32 rows, 1 warp, 2 heads: measured on an H100, 0.505 ms for 2^18 rows of 21 with 6 heads of 64 (prototype).
    # All others: static, the fewest warps that keep no register in memory on sm_80, 90, 100 and 120.
    (True, False): {16: 1, 32: 1, 64: 4},
    (True, True): {16: 1, 32: 2},
    (False, False): {16: 2, 32: 4},
    (False, True): {16: 4},
}
# Any rows, by kind of products, and whether heads are wide.
GENERAL = {
    # Measured on an H100, 1.39 ms for 2^18 rows of 1029 with 6 heads of 64 (prototype; FA3 1.43).
    ("16-bit", False): LaunchTiles("general", 64, 64, 4, 3),
    # All others: static, the largest tiles that keep no register in memory on sm_80, 90, 100 and 120.
    ("16-bit", True): LaunchTiles("general", 64, 32, 8, 1),
    ("tf32", False): LaunchTiles("general", 64, 32, 4, 2),
    ("tf32", True): LaunchTiles("general", 32, 32, 8, 1),
    ("tf32x3", False): LaunchTiles("general", 64, 16, 4, 2),
    ("tf32x3", True): LaunchTiles("general", 16, 16, 4, 1),
    ("ieee", False): LaunchTiles("general", 32, 16, 8, 1),
    ("ieee", True): LaunchTiles("general", 32, 16, 8, 1),
}


def tiles(
    rows: int | torch.SymInt,  # of a sequence; of a symbol nothing is asked
    head_dim: int,
    dtype: torch.dtype,
    precision: str = "tf32x3",  # of products of float32
) -> LaunchTiles:
    """What a launch takes."""
    kind = "16-bit" if dtype.itemsize == 2 else "ieee" if dtype == torch.float64 else precision
    wide = head_dim > WIDE
    warps = TILE[kind == "16-bit", wide]
    if one_tile(rows, head_dim, dtype):
        block = next(size for size in warps if size >= rows)
        return LaunchTiles("tile", block, block, warps[block], 1, HEADS)
    if holds_keys(rows, head_dim, dtype):
        return LaunchTiles("short", 64, 64, 4, 1, 1, *in_tiles(int(rows), 64))
    return GENERAL[kind, wide]


def one_tile(
    rows: int | torch.SymInt,  # as of `tiles`
    head_dim: int,
    dtype: torch.dtype,
) -> bool:
    """Whether a program holds all rows of a sequence."""
    return isinstance(rows, int) and rows <= max(TILE[dtype.itemsize == 2, head_dim > WIDE])


def holds_keys(
    rows: int | torch.SymInt,  # as of `tiles`
    head_dim: int,
    dtype: torch.dtype,
) -> bool:
    """Whether a program holds all keys of a sequence and head, so that they turn once.

    In float32 they do not fit next to their products' parts, and wider heads not into the shared memory of an sm_120.
    """
    if dtype.itemsize == 2 and head_dim <= WIDE:
        return isinstance(rows, int) and rows <= SHORT
    return one_tile(rows, head_dim, dtype)


def in_tiles(rows: int, size: int) -> tuple[int, int]:
    """Full tiles of keys, and a power of two from 16 on that takes the rest, or 0."""
    full, rest = divmod(rows, size)
    return full, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def channel_tiles(head_dim: int) -> tuple[int, int]:
    """Channels of half a head and of a head, as tiles hold them: powers of two, and what a tensor core takes."""
    return max(16, 1 << (head_dim // 2 - 1).bit_length()), max(16, 1 << (head_dim - 1).bit_length())


def useful_share(
    rows: int,  # all as of `tiles`
    head_dim: int,
    dtype: torch.dtype,
) -> float:
    """Of the multiply-adds that a launch issues, those that are not padding: both products, tiles as they are."""
    chosen, (half, whole) = tiles(rows, head_dim, dtype), channel_tiles(head_dim)
    queries = -(-rows // chosen.queries) * chosen.queries
    keys = -(-rows // chosen.keys) * chosen.keys if chosen.regime == "general" else chosen.keys
    if chosen.regime == "short":
        keys = chosen.full * chosen.keys + chosen.tail
    return rows**2 * 2 * head_dim / (queries * keys * (2 * half + whole))
