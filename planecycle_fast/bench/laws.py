"""How cost grows with the volume: exponents fitted to counted FLOPs and to measured times.

At D = H = W = n tokens a plane has n^2 tokens, and attention compares each with all of its plane: n * (n^2)^2 = n^5.
All n^3 tokens in one sequence: n^6. PlaneCycle's attention costs D-fold less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from .cells import PATCH
from .costs import flops

CUBES = (8, 12, 16, 24, 32)  # D = H = W in tokens, of the exponents of FLOPs
FIXED = 16  # H = W in tokens, and
DEPTHS = (16, 24, 32, 48, 64)  # D, of the exponents against D alone


class Law(NamedTuple):
    """Exponents of one mode."""

    mode: str
    cubes: float  # of attention's FLOPs against D = H = W
    depths: float  # of attention's FLOPs against D at fixed H and W
    attention: tuple[int, ...]  # FLOPs at `CUBES`


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ sizes^p, by least squares of the logarithms. ValueError for fewer than two sizes, or a zero."""
    if len(set(sizes)) < 2 or len(sizes) != len(values) or min(*sizes, *values) <= 0:
        raise ValueError(
            f"sizes must be two different ones or more, with one positive value each, got {sizes}, {values}"
        )
    x, y = ([math.log(value) for value in found] for found in (sizes, values))
    return statistics.linear_regression(x, y).slope


def cube(n: int) -> str:
    """The volume of n x n x n tokens."""
    return f"1x{n}x{n * PATCH}"


def fit_laws(model: str, modes: Sequence[str]) -> list[Law]:
    """Exponents of attention's FLOPs in inference, counted by torch.utils.flop_counter."""
    found = []
    for mode in modes:
        cubes = [flops(model, mode, cube(n), "inference").attention for n in CUBES]
        deep = [flops(model, mode, f"1x{depth}x{FIXED * PATCH}", "inference").attention for depth in DEPTHS]
        found.append(Law(mode, fit_exponent(CUBES, cubes), fit_exponent(DEPTHS, deep), tuple(cubes)))
    return found
