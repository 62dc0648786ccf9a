"""`planecycle-fast plan`: what a volume will cost in each mode, and the largest one that fits, before anything runs."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch

from .gpus import Machine, gpu, this_cpu
from .optional import require
from .planning import Planned, plan
from .torchvision_fix import mend_torchvision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {
    "slice2d": {"mode": "slice2d"},
    "PCg": {"pool_method": "PCg"},
    "PCm": {"pool_method": "PCm"},
    "flatten3d": {"mode": "flatten3d"},
}
# What is reached of the ceilings at worst: of matrix products and of bandwidth, one after the other, with a wait for
# each launch. Between this and both at once at full speed lies the time.
PRODUCTS, BANDWIDTH, LAUNCH = 0.35, 0.6, 10e-6
MOST, SECANTS = 2**20, 8  # slices; steps
USABLE = 0.92  # of a device's memory: the rest is the driver's, and lost between allocations


class Cost(NamedTuple):
    """One mode."""

    mode: str
    planned: Planned
    shortest: float  # seconds
    longest: float
    depth: int  # slices of the deepest volume that fits, 0: none


def parse_shape(text: str) -> tuple[int, int, int, int, int]:
    """(B, 3, D, height, width) of "BxDxS" (slices of S x S pixels) or "BxDxHxW". ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise ValueError(f"volume must be like 1x32x256 (batch x slices x pixels) or 1x32x256x192, got {text!r}")
    numbers = [int(part) for part in text.split("x")]
    return numbers[0], 3, numbers[1], numbers[2], numbers[-1]


def seconds(planned: Planned, machine: Machine, dtype: torch.dtype) -> tuple[float, float]:
    """The shortest and the longest time of a roofline."""
    products, moved = planned.flops / machine.flops[dtype], (planned.read + planned.written) / machine.bandwidth
    return max(products, moved), products / PRODUCTS + moved / BANDWIDTH + planned.launches * LAUNCH


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
    model: str,
    shape: tuple[int, ...],  # (B, 3, D, height, width)
    machine: Machine,
    dtype: torch.dtype,
    device: str,
    step: str,
    modes: list[str],
) -> list[Cost]:
    """All modes, in order."""
    made = []
    for mode in modes:

        def planned(depth: int, mode: str = mode) -> Planned:
            at = (*shape[:2], depth, *shape[3:])
            return plan(model, at, dtype=dtype, device=device, step=step, **MODES[mode])

        one, kept = planned(shape[2]), {}
        kept[shape[2]] = one.total_bytes
        kept[0] = one.weight_bytes + one.optimizer_bytes

        def needs(depth: int, kept: dict[int, int] = kept, planned: Callable[[int], Planned] = planned) -> int:
            if depth not in kept:
                try:
                    kept[depth] = planned(depth).total_bytes
                except ValueError:  # more than an operation takes
                    kept[depth] = sys.maxsize
            return kept[depth]

        fits = deepest(needs, USABLE * machine.memory, shape[2])
        made.append(Cost(mode, one, *seconds(one, machine, dtype), fits))
    return made


def run_plan(model: str, volume: str, gpu_name: str | None, dtype: str | None, step: str, modes: str | None) -> int:
    """Prints a table; returns 1 where the volume does not fit in a mode.

    Args:
        model: a name, as `models.load_model` takes it.
        volume: as `parse_shape` takes it.
        gpu_name: one of `gpus.GPUS`; None: this machine's CPU, whose ceilings are measured.
        dtype: one of `DTYPES`; None: bf16 on a GPU, fp32 on the CPU.
        step: inference, probe or finetune.
        modes: names of `MODES` separated by commas; None: all.

    Raises ValueError, naming the argument, before anything is planned.
    """
    shape = parse_shape(volume)
    dtype = dtype or ("fp32" if gpu_name is None else "bf16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    chosen = [one.strip() for one in modes.split(",")] if modes else list(MODES)
    if unknown := [one for one in chosen if one not in MODES]:
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {unknown[0]!r}")
    rich_table, console = require("rich.table", "bench"), require("rich.console", "bench").Console()
    mend_torchvision()
    machine = gpu(gpu_name) if gpu_name is not None else this_cpu(DTYPES[dtype])
    found = costs(model, shape, machine, DTYPES[dtype], "cpu" if gpu_name is None else "cuda", step, chosen)
    title = f"{model}, volume {volume}, {dtype}, {step}, on {machine.name}"
    table = rich_table.Table(box=None, padding=(0, 1, 0, 0))
    for name in ("mode", "FLOPs", "moved", "launches", "at best", "at worst", "peak", "in all", "slices"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for cost in found:
        p = cost.planned
        table.add_row(
            cost.mode, _si(p.flops), _si(p.read + p.written, "B"), str(p.launches), _si(cost.shortest, "s"),
            _si(cost.longest, "s"), _si(p.peak_bytes, "B"), _si(p.total_bytes, "B"), f"{cost.depth:,}",
        )  # fmt: skip
    print(title)
    console.print(table)
    one = found[0].planned
    print(
        f"Weights: {_si(one.weight_bytes, 'B')}. Peak: what lives above weights and volume. In all: with\n"
        f"both, and in training with AdamW's moments. Planned are the operations of: {one.path}.\n"
        f"Time is a range from a roofline, not a measurement: products and bandwidth at once and in full, or one\n"
        f"after the other at {PRODUCTS:.0%} and {BANDWIDTH:.0%}, and {LAUNCH * 1e6:.0f} us per launch.\n"
        f"Slices: of the deepest volume as wide as this one, as many in a batch, that fits into {USABLE:.0%} of\n"
        f"{_si(machine.memory, 'B')} of memory, and that operations take."
    )
    return int(any([cost.planned.total_bytes > USABLE * machine.memory for cost in found]))


def _si(value: float, unit: str = "") -> str:
    """Three significant digits, with a prefix of the SI."""
    power = max(-2, min(5, math.floor(math.log10(value) / 3))) if value > 0 else 0
    return f"{value / 1000**power:.3g} {['u', 'm', '', 'k', 'M', 'G', 'T', 'P'][power + 2]}{unit}".strip()
