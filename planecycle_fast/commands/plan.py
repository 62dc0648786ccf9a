"""`planecycle-fast plan`: what a volume will cost in each mode, and the largest one that fits, before anything runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import nn

from ..bench.timing import this_cpu
from ..cost.gpus import MEASURED_HOST, Machine, gpu
from ..cost.planning import PASSES, Planned, plan
from ..inputs import dtype_of, parse_shape, with_channels
from ..lifting import lift
from ..runtime.repeats import first_rounds_only
from ..weights.load import model_without_weights

DTYPES = ("fp32", "bf16", "fp16")  # of `inputs.DTYPES`: what ceilings are known for
MODES = {
    "slice2d": {"mode": "slice2d"},
    "PCg": {"pool_method": "PCg"},
    "PCm": {"pool_method": "PCm"},
    "flatten3d": {"mode": "flatten3d"},
}
# Of the ceilings at worst: matrix products, then bandwidth, with a wait for each launch, while the host is as slow as
# it was at times. Between this and all at once, as fast as any was measured, lies the time.
PRODUCTS, BANDWIDTH, HOST = 0.33, 0.6, 0.6
COLUMNS = {  # and their widths
    "mode": 9, "FLOPs": 7, "moved": 7, "launches": 8, "at best": 7, "at worst": 8, "limit": 9, "peak": 7, "in all": 7,
    "slices": 9,
}  # fmt: skip
MOST, SECANTS = 2**20, 8  # slices; steps
USABLE = 0.92  # of a device's memory: the rest is the driver's, and lost between allocations


class Times(NamedTuple):
    """Of one step, in seconds."""

    shortest: float
    longest: float
    limit: str  # what takes as long as the shortest: "products", "bandwidth", "launches" or "host"


class Cost(NamedTuple):
    """One mode."""

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
) -> Iterator[Cost]:
    """All modes, in order, each when it is known."""
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
                    with first_rounds_only():
                        kept[depth] = planned(depth).total_bytes
                except ValueError:  # more than an operation takes
                    kept[depth] = sys.maxsize
            return kept[depth]

        fits = deepest(needs, USABLE * machine.memory, shape[2])
        yield Cost(mode, one, seconds(one, machine, dtype), fits)


def chosen_machine(
    gpu_name: str | None,
    dtype: torch.dtype,
    graph: bool = False,
    launch_us: float | None = None,
    block_us: float | None = None,
) -> Machine:
    """What `run_plan` plans for, by its arguments. Raises ValueError, naming one that is wrong or has no meaning."""
    given = {name: us for name, us in (("launch", launch_us), ("block", block_us)) if us is not None}
    if gpu_name is None and (graph or given):
        raise ValueError("graph, launch_us and block_us are of a GPU: give them with gpu")
    if graph and given:
        raise ValueError("launch_us and block_us are of a host that the GPU waits for: with graph it waits for none")
    for name, us in given.items():
        if not 0 <= us < math.inf:
            raise ValueError(f"{name}_us must be microseconds, 0 or more, got {us}")
    if gpu_name is None:
        return this_cpu(dtype)
    machine = gpu(gpu_name)
    host = None if graph else machine.host._replace(**{name: us * 1e-6 for name, us in given.items()})
    return machine._replace(host=host)


def run_plan(
    model: str,
    volume: str,
    gpu_name: str | None,
    dtype: str | None,
    step: str,
    modes: str | None,
    graph: bool = False,
    launch_us: float | None = None,
    block_us: float | None = None,
) -> int:
    """Prints a table; returns 1 where the volume does not fit in a mode.

    Args:
        model: a name, as `models.load_model` takes it.
        volume: as `inputs.parse_shape` takes it.
        gpu_name: one of `gpus.GPUS`; None: this machine's CPU, whose ceilings are measured.
        dtype: one of `DTYPES`; None: bf16 on a GPU, fp32 on the CPU.
        step: inference, probe or finetune.
        modes: names of `MODES` separated by commas; None: all that the model can be lifted in.
        graph: on a GPU, replayed as a CUDA graph: no host to wait for.
        launch_us, block_us: what the GPU's host takes, as `gpus.Host`, in microseconds; None: as was measured once.

    Raises ValueError, naming the argument, before anything is planned.
    """
    shape = parse_shape(volume)
    dtype = dtype or ("fp32" if gpu_name is None else "bf16")
    number = dtype_of(dtype, DTYPES)
    chosen = [one.strip() for one in modes.split(",")] if modes else list(MODES)
    if unknown := [one for one in chosen if one not in MODES]:
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {unknown[0]!r}")
    machine = chosen_machine(gpu_name, number, graph, launch_us, block_us)
    host = model_without_weights(model)
    shape = with_channels(shape, host)
    refused = {} if modes else _refused(host)
    chosen = [mode for mode in chosen if mode not in refused]
    title = f"{model}, volume {volume}, {dtype}, {step}, on {machine.name}{', as a CUDA graph' if graph else ''}"
    found = []
    for cost in costs(host, shape, machine, number, "cpu" if gpu_name is None else "cuda", step, chosen):
        if not found:  # what is wrong with the model or the volume has been refused by now
            print(f"{title}\n{_line(COLUMNS)}")
        p, times = cost.planned, cost.times
        row = (
            cost.mode, _si(p.flops), _si(p.read + p.written, "B"), str(p.launches),
            _si(times.shortest, "s"), _si(times.longest, "s"), times.limit,
            _si(p.peak_bytes, "B"), _si(p.total_bytes, "B"), f"{cost.depth:,}",
        )  # fmt: skip
        print(_line(row), flush=True)
        found.append(cost)
    for mode, reason in refused.items():
        print(f"{mode}: {reason}")
    one = found[0].planned
    products, bandwidth = machine.reached
    print(
        f"Weights: {_si(one.weight_bytes, 'B')}. Peak: what lives above weights and volume. In all: with\n"
        f"both, and in training with AdamW's moments. Planned are the operations of: {one.path}.\n"
        f"Time is a range from a roofline, not a measurement: products and bandwidth at once, at\n"
        f"{products:.0%} and {bandwidth:.0%}, or one after the other at {PRODUCTS:.0%} and {BANDWIDTH:.0%}, and "
        f"{machine.launch[1] * 1e6:.0f} us per launch.\n"
        f"{_about_host(machine)}Limit: what takes longest at best.\n"
        f"Slices: of the deepest volume as wide as this one, as many in a batch, that fits into {USABLE:.0%} of\n"
        f"{_si(machine.memory, 'B')} of memory, and that operations take."
    )
    return int(any([cost.planned.total_bytes > USABLE * machine.memory for cost in found]))


def _refused(model: nn.Module) -> dict[str, str]:
    """The modes that a model cannot be lifted in, and why. Raises ValueError where that is all of them."""
    reasons = {}
    for mode, settings in MODES.items():
        try:
            lift(model, **settings)
        except ValueError as error:
            reasons[mode] = str(error)
            if len(reasons) == len(MODES):
                raise
    return reasons


def _line(values: Iterable[str]) -> str:
    """A row of the table, in columns that are known before its other rows are."""
    first, *rest = zip(values, COLUMNS.values())
    return " ".join([f"{first[0]:<{first[1]}}", *[f"{value:>{width}}" for value, width in rest]])


def _about_host(machine: Machine) -> str:
    if machine.host is None:
        return ""
    launch, block = machine.host.launch * 1e6, machine.host.block * 1e6
    source = "as given"
    if machine.host == MEASURED_HOST:
        source = "measured on one slow host,\n--launch-us and --block-us are for others"
    return (
        f"The host takes {launch:.0f} us per launch and {block:.0f} us per block, in finetune {PASSES['finetune']} "
        f"times\nthe latter, at worst as if {HOST:.0%} as fast: {source}.\n"
    )


def _si(value: float, unit: str = "") -> str:
    """Three significant digits, with a prefix of the SI."""
    power = max(-2, min(5, math.floor(math.log10(value) / 3))) if value > 0 else 0
    return f"{value / 1000**power:.3g} {['u', 'm', '', 'k', 'M', 'G', 'T', 'P'][power + 2]}{unit}".strip()
