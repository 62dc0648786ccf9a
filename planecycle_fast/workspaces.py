"""Memory that an operation takes beside its outputs, on a CPU: what no watcher of operations can see.

oneDNN copies images and weights into layouts of its own, and has scratch memory per thread; attention copies keys and
values. How much depends on torch, on the CPU and on the number of threads. So it is not modelled but found out: the
operation is run on a few images (or heads, of at most `LONGEST` tokens) of the same size, about one per thread, and on
one more. Each of its allocations grows in proportion to them, so torch's record of both says what any number needs.
Found so with torch 2.13: a convolution in bfloat16 also holds both of its inputs and scratch memory of each thread, in
float32 its weight or its output, whichever is larger; attention in bfloat16 keys and values.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

LONGEST = 2048  # tokens, from where on allocations grow in proportion to them
aten = torch.ops.aten
_found: dict[tuple, tuple[list[int], list[int]]] = {}  # allocations of so many, and of one more


def workspace(func: Any, args: tuple, kwargs: dict) -> int:
    """Bytes above inputs and outputs that a call of `func` needs at its peak; 0 for those not looked at."""
    small = _SMALL.get(func)
    if small is None or args[0].device.type != "cpu":
        return 0
    many, key, make = small(*args)
    few = max(2, min(int(many), torch.get_num_threads() + 1))  # one takes other ways
    key = (func, key, few, torch.get_num_threads())
    if key not in _found:
        with _disable_current_modes(), torch.no_grad():
            _found[key] = _allocations(func, make(few), kwargs), _allocations(func, make(few + 1), kwargs)
    fewer, more = _found[key]
    if len(fewer) != len(more):  # not the same algorithm: all in proportion
        fewer, more = more, [size + size // (few + 1) for size in more]
        few += 1
    alive = highest = 0.0
    for a, b in zip(fewer, more):
        alive += a + (many - few) * (b - a)
        highest = max(highest, alive)
    return max(0, round(highest - alive))


def _allocations(func: Any, args: tuple, kwargs: dict) -> list[int]:
    """Sizes in order; releases are negative. Of the second call, as the first fills caches of libraries."""
    for _ in range(2):
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            out = func(*args, **kwargs)
        found = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        del out  # not while it is recorded
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's profiler writes lines to file 2 when it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _like(t: Tensor, *sizes: int) -> Tensor:
    """Real zeros of t's dtype and order of dimensions, and of other sizes."""
    order = sorted(range(t.ndim), key=lambda i: t.stride(i), reverse=True)
    made = torch.zeros([sizes[i] for i in order], dtype=t.dtype)
    return made.permute([order.index(i) for i in range(t.ndim)])


def _convolution(
    x: Tensor,  # (N, channels, height, width)
    weight: Tensor,  # (C, channels, patch, patch)
    bias: Tensor | None,  # (C,)
    *rest: Any,
) -> tuple[int, tuple, Callable[[int], tuple]]:
    def make(n: int) -> tuple:
        made = [None if t is None else _like(t, *t.shape) for t in (weight, bias)]
        return _like(x, n, *x.shape[1:]), *made, *rest

    return x.shape[0], (x.shape[1:], x.stride()[1:], x.dtype, weight.shape, bias is None, repr(rest)), make


def _convolution_backward(
    grad: Tensor,  # (N, C, h, w)
    x: Tensor,  # (N, channels, height, width)
    weight: Tensor,  # (C, channels, patch, patch)
    *rest: Any,
) -> tuple[int, tuple, Callable[[int], tuple]]:
    def make(n: int) -> tuple:
        return _like(grad, n, *grad.shape[1:]), _like(x, n, *x.shape[1:]), _like(weight, *weight.shape), *rest

    key = (x.shape[1:], x.stride()[1:], grad.stride()[1:], x.dtype, weight.shape, repr(rest))
    return x.shape[0], key, make


def _attention(*args: Any) -> tuple[float, tuple, Callable[[int], tuple]]:
    """Of tensors (N, heads, rows, hd) or (N, heads, rows), and other arguments; every sequence and head is alike."""
    heads, rows = args[0].shape[0] * args[0].shape[1], args[0].shape[2]
    length = min(rows, LONGEST)

    def make(n: int) -> tuple:
        return tuple([_like(t, 1, n, length, *t.shape[3:]) if isinstance(t, Tensor) else t for t in args])

    key = (length, *[(t.shape[3:], t.stride()[2:], t.dtype) if isinstance(t, Tensor) else repr(t) for t in args])
    return heads * rows / length, key, make


_SMALL = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention,
}
