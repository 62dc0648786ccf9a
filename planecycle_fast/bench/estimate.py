"""How long a sweep will take: what the device computes, what the host needs besides, and what compiles first.

On a GPU most of a short sweep is the host's: launches, operations counted without data, plans, profiles. Its speed is
therefore measured before anything is announced, on a model of a few blocks, and `sweep` corrects what is left by what
the groups that are done have taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import AUTHORS, AUTHORS_COMPILED, COMPILED, FAST, GRAPH, MODES, PEER, PEERS, REFERENCE, Cell  # fmt: skip
from .contenders import REPO, make, vit
from .costs import flops
from .measure import Effort
from .timing import synchronise

BLOCKS = {"ViT-S": 12, "ViT-B": 12, "ViT-L": 24, "ViT-7B": 40} | dict.fromkeys(PEERS, 12)  # peers: as many launches
# What is reached of the rate of a large product: by our code, and by the reference and the authors'. On an H100 0.30 to
# 0.51 and 0.14 to 0.33 (ViT-S to L, 8x32x512).
OF_CEILING = {"cuda": (0.4, 0.22), "cpu": (0.6, 0.5)}
FLOAT32 = 8  # times that the reference in float32 takes of a pass on tensor cores
# In passes of the host without gradients. From the first run on an H100 (ViT-S, 4x64x64: 18.9 ms, 65 to 86 ms with
# backward, 2.8 ms as a graph).
STEPS = {"inference": 1.0, "probe": 1.2, "finetune": 4.0}
REPLAY, CAPTURE, MADE, MADE_OF_OTHERS = 0.15, 5, 1, 8
PLANNED = 0.85  # of the time in which the operations of a pass are counted: it is planned, or metered
PROFILED = {"cuda": 0.4, "cpu": 0.05}  # seconds of one profile, beside what it looks at
FIRST_PROFILE = 3.0  # on CUDA, which loads its library
GROUP, COMPILES = 0.3, 45.0  # seconds of each group; of torch.compile
PROBED = 4  # blocks


class HostSpeed(NamedTuple):
    """Seconds that the host needs."""

    block: float  # of a pass without gradients, too small to keep the device busy
    kernels: float  # until the kernels of a new mode are compiled, forward


# Where nothing can be measured: 2.2 to 2.4 ms per block on the slow cores beside an H100, 0.8 to 1.6 s per mode.
UNKNOWN = HostSpeed(2.3e-3, 1.2)


def measured(device: torch.device, dtype: torch.dtype) -> HostSpeed:
    """Of this machine, in a few seconds."""
    try:
        volume = torch.zeros(1, 3, 2, 32, 32, device=device, dtype=dtype)
        model = vit("ViT-S", device, dtype, depth=PROBED)
        runs = [make(model, mode, FAST, volume) for mode in ("PCg", "PCm")]
        again = sorted([_seconds(runs[0], volume, device) for _ in range(4)][1:])[1]
        return HostSpeed(again / PROBED, max(0.0, _seconds(runs[1], volume, device) - again))
    except Exception:  # a library that is missing, a kernel that is broken: what will be said when cells are measured
        return UNKNOWN


def _seconds(run: Callable[[Tensor], Any], volume: Tensor, device: torch.device) -> float:
    synchronise(device)
    began = perf_counter()
    with torch.no_grad():
        run(volume)
    synchronise(device)
    return perf_counter() - began


class Estimator:
    """Seconds of groups."""

    def __init__(self, device: torch.device, host: HostSpeed, effort: Effort) -> None:
        self.device, self.host, self.effort = device, host, effort
        self.compiled: set[tuple[str, str, bool]] = set()  # dtype, mode, whether backward
        self.profiled = False

    def seconds(self, group: Sequence[Cell], ceiling: float) -> float:
        """Of one group, on a device that reaches `ceiling` FLOP/s, without what happens `once`."""
        group = [cell for cell in group if REPO in os.environ or cell.code not in (AUTHORS, AUTHORS_COMPILED)]
        try:
            counts, times = {}, {}
            for cell in group:
                began = perf_counter()
                reached = OF_CEILING.get(self.device.type, OF_CEILING["cpu"])[cell.code in (REFERENCE, AUTHORS)]
                times[cell] = flops(cell.model, cell.mode, cell.volume, cell.step).total / ceiling / reached
                counts[cell.mode] = max(counts.get(cell.mode, 0.0), perf_counter() - began)
        except Exception:  # a library that is missing: what will be said when the cell is measured
            return 1.0
        calls = {cell: self._call(cell, times[cell]) for cell in group}
        rounds = self.effort.rounds * sum(calls.values())
        timed = min(rounds, max(self.effort.seconds, 3 * sum(calls.values())))
        prepared = sum([self._prepare(cell, calls[cell], times[cell], counts[cell.mode]) for cell in group])
        first = {(cell.mode, cell.code == REFERENCE or "authors" in cell.code): cell for cell in group}
        plans = sum([PLANNED * counts[cell.mode] for cell in first.values()])
        references = sum([self._reference(cell, times[cell]) for cell in {c.mode: c for c in group}.values()])
        return GROUP + plans + references + prepared + self.effort.warmups * sum(calls.values()) + timed

    def _pass(self, cell: Cell) -> float:
        """The host's time of a pass without gradients."""
        return BLOCKS[cell.model] * self.host.block

    def _call(self, cell: Cell, computes: float) -> float:
        share = REPLAY if cell.code == GRAPH else STEPS[cell.step]
        return max(computes, share * self._pass(cell))

    def _prepare(self, cell: Cell, call: float, computes: float, count: float) -> float:
        """Until a contender may be timed: made, compared, its memory and launches looked at."""
        passes = {GRAPH: CAPTURE, AUTHORS: MADE_OF_OTHERS, AUTHORS_COMPILED: MADE_OF_OTHERS}.get(cell.code, MADE)
        features = 0.0 if cell.step == "inference" else max(self._pass(cell), computes / 3)
        passes *= STEPS[cell.step] if cell.code == GRAPH else 1  # which captures backward as well
        seconds = passes * self._pass(cell) + features + 2 * call
        if cell.code in (AUTHORS, PEER):
            seconds += PLANNED * count + call
        if self.device.type == "cuda":
            seconds += PROFILED["cuda"] + 2 * call  # its launches
        else:
            seconds += PROFILED["cpu"]  # its memory
        return seconds + (COMPILES if cell.code in (COMPILED, AUTHORS_COMPILED) else 0.0)

    def _reference(self, cell: Cell, computes: float) -> float:
        """What a mode's outputs are compared with; of peers nothing."""
        if cell.code == PEER:
            return 0.0
        slower = FLOAT32 if self.device.type == "cuda" and cell.dtype != "fp32" else 1
        both = 1.0 if cell.step == "inference" else 1.0 + STEPS[cell.step]
        return (MADE + both) * self._pass(cell) + slower * computes * (1.0 if cell.step == "inference" else 4 / 3)

    def once(self, group: Sequence[Cell]) -> float:
        """Seconds of what happens in the first group that needs it: kernels compile, the profiler starts."""
        found = 0.0
        for cell in group:
            kernels = cell.dtype, cell.mode, cell.step == "finetune"
            if cell.mode in MODES and cell.code == FAST and kernels not in self.compiled:
                self.compiled.add(kernels)
                found += self.host.kernels * (2 if kernels[2] else 1)
        if self.device.type == "cuda" and not self.profiled:
            self.profiled = True
            found += FIRST_PROFILE
        return found
