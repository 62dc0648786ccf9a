"""What sees operations instead of just running them, and what it needs: exporters, traces, transforms of torch.func.

"auto" is the reference (`backends.pick`), and nothing is written in place (`may_write`). A trace of torch.jit is one
run: sizes are numbers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """torch.compile takes its results for constants: what is installed does not change under a compiled model.

    By attribute, as torch.compiler.assume_constant_result imports the whole compiler, and triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have it, not all callables
    return function


def recorder() -> str | None:
    """What records torch's own operations now, to be run without us, or None."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    # Not is_exporting(), which up to torch 2.11 is true in all that torch.compile takes.
    return "torch.export" if torch.compiler._is_exporting_flag else None


def transforms_active() -> bool:
    """Whether this runs within forward mode or one of torch.func's transforms."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def nobody_watches() -> bool:
    """Whether operations just run: nobody compiles, records, transforms, dispatches or profiles them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def may_write() -> bool:
    """Whether a tensor that nobody else holds may be written to: not where torch has to see what becomes of it.

    So never within forward mode, torch.func's transforms, torch.jit.trace, torch.export and make_fx, whose records may
    run with gradients later, nor within selective activation checkpointing, which keeps what operations return. A
    compiler plans memory better without being told to.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():  # written out: it is asked often
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    return not torch._C._len_torch_dispatch_stack() or not any(
        [type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()]
    )


def may_fill() -> bool:
    """Whether a tensor that has just been made may be filled part by part: also where a compiler makes something else
    of it."""
    return may_write() or (torch.compiler.is_compiling() and recorder() is None)


def shape_of(
    x: Tensor,  # any shape
) -> Sequence[int]:
    """Its shape, in numbers. Within a trace sizes are tensors, and whatever is made of them becomes part of it."""
    return x.shape if torch._C._get_tracing_state() is None else [int(n) for n in x.shape]


def fix_shape(
    volume: Tensor,  # (B, channels, D, height, width)
) -> Tensor:  # the same
    """Within a trace: the volume such that another shape given to the trace raises RuntimeError.

    Of ONNX, which declares the shapes of inputs, the batch may be another one, where it is declared dynamic.
    """
    if not torch.jit.is_tracing():
        return volume
    for axis, size in enumerate(shape_of(volume)):
        if axis or not torch.onnx.is_in_onnx_export():
            volume = volume.unflatten(axis, (size,))  # nothing but a check, which what comes after depends on
    return volume
