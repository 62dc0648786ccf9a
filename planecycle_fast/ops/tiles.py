"""What kernels can hold, and how those that hold whole rows cut them into tiles, chosen without a GPU or a timing.

`python -m benchmarks.gpu --only tiles` times the alternatives of `candidates` on a real GPU and says where another one
than `tile`'s is faster.
"""

from __future__ import annotations

from typing import NamedTuple

LARGEST_ROW = 8192  # channels
LIMIT = 2**30  # of what kernels count in 32 bits: tokens, rows, globals, products of slices; offsets are 64-bit
MAX_PROGRAMS = 2**31 - 1  # of a grid's first axis


class Tile(NamedTuple):
    """A tile of whole rows: `head` + `tail` channels, both powers of two, cover a row."""

    head: int
    tail: int  # 0: none
    rows: int
    warps: int


# (kernel, channels): what differs from the rule below, where ptxas keeps a few bytes of its tiles in local memory, on
# one GPU or another. Found by compiling for all of them; which are the fastest has not been measured. (Backward at 8192
# channels keeps up to 120 bytes there with any of them.)
TABLE: dict[tuple[str, int], Tile] = {
    ("forward", 384): Tile(256, 128, 2, 1),
    ("forward", 768): Tile(512, 256, 1, 1),
    ("forward", 1280): Tile(1024, 256, 1, 4),
    ("backward", 384): Tile(256, 128, 2, 1),
    ("backward", 768): Tile(512, 256, 1, 1),
    ("backward", 1024): Tile(1024, 0, 1, 2),
    ("backward", 1152): Tile(1024, 128, 1, 2),
    ("backward", 5120): Tile(4096, 1024, 1, 8),
}


def tile(kernel: str, channels: int) -> Tile:
    """The tile of a kernel ("forward", "backward") for rows of `channels`."""
    if found := TABLE.get((kernel, channels)):
        return found
    # 4 warps, and more for long rows. Backward keeps sums of columns as well, so a thread gets fewer elements.
    head, tail = pieces(channels)
    elements, thread = (3072, 24) if kernel == "forward" else (2048, 16)
    rows = max(1, min(8, _power_of_two_below(elements // (head + tail))))
    warps = -(-(head + tail) * rows // (32 * thread))
    return Tile(head, tail, rows, min(16, _power_of_two_below(2 * warps - 1)))


def pieces(channels: int) -> tuple[int, int]:
    """A power of two and a smaller one that cover a row with the fewest idle lanes."""
    whole = _power_of_two_below(channels)
    if whole == channels:
        return whole, 0
    rest = _power_of_two_below(2 * (channels - whole) - 1)
    return (2 * whole, 0) if rest == whole else (whole, rest)


def candidates(kernel: str, channels: int) -> list[Tile]:
    """Tiles worth timing: other numbers of rows and warps, and a row in one piece."""
    chosen = tile(kernel, channels)
    whole = 2 * _power_of_two_below(channels - 1)
    shapes = {(chosen.head, chosen.tail), pieces(channels), (whole, 0)}
    found = {Tile(*shape, rows, warps) for shape in shapes for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8, 16)
             if 8 <= sum(shape) * rows / (32 * warps) <= 32}  # fmt: skip
    return sorted(found | {chosen})


def _power_of_two_below(n: int) -> int:  # or equal
    return 1 << max(n, 1).bit_length() - 1
