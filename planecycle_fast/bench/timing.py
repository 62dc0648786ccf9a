"""Timing that cannot be done wrong: synchronised, interleaved, on inputs that change, after outputs were compared.

On CUDA a call is timed by events around it, recorded after caches were flushed; elsewhere by the clock, with the
device synchronised before it is read. Contenders take turns, so that a machine whose speed drifts treats all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cost.gpus import Machine
from ..optional import require

ROUNDS, WARM_UPS, LEAST_ROUNDS = 20, 3, 3
FLUSHED = 2**28  # bytes written before each call on CUDA: several times the largest cache
PRODUCT = {"cuda": 8192, "cpu": 2048}  # rows and columns of the matrices of `ceiling_flops`
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes of the tensor that `ceiling_bandwidth` copies


class CallTimes(NamedTuple):
    """Seconds of one call: the median of all rounds, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    rounds: int


class Agreement(NamedTuple):
    """How far outputs are from those expected; `reason` is None where they may be timed."""

    error: float  # largest difference, divided by the largest value expected; inf for NaN and other shapes
    reason: str | None


def interleaved(
    contenders: Mapping[Any, Callable[..., Any]], inputs: Sequence[tuple], **settings: Any
) -> dict[Any, CallTimes]:
    """Medians and percentiles of every contender, all in turn; of `by_turns`, whose arguments and errors these are."""
    return {name: summary(of_one) for name, of_one in by_turns(contenders, inputs, **settings).items()}


def by_turns(
    contenders: Mapping[Any, Callable[..., Any]],
    inputs: Sequence[tuple],
    *,
    device: torch.device | str,
    rounds: int = ROUNDS,
    warmups: int = WARM_UPS,
    seconds: float | None = None,
    least: int = LEAST_ROUNDS,
    raised: Callable[[Any, Exception], None] | None = None,
) -> dict[Any, list[float]]:
    """Seconds of every timed call, contenders in turn.

    Args:
        contenders: {name: what is called with the elements of one of `inputs`}. What it returns is dropped.
        inputs: arguments of single calls, tensors among them on `device`. Every call gets the next one.
        device: where the work is done.
        rounds: timed calls of each.
        warmups: calls of each before, not timed.
        seconds: stop after the round in which all rounds together have taken so long, but not before the `least`.
        least: rounds that are made however long they take.
        raised: gets the name and the error of a contender that raises, which leaves the turns; without it the error
            is raised.

    Raises:
        TypeError: a contender that is not callable.
        ValueError: no contenders, no inputs, rounds below 1, or a tensor on another device.
    """
    device = _check(contenders, inputs, device, rounds, warmups)
    clock, calls = _clock(device), {name: 0 for name in contenders}
    times: dict[Any, list[float]] = {name: [] for name in contenders}

    def call(name: Any) -> None:
        arguments = inputs[calls[name] % len(inputs)]
        calls[name] += 1
        try:
            taken = clock(contenders[name], arguments)
        except Exception as error:
            if raised is None:
                raise
            del times[name]
            raised(name, error)
        else:
            if calls[name] > warmups:
                times[name].append(taken)

    for _ in range(warmups):
        for name in list(times):
            call(name)
    began = perf_counter()
    for i in range(rounds):
        if seconds is not None and i >= least and perf_counter() - began > seconds:
            break
        for name in list(times):
            call(name)
    return times


def summary(seconds: Sequence[float]) -> CallTimes:
    """Median and percentiles of the times of single calls."""
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return CallTimes(*quantiles.tolist(), len(seconds))


def synchronise(device: torch.device | str) -> None:
    """Waits for all work on `device`, and for that on CUDA whatever `device` is."""
    device = torch.device(device)
    if device.type == "cuda" or torch.cuda.is_initialized():
        torch.cuda.synchronize(device if device.type == "cuda" else None)
    if device.type not in ("cpu", "cuda"):
        torch.accelerator.synchronize(device)


