"""What each mode of a model costs on a machine: its time, as a range, and the deepest volume that fits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import nn

from ..runtime.repeats import first_rounds_only
from .gpus import BANDWIDTH, HOST, PRODUCTS, USABLE, Machine
from .planning import Planned, plan

MODES = {  # name: settings of `lift`
    "slice2d": {"mode": "slice2d"},
    "PCg": {"pool_method": "PCg"},
    "PCm": {"pool_method": "PCm"},
    "flatten3d": {"mode": "flatten3d"},
}
MOST, SECANTS = 2**20, 8  # slices; steps


class Times(NamedTuple):
    """Of one step, in seconds."""

    shortest: float
    longest: float
    limit: str  # what takes as long as the shortest: "products", "bandwidth", "launches" or "host"


class ModeCost(NamedTuple):
    """Of one step in one mode."""

    mode: str
    planned: Planned
    times: Times
    depth: int  # slices of the deepest volume that fits, 0: none


def seconds(planned: Planned, machine: Machine, dtype: torch.dtype) -> Times:
    """A range from a roofline. A GPU and its host work at the same time: the slower one decides."""
    products, moved = planned.flops / machine.flops[dtype], (planned.read + planned.written) / machine.bandwidth
    host = 0.0 if machine.host is None else machine.host.seconds(planned.launches, planned.blocks)
    best = {
        "products": products / machine.reached[0],
        "bandwidth": moved / machine.reached[1],
        "launches": planned.launches * machine.launch[0],
        "host": host,
    }
    worst = products / PRODUCTS + moved / BANDWIDTH + planned.launches * machine.launch[1]
    limit = max(best, key=best.get)
    return Times(best[limit], max(worst, host / HOST), limit)


def deepest(needs: Callable[[int], int], available: float, depth: int) -> int:
    """The largest D with ``needs(D) <= available`` bytes, where `needs` grows with D; 0 where not even one slice fits.

    Memory is nearly proportional to D: secants from `depth` on find it in a few steps, and bisection whatever it is.
    """
    low, high, at, empty = 0, MOST + 1, min(depth, MOST), needs(0)
    for step in count():
        need = needs(at)
        low, high = (at, high) if need <= available else (low, at)
        if high - low <= 1:
            return low
        secant = round(at + (available - need) / max(1.0, (need - empty) / at))
        at = min(max(secant if step < SECANTS else (low + high) // 2, low + 1), high - 1)


def costs(
    model: nn.Module,
    shape: tuple[int, ...],  # (B, channels, D, height, width)
    machine: Machine,
    dtype: torch.dtype,
    device: str,
    step: str,
    modes: list[str],
) -> Iterator[ModeCost]:
    """All modes, in order, each when it is known."""

    def of(mode: str) -> ModeCost:
        def planned(depth: int) -> Planned:
            at = (*shape[:2], depth, *shape[3:])
            return plan(model, at, dtype=dtype, device=device, step=step, **MODES[mode])

        one = planned(shape[2])
        kept = {shape[2]: one.total_bytes, 0: one.weight_bytes + one.optimizer_bytes}

        def needs(depth: int) -> int:
            if depth not in kept:
                try:
                    with first_rounds_only():
                        kept[depth] = planned(depth).total_bytes
                except ValueError:  # more than an operation takes
                    kept[depth] = sys.maxsize
            return kept[depth]

        fits = deepest(needs, USABLE * machine.memory, shape[2])
        return ModeCost(mode, one, seconds(one, machine, dtype), fits)

    return map(of, modes)
