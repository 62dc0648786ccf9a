"""Which tiles `linear_gelu` computes in, and where it is faster than a linear layer followed by GELU.

Each row says where its figure comes from: measured, or static, with the reason.
"""

from __future__ import annotations

from typing import NamedTuple

ALIGNED = 16  # bytes: where rows start, as tensor descriptors need it
LEAST_ROWS = 65_536  # static: half of the fewest rows that were measured; small products are the host's time


class Tiling(NamedTuple):
    """What a program computes at once, and with how much of a GPU."""

    rows: int
    hidden: int
    channels: int  # of a step of the product
    parts: int  # in which the result is activated and stored: less of it in shared memory and registers at a time
    warps: int
    stages: int  # steps that are loaded ahead
    programs: int = 1  # at once on a multiprocessor: one activates while another multiplies


# Measured on an H100 (prototype, C = 384, 768, 1024 to 4 C): the fastest of five, of 128 x 256 and 128 x 128 tiles, 4
# and 8 warps, 3 and 4 stages, whole and halved. Warp specialisation changed that with 3 stages by 1 % or less.
# Static: consecutive tiles share rows of x, and weights of 1 to 8 MB stay in the L2 cache, so no other order is tried.
WIDE = Tiling(128, 256, 64, 2, 8, 4)
NARROW = Tiling(128, 128, 64, 1, 8, 4)  # static: hidden channels that would leave half of a wide tile idle
CANDIDATES = (  # worth timing besides: `python -m benchmarks.gpu --only tiles`
    Tiling(128, 256, 64, 2, 8, 3),
    Tiling(128, 128, 64, 2, 8, 2, 2),
    Tiling(128, 128, 64, 2, 8, 3, 2),
    Tiling(128, 128, 32, 2, 8, 4, 2),
    NARROW,
)

MEASURED = {  # (compute capability, C, hidden): rows, and ms of the prototype, of linear then gelu_, on an H100, bf16
    (9, 384, 1536): (263_424, 0.935, 1.119),
    (9, 768, 3072): (263_424, 2.745, 3.042),
    (9, 1024, 4096): (131_712, 2.217, 2.358),
}


class EpilogueRow(NamedTuple):
    """Of the table."""

    wins: bool
    why: str


def tiling(hidden: int) -> Tiling:
    """For so many hidden channels."""
    return WIDE if hidden % WIDE.hidden == 0 or hidden % WIDE.hidden > NARROW.hidden else NARROW


def row(
    capability: int,  # the major compute capability of an NVIDIA GPU
    channels: int,
    hidden: int,
) -> EpilogueRow:
    """Whether fc1 takes GELU into its epilogue there, and why."""
    if (found := MEASURED.get((capability, channels, hidden))) is not None:
        rows, ours, others = found
        return EpilogueRow(True, f"measured on an H100: {ours:.3g} ms for {others:.3g} at {rows:,} rows (prototype)")
    if capability == 9 and hidden == 4 * channels and 384 <= channels <= 1024:
        return EpilogueRow(True, "static: between widths where it was measured to win on an H100")
    where = f"from {channels} to {hidden} channels" if capability == 9 else f"on compute capability {capability}.x"
    return EpilogueRow(False, f"static: not measured {where}")
