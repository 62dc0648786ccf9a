"""`planecycle-fast plan`: what a volume will cost in each mode, and the largest one that fits, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Optional

import torch
from torch import nn

from ..bench.table import with_unit
from ..cost import gpus
from ..cost.gpus import BANDWIDTH, HOST, KNOWN_DTYPES, MEASURED_HOST, PASSES, PRODUCTS, USABLE, Machine
from ..inputs import dtype_of, parse_shape, with_channels
from ..lifted import lift
from ..weights.load import model_without_weights
from .options import VOLUME, Argument, Option

COLUMNS = {  # and their widths
    "mode": 9, "FLOPs": 7, "moved": 7, "launches": 8, "at best": 7, "at worst": 8, "limit": 9, "peak": 7, "in all": 7,
    "slices": 9,
}  # fmt: skip


def run_plan(
    model: Annotated[str, Argument(help="A timm or Hugging Face name, or a folder; weights are not needed.")],
    volume: Annotated[str, Option(help=VOLUME)],
    gpu: Annotated[
        Optional[str], Option(help="h100, h200, a100, ...; it need not be there. Default: this CPU.")
    ] = None,
    dtype: Annotated[Optional[str], Option(help="fp32, bf16, fp16. Default: bf16 on GPUs, fp32 on the CPU.")] = None,
    step: Annotated[str, Option(help="inference, probe (a linear head is trained) or finetune.")] = "inference",
    modes: Annotated[Optional[str], Option(help="slice2d,PCg,PCm,flatten3d. Default: all.")] = None,
    graph: Annotated[bool, Option("--graph", help="Replayed as a CUDA graph: the GPU waits for no host.")] = False,
    launch_us: Annotated[Optional[float], Option(help="Of the GPU's host: microseconds per launch.")] = None,
    block_us: Annotated[Optional[float], Option(help="And per block: docs/command-line.md.")] = None,
) -> int:
    """What a volume will cost before anything runs: FLOPs, traffic, time, memory, and the largest that fits."""
    from ..cost.modes import MODES, costs  # which takes time to import

    shape = parse_shape(volume)
    dtype = dtype or ("fp32" if gpu is None else "bf16")
    number = dtype_of(dtype, KNOWN_DTYPES)
    chosen = [one.strip() for one in modes.split(",")] if modes else list(MODES)
    if unknown := [one for one in chosen if one not in MODES]:
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {unknown[0]!r}")
    machine = chosen_machine(gpu, number, graph, launch_us, block_us)
    host = model_without_weights(model)
    shape = with_channels(shape, host)
    refused = {} if modes else _refused(host, MODES)
    chosen = [mode for mode in chosen if mode not in refused]
    title = f"{model}, volume {volume}, {dtype}, {step}, on {machine.name}{', as a CUDA graph' if graph else ''}"
    found = []
    for cost in costs(host, shape, machine, number, "cpu" if gpu is None else "cuda", step, chosen):
        if not found:  # what is wrong with the model or the volume has been refused by now
            print(f"{title}\n{_line(COLUMNS)}")
        p, times = cost.planned, cost.times
        row = (
            cost.mode, with_unit(p.flops), with_unit(p.read + p.written, "B"), str(p.launches),
            with_unit(times.shortest, "s"), with_unit(times.longest, "s"), times.limit,
            with_unit(p.peak_bytes, "B"), with_unit(p.total_bytes, "B"), f"{cost.depth:,}",
        )  # fmt: skip
        print(_line(row), flush=True)
        found.append(cost)
    for mode, reason in refused.items():
        print(f"{mode}: {reason}")
    one = found[0].planned
    products, bandwidth = machine.reached
    print(
        f"Weights: {with_unit(one.weight_bytes, 'B')}. Peak: what lives above weights and volume. In all: with\n"
        f"both, and in training with AdamW's moments. Planned are the operations of: {one.path}.\n"
        f"Time is a range from a roofline, not a measurement: products and bandwidth at once, at\n"
        f"{products:.0%} and {bandwidth:.0%}, or one after the other at {PRODUCTS:.0%} and {BANDWIDTH:.0%}, and "
        f"{machine.launch[1] * 1e6:.0f} us per launch.\n"
        f"{_about_host(machine)}Limit: what takes longest at best.\n"
        f"Slices: of the deepest volume as wide as this one, as many in a batch, that fits into {USABLE:.0%} of\n"
        f"{with_unit(machine.memory, 'B')} of memory, and that operations take."
    )
    return int(any([cost.planned.total_bytes > USABLE * machine.memory for cost in found]))


def chosen_machine(
    gpu_name: str | None,
    dtype: torch.dtype,
    graph: bool = False,
    launch_us: float | None = None,
    block_us: float | None = None,
) -> Machine:
    """The GPU of this name, or this CPU, with its host. ValueError for arguments that are wrong or mean nothing."""
    given = {name: us for name, us in (("launch", launch_us), ("block", block_us)) if us is not None}
    if gpu_name is None and (graph or given):
        raise ValueError("graph, launch_us and block_us are of a GPU: give them with gpu")
    if graph and given:
        raise ValueError("launch_us and block_us are of a host that the GPU waits for: with graph it waits for none")
    for name, us in given.items():
        if not 0 <= us < math.inf:
            raise ValueError(f"{name}_us must be microseconds, 0 or more, got {us}")
    if gpu_name is None:
        from ..bench.timing import this_cpu

        return this_cpu(dtype)
    machine = gpus.gpu(gpu_name)
    host = None if graph else machine.host._replace(**{name: us * 1e-6 for name, us in given.items()})
    return machine._replace(host=host)


def _refused(model: nn.Module, modes: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The modes that a model cannot be lifted in, and why. Raises ValueError where that is all of them."""
    reasons = {}
    for mode, settings in modes.items():
        try:
            lift(model, **settings)
        except ValueError as error:
            reasons[mode] = str(error)
            if len(reasons) == len(modes):
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
