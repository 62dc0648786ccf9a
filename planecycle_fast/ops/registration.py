"""How an operation with Triton kernels is registered with torch. CONTRIBUTING, "Add an operation", shows its use.

Two routes lead to the same body. On a GPU it is a `torch.library.triton_op`: torch.compile sees through it to the
kernels. Under TRITON_INTERPRET=1, where torch cannot wrap kernels (pytorch 152868), it is an opaque `custom_op`
with a fake of its own. `registry` says what an operation is, and adds the derivatives that torch.library has no place
for; those of csrc are registered by `native_ops`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from .eager import EagerOp
from .launch_plans import is_current, watching
from .registry import Cost, CustomOp

NAMESPACE = "planecycle_fast"
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1, read when triton is imported

DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)  # types of those on which kernels run

OPS: dict[str, CustomOp] = {}  # every operation registered so far


def register(
    body: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
    cost: Callable[..., Cost],
    flops: Callable[..., int] | None = None,
    opaque: bool = False,
) -> CustomOp:
    """Registers `body` as ``planecycle_fast::<its name>``. Its annotations make the schema.

    Under autocast an operation keeps the dtypes it is given, as the residual stream must.

    Args:
        body: computes the outputs, in new memory or in what it mutates, launching kernels by `launch`.
        fake: the outputs' shapes, strides and dtypes, without data.
        setup_context, backward: as in `torch.library.register_autograd`; `backward` calls registered operations
            only, so that it can be differentiated again. None for what is done in place, without gradients.
        vmap: as in `torch.library.register_vmap`; None where torch.func's transforms are refused.
        mutates: the arguments that it writes to.
        cost: what a call with these arguments moves.
        flops: multiplications and additions of its matrix products, two for one of each pair, as
            `torch.utils.flop_counter` takes it: with shapes in the place of tensors. None: there are none.
        opaque: torch.compile does not look into it, as it has to where torch cannot wrap kernels, those that take
            tensor descriptors. Its body launches the kernels themselves.
    """
    name = body.__name__.removeprefix("_")
    opaque = opaque or INTERPRETED
    make = torch.library.custom_op if opaque else torch.library.triton_op
    definition: Any = make(f"{NAMESPACE}::{name}", body, mutates_args=mutates)
    if opaque:
        definition.register_fake(fake)
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
    if vmap is not None:
        definition.register_vmap(vmap)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if flops is not None:
        register_flop_formula(overload.overloadpacket)(flops)
    parameters = [*inspect.signature(body).parameters]
    eager = EagerOp(
        name, body, setup_context, backward,
        mutates=[parameters.index(argument) for argument in mutates], devices=DEVICES, planned=not INTERPRETED,
    )  # fmt: skip
    OPS[name] = CustomOp(name, body, cost, overload, eager)
    return OPS[name]


def launch(
    kernel: Any,  # what `torch.library.wrap_triton` gives, or the kernel itself in the interpreter
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    **constants: Any,
) -> None:
    """Runs a kernel on `device`, whichever device is current, or shows it to the compiler that traces it."""
    watch = watching()
    if watch is not None and not INTERPRETED:  # nobody traces
        kernel = getattr(kernel, "kernel", None) or kernel  # what torch has wrapped
    if device.type == "cuda" and torch.cuda.is_available() and not is_current(device):
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, **constants)
    else:  # here, interpreted, or traced for a GPU that this machine does not have
        compiled = kernel[grid](*args, **constants)
    if hasattr(watch, "launched"):
        watch.launched(kernel, compiled, grid, args, constants)