def compare(outputs: Mapping[str, Any], expected: Any, tolerance: float) -> dict[str, Agreement]:
    """Whether contenders compute the same. Tensors, or tuples, lists and dictionaries of them, of any float dtype.

    Args:
        outputs: {name of a contender: what it returned}.
        expected: what they should have returned.
        tolerance: the largest error to be timed with, of the largest value of each expected tensor.
    """
    return {name: _agreement(output, expected, tolerance) for name, output in outputs.items()}


def ceiling_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of square matrices, measured now."""
    device = torch.device(device)
    n = PRODUCT.get(device.type, 4096)
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    found = interleaved({"product": torch.mm}, [(a, b), (b, c), (c, a)], device=device, rounds=10, seconds=3)
    return 2 * n**3 / found["product"].median


def ceiling_bandwidth(device: torch.device | str) -> float:
    """Bytes per second, read and written, of a copy of a large tensor, measured now."""
    device = torch.device(device)
    size = COPIED.get(device.type, 2**28)
    pairs = [tuple(torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(2)]
    found = interleaved({"copy": Tensor.copy_}, pairs, device=device, rounds=10, seconds=3)
    return 2 * size / found["copy"].median


def this_cpu(dtype: torch.dtype) -> Machine:
    """This machine's CPU: a large matrix product and a large copy, measured now, and its memory."""
    memory = require("psutil", "bench").virtual_memory().total
    cpu = torch.device("cpu")
    return Machine("this CPU", {dtype: ceiling_flops(cpu, dtype)}, ceiling_bandwidth(cpu), float(memory))


def _clock(device: torch.device) -> Callable[[Callable, tuple], float]:
    """A function that times one call, work on the device and all."""
    if device.type != "cuda":

        def by_clock(function: Callable, arguments: tuple) -> float:
            synchronise(device)
            began = perf_counter()
            function(*arguments)
            synchronise(device)
            return perf_counter() - began

        return by_clock
    cache = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def by_events(function: Callable, arguments: tuple) -> float:
        with torch.cuda.device(device):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            synchronise(device)
            cache.zero_()
            began.record()
            function(*arguments)
            ended.record()
            synchronise(device)
            return began.elapsed_time(ended) / 1e3

    return by_events


def _check(
    contenders: Mapping, inputs: Sequence, device: torch.device | str, rounds: int, warmups: int
) -> torch.device:
    device = torch.device(device)
    if not contenders:
        raise ValueError("contenders must not be empty")
    for name, function in contenders.items():
        if not callable(function):
            raise TypeError(f"contenders must be callable, got {type(function).__name__} for {name!r}")
    if not inputs:
        raise ValueError("inputs must not be empty: one tuple of arguments per call, used in turn")
    for arguments in inputs:
        if not isinstance(arguments, tuple):
            raise TypeError(f"inputs must be tuples of arguments, got {type(arguments).__name__}")
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Tensor) and leaf.device.type != device.type:
                raise ValueError(f"inputs must be on the device that is timed, {device}, got a tensor on {leaf.device}")
    if rounds < 1 or warmups < 0:
        raise ValueError(f"rounds must be at least 1 and warmups at least 0, got {rounds} and {warmups}")
    return device


def _agreement(output: Any, expected: Any, tolerance: float) -> Agreement:
    got, wanted = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (output, expected))
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (got, wanted)]
    if shapes[0] != shapes[1]:
        return Agreement(float("inf"), f"it returns tensors of shapes {shapes[0]}, expected {shapes[1]}")
    error = max([_error(a, b) for a, b in zip(got, wanted)], default=0.0)
    if error <= tolerance:
        return Agreement(error, None)
    return Agreement(error, f"its outputs are off by {error:.1e} of the largest value, tolerance {tolerance:.0e}")


@torch.no_grad()
def _error(output: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    output, expected = output.to(expected.device, wide), expected.to(wide)
    error = ((output - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(wide).tiny)).item()
    return error if error == error else float("inf")  # NaN is unlike everything
