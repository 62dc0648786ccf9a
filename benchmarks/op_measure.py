"""Compares the contenders of a cell with the reference in float32, then times those that compute the same.

They take turns, each call on the next of several sets of random inputs. On CUDA what is too small to keep the device
busy runs as a CUDA graph of one call on every set. Shares are of a copy, or of a matrix product, in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.bench.timing import CallTimes, by_turns, ceiling_bandwidth, ceiling_flops, compare, summary

from .op_cells import COMPILED, OURS, REFERENCE, TRAINING, OpCell

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest value
ROUNDS, LEAST_ROUNDS, WARM_UPS, SECONDS = 20, 5, 2, 2.0
SMALL = 2**26  # bytes moved: below, a launch takes about as long as the work
LARGEST = {"cuda": 2**33, "cpu": 2**28}  # bytes of all sets of inputs together


class Result(NamedTuple):
    """What became of one contender: times, or the reason why there are none."""

    times: CallTimes | None = None
    seconds: tuple[float, ...] = ()  # of every round
    missing: str | None = None  # left out, which is no fault of ours
    refused: str | None = None  # it failed, or computes something else
    info: dict[str, Any] = {}  # noqa: RUF012  # what pytest-benchmark stores as `extra_info`


class _Timed(NamedTuple):
    """One contender, ready."""

    call: Callable[..., Any]
    inputs: Sequence[tuple]
    calls: int  # of the contender in one `call`: a graph has several
    note: str  # why it is no graph, where it should be one


def measure(cell: OpCell, device: torch.device | str, timed: bool = True) -> dict[str, Result]:
    """Every contender of a cell, compared and then timed; those that are not timed say why.

    Raises whatever the reference raises, unless memory does not suffice to compare.
    """
    torch._dynamo.reset()  # else torch.compile gives up at its limit of recompilations
    try:
        return _measure(cell, torch.device(device), timed)
    except torch.OutOfMemoryError:
        return dict.fromkeys(cell.names, Result(missing="out of memory"))


def _measure(cell: OpCell, device: torch.device, timed: bool) -> dict[str, Result]:
    tensors = _inputs(cell, device, 0)
    wide = [t.float() for t in tensors]
    reference = cell.contenders[REFERENCE]()
    with torch.no_grad():
        shapes = [t.shape for t in _outputs(reference(*wide))]
    arguments = (*tensors, *_cotangents(cell, shapes, device, 0))
    expected = _step(cell, reference)(*[t.float() for t in arguments])
    found, ready = {}, {}
    for name in cell.names:
        outcome = _checked(cell, name, arguments, expected)
        if isinstance(outcome, Result):
            found[name] = outcome
        else:
            ready[name] = outcome
    del expected, wide, arguments, tensors
    if timed:
        found |= _time(cell, ready, shapes, device)
    return {name: found.get(name, Result()) for name in cell.names}


def _checked(cell: OpCell, name: str, arguments: Sequence[Tensor], expected: Any) -> Result | tuple[Callable, float]:
    """A step of a contender that computes the same, and its error; else why it is not timed."""
    try:
        step = _step(cell, _compiled(cell) if name == COMPILED else cell.contenders[name]())
        output = step(*[t.clone() for t in arguments])
    except NotHereError as reason:
        return Result(missing=str(reason))
    except torch.OutOfMemoryError:
        return Result(missing="out of memory")
    except Exception as error:  # the code of others raises anything
        text = f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0]}"
        return Result(refused=text) if name in (OURS, REFERENCE) else Result(missing=f"it raised {text}")
    agreement = compare({name: output}, expected, TOLERANCE[cell.dtype])[name]
    return (step, agreement.error) if agreement.reason is None else Result(refused=agreement.reason)


def _compiled(cell: OpCell) -> Callable[..., Any]:
    """torch.compile of the reference: all of it, for these shapes."""
    return torch.compile(cell.contenders[REFERENCE](), fullgraph=True, dynamic=False)


def _step(cell: OpCell, function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """From inputs, in training also gradients of the outputs, to outputs, in training also gradients of the inputs."""
    if cell.step != TRAINING:
        forward = torch.no_grad()(function)
        return lambda *tensors: _outputs(forward(*tensors))

    def forward_and_backward(*tensors: Tensor) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in tensors[: len(cell.tensors)]]
        with torch.enable_grad():
            outputs = _outputs(function(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, inputs, tensors[len(cell.tensors) :])]

    return forward_and_backward


def _outputs(returned: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def _inputs(cell: OpCell, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, dtype=cell.dtype, device=device, generator=generator) * cell.spread.get(name, 1)
        for name, shape in cell.tensors.items()
    ]


def _cotangents(cell: OpCell, shapes: Sequence[torch.Size], device: torch.device, seed: int) -> list[Tensor]:
    """Random gradients of the outputs, in training."""
    generator = torch.Generator(device).manual_seed(1000 + seed)
    made = shapes if cell.step == TRAINING else ()
    return [torch.randn(shape, dtype=cell.dtype, device=device, generator=generator) for shape in made]


def _time(cell: OpCell, ready: dict, shapes: Sequence[torch.Size], device: torch.device) -> dict[str, Result]:
    sets = sets_of_inputs(cell.input_bytes, len(ready), device)
    inputs = [(*_inputs(cell, device, i), *_cotangents(cell, shapes, device, i)) for i in range(sets)]
    small = device.type == "cuda" and not cell.flops and cell.bytes <= SMALL
    timed = {name: (_graph if small else _plain)(step, inputs) for name, (step, _) in ready.items()}
    found = {}
    for name, seconds in sample(timed, device).items():
        seconds = tuple([t / timed[name].calls for t in seconds])
        notes = {"cuda_graph": timed[name].calls > 1, "error": ready[name][1], "sets_of_inputs": sets,
                 "bytes_of_inputs": sets * cell.input_bytes, "cache_bytes": cache_bytes(device)}  # fmt: skip
        notes |= {"note": timed[name].note} if timed[name].note else {}
        times = summary(seconds)
        found[name] = Result(times, seconds, info=_info(cell, name, times, device) | notes)
    return found


def _info(cell: OpCell, name: str, times: CallTimes, device: torch.device) -> dict[str, Any]:
    """What a stored run says of one contender; `share` is of the ceiling."""
    about = {"contender": name, "ours": name == OURS, "op": cell.op, "label": cell.label, "step": cell.step,
             "device": device.type, "median": times.median, "p20": times.p20, "p80": times.p80}  # fmt: skip
    if cell.flops:
        rate, limit = cell.flops / times.median, _ceiling_flops(device, cell.dtype)
        return about | {"flops": cell.flops, "TFLOP/s": rate / 1e12, "ceiling": limit / 1e12, "share": rate / limit}
    rate, limit = cell.bytes / times.median, _ceiling_bandwidth(device)
    return about | {"bytes": cell.bytes, "GB/s": rate / 1e9, "ceiling": limit / 1e9, "share": rate / limit}


_ceiling_flops = cache(ceiling_flops)  # once per run
_ceiling_bandwidth = cache(ceiling_bandwidth)


def sample(timed: dict[str, _Timed], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every timed call, contenders in turn; rounds end after `SECONDS`, but not before `LEAST_ROUNDS`.

    Each call gets a set of inputs that nobody has just had: another contender would have left it in the caches.
    """
    turn = count()

    def on_the_next(one: _Timed) -> Callable[[], Any]:
        return lambda: one.call(*one.inputs[next(turn) % len(one.inputs)])

    return by_turns(
        {name: on_the_next(one) for name, one in timed.items()}, [()], device=device, rounds=ROUNDS, warmups=WARM_UPS,
        seconds=SECONDS, least=LEAST_ROUNDS,
    ) if timed else {}  # fmt: skip


def sets_of_inputs(size: int, contenders: int, device: torch.device) -> int:
    """How many sets of `size` bytes: twice the caches, if there is memory; so many that nobody gets the same ones."""
    sets = max(3, min(-(-2 * cache_bytes(device) // size), LARGEST[device.type] // size))
    while contenders and math.gcd(sets, contenders) > 1:
        sets += 1
    return sets


@cache
def cache_bytes(device: torch.device) -> int:
    """The largest cache of a device; 2**25 where nobody says how large it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in found if text[-1:] in ("K", "M")]
    return max(sizes, default=2**25)


def _plain(step: Callable[..., Any], inputs: Sequence[tuple]) -> _Timed:
    return _Timed(step, inputs, 1, "")


def _graph(step: Callable[..., Any], inputs: Sequence[tuple]) -> _Timed:
    """One call on every set of inputs, captured; by itself where it cannot be."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for arguments in inputs:
                step(*arguments)
    except Exception as error:  # what cannot be captured raises anything
        torch.cuda.synchronize()
        return _Timed(step, inputs, 1, f"no CUDA graph: {type(error).__name__}, so that launches count")
    return _Timed(graph.replay, [()], len(inputs), "")
