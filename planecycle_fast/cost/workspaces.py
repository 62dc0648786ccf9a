"""Memory that an operation takes beside its outputs, on a CPU: what no watcher of operations can see.

oneDNN copies images and weights into layouts of its own, and has scratch memory per thread; attention copies keys and
values. How much depends on torch, on the CPU and on the number of threads. So it is not modelled but found out: the
operation is run on a few images (or heads, of at most `LONGEST` tokens) of the same size, and on one more. Each of its
allocations grows in proportion to them, so torch's record of both says what any number needs. As many as cost little
are tried, since oneDNN takes other ways for two or three (and memory: 3 instead of 105 MB for slices of 224 pixels).
Found so with torch 2.13: a convolution in bfloat16 also holds both of its inputs and scratch memory of each thread, in
float32 its weight or its output, whichever is larger; attention in bfloat16 keys and values; a linear layer in bfloat16
a block of its weight, up to all of it, from some hundred rows on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

LONGEST = 2048  # tokens, from where on allocations grow in proportion to them
ROWS = 2048  # of a linear layer, from where on they do not grow
AT_MOST = 4e9  # multiplications that are tried; linear layers of more are taken to copy their weight
aten = torch.ops.aten
Small = tuple[float, int, tuple, Callable[[int], tuple]]  # how many, multiplications of one, key, arguments of n
_found: dict[tuple, tuple[list[int], list[int]]] = {}  # allocations of so many, and of one more


def workspace(func: Any, args: tuple, kwargs: dict) -> int:
    """Bytes above inputs and outputs that a call of `func` needs at its peak; 0 for operations that are not looked at.

    Of torch's fake tensors alone: with real ones the operation has run already, and nobody plans.
    """
    if not isinstance(args[0] if args else None, FakeTensor) or args[0].device.type != "cpu":
        return 0
    if func in _LINEAR:
        return _of_linear(func, args, kwargs)
    small = _SMALL.get(func)
    if small is None:
        return 0
    many, each, key, make = small(*args)
    few = max(2, min(int(many), int(AT_MOST / each)))
    key = (func, key, few, torch.get_num_threads())
    if key not in _found:
        with _disable_current_modes(), torch.no_grad():
            _found[key] = _of_second_call(func, make(few), kwargs), _of_second_call(func, make(few + 1), kwargs)
    return _peak(*_found[key], few, many)


def _peak(fewer: list[int], more: list[int], few: int, many: float) -> int:
    """Of `many`, above what is left in the end, from the allocations of a `few` and of one more."""
    if len(fewer) != len(more):  # not the same algorithm: all in proportion
        fewer, more = more, [size + size // (few + 1) for size in more]
        few += 1
    alive = highest = 0.0
    for a, b in zip(fewer, more):
        alive += a + (many - few) * (b - a)
        highest = max(highest, alive)
    return max(0, round(highest - alive))


def _of_linear(func: Any, args: tuple, kwargs: dict) -> int:
    x, weight = args[_LINEAR[func]], args[_LINEAR[func] + 1]
    rows = x.numel() // x.shape[-1]
    tried = min(rows, ROWS)
    if tried * weight.numel() > AT_MOST:
        return weight.nbytes if x.dtype == torch.bfloat16 else 0
    rest = [repr(a) for a in args if not isinstance(a, Tensor)]
    key = (func, tried, weight.shape, weight.stride(), x.dtype, *rest, torch.get_num_threads())
    if key not in _found:
        with _disable_current_modes(), torch.no_grad():
            made = [_like(a, *a.shape) if isinstance(a, Tensor) and a is not x else a for a in args]
            made[_LINEAR[func]] = torch.zeros(tried, x.shape[-1], dtype=x.dtype)
            found = _of_second_call(func, tuple(made), kwargs)
        _found[key] = found, found
    return _peak(*_found[key], tried, tried)


def _of_second_call(func: Any, args: tuple, kwargs: dict) -> list[int]:
    """Allocations, as the first call fills caches of libraries."""
    func(*args, **kwargs)
    return allocations(lambda: func(*args, **kwargs))


def allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes of all allocations on the CPU in one call, in order; releases are negative, that of the result is none."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = run()
    del out  # not while it is recorded
    return [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]


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
) -> Small:
    def make(n: int) -> tuple:
        made = [None if t is None else _like(t, *t.shape) for t in (weight, bias)]
        return _like(x, n, *x.shape[1:]), *made, *rest

    key = (x.shape[1:], x.stride()[1:], x.dtype, weight.shape, bias is None, repr(rest))
    return x.shape[0], _multiplications(x, weight), key, make


def _convolution_backward(
    grad: Tensor,  # (N, C, h, w)
    x: Tensor,  # (N, channels, height, width)
    weight: Tensor,  # (C, channels, patch, patch)
    *rest: Any,
) -> Small:
    def make(n: int) -> tuple:
        return _like(grad, n, *grad.shape[1:]), _like(x, n, *x.shape[1:]), _like(weight, *weight.shape), *rest

    key = (x.shape[1:], x.stride()[1:], grad.stride()[1:], x.dtype, weight.shape, repr(rest))
    return x.shape[0], 2 * _multiplications(x, weight), key, make


def _multiplications(
    x: Tensor,  # (N, channels, height, width)
    weight: Tensor,  # (C, channels, patch, patch)
) -> int:
    """Of one image, patch by patch."""
    return x[0, 0].numel() * weight.shape[0] * weight.shape[1]


def _attention(*args: Any) -> Small:
    """Of tensors (N, heads, rows, hd) or (N, heads, rows), and other arguments; every sequence and head is alike."""
    heads, rows = args[0].shape[0] * args[0].shape[1], args[0].shape[2]
    length = min(rows, LONGEST)

    def make(n: int) -> tuple:
        return tuple([_like(t, 1, n, length, *t.shape[3:]) if isinstance(t, Tensor) else t for t in args])

    key = (length, *[(t.shape[3:], t.stride()[2:], t.dtype) if isinstance(t, Tensor) else repr(t) for t in args])
    each = 4 * length**2 * args[0].shape[3]
    return heads * rows / length, each, key, make


_LINEAR = {aten.addmm.default: 1, torch.ops.mkldnn._linear_pointwise.default: 0}  # where rows are, weights follow
_SMALL = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention,
}
