"""FLOPs of a cell by torch.utils.flop_counter, without data; peak memory, measured."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ..cost.meter import Meter
from ..cost.planning import GpuAttention
from ..cost.workspaces import allocations
from .cells import DTYPES, PEER, PEERS, REFERENCE, Cell, parse_volume
from .contenders import vit
from .networks import network
from .steps import step_of

ATTENTION = ("bmm", "baddbmm", "attention")  # in the names of operations that only attention uses


class Flops(NamedTuple):
    """Of one step: two per multiplication and addition."""

    total: int
    attention: int  # of products of queries, keys and values


@cache
def flops(model: str, mode: str, volume: str, step: str) -> Flops:
    """What torch.utils.flop_counter counts of the reference, on device meta: nothing is computed.

    Args:
        model: one of `cells.VITS` or `cells.PEERS`.
        mode: one of `cells.MODES`; "" for peers.
        volume: as `cells.parse_volume` takes it.
        step: one of `cells.STEPS`.
    """
    return count(*_without_data(model, mode, volume, step, torch.float32))


def peer_peak(cell: Cell) -> int:
    """Bytes above weights and volume that a peer will need at once, by its code on device meta; workspaces apart."""
    run, volume = _without_data(cell.model, "", cell.volume, cell.step, DTYPES[cell.dtype])
    with Meter() as meter:
        run(volume)
    return meter.peak


def _without_data(
    model: str, mode: str, volume: str, step: str, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A step, for vision transformers of the reference, and a volume, both on device meta."""
    cell = Cell(model, "fp32", volume, step, mode, PEER if model in PEERS else REFERENCE)
    host = None if model in PEERS else vit(model, "meta", dtype)
    data = torch.empty(parse_volume(volume).shape, device="meta", dtype=dtype)
    return step_of(step, network(cell, host, data)), data


def count(run: Callable[[Tensor], Any], volume: Tensor) -> Flops:
    """What torch.utils.flop_counter counts of one call; on device meta attention is a fused one."""
    with FlopCounterMode(display=False) as counter, GpuAttention():
        run(volume)
    by_operation = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    attention = [number for op, number in by_operation.items() if any([part in op for part in ATTENTION])]
    return Flops(counter.get_total_flops(), sum(attention))


def peak_bytes(run: Callable[[Tensor], Any], volume: Tensor) -> int:
    """Bytes that live at once above what does before the call: weights and volume are not counted.

    Call `run` once before, so that libraries have filled their caches. On CUDA by its allocator; on a CPU by torch's
    record of every allocation.
    """
    if volume.device.type == "cuda":
        torch.cuda.synchronize(volume.device)
        torch.cuda.reset_peak_memory_stats(volume.device)
        before = torch.cuda.memory_allocated(volume.device)
        run(volume)
        return torch.cuda.max_memory_allocated(volume.device) - before
    return max(accumulate(allocations(lambda: run(volume)), initial=0))


def launches(run: Callable[[Tensor], Any], volume: Tensor) -> int:
    """What the host hands to a CUDA device in one call: kernels, copies, and graphs of many."""
    torch.cuda.synchronize(volume.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run(volume)
        torch.cuda.synchronize(volume.device)
    return sum([event.count for event in record.key_averages() if _LAUNCH.match(event.key)])


_LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")  # calls of the driver and the runtime


def free_bytes(device: torch.device) -> int | None:
    """Memory that a cell may take; None where nothing says how much there is."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how a device says that it has no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory")  # on a CPU and MPS
    return isinstance(error, RuntimeError) and any([words in str(error) for words in said])


def release(device: torch.device) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
