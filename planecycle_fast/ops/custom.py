"""How an operation with kernels is registered with torch. CONTRIBUTING, "Add an operation", shows its use.

Two routes lead to the same body. On a GPU it is a `torch.library.triton_op`: torch.compile sees through it to the
kernels. Under TRITON_INTERPRET=1, where torch cannot wrap kernels (pytorch 152868), it is an opaque `custom_op`
with a fake of its own. Both have autograd and vmap; forward mode is `with_tangents`, as torch.library has none: a
custom op would silently give tangents of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "planecycle_fast"
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1, read when triton is imported


class Cost(NamedTuple):
    """What one call moves, by the traffic ledger: every load and store of activations, and how many kernels."""

    read: int  # bytes
    written: int  # bytes
    launches: int


@dataclass(frozen=True)
class CustomOp:
    """An operation as torch and the tests know it; calling it goes through torch's dispatcher."""

    name: str
    body: Callable[..., Any]  # what runs: allocates outputs, launches kernels, nothing else
    cost: Callable[..., Cost]  # same arguments as the body
    definition: Any  # torch's CustomOpDef
    overload: Any  # torch.ops.planecycle_fast.<name>.default

    def __call__(self, *args: Any) -> Any:
        return self.definition(*args)


OPS: dict[str, CustomOp] = {}  # every operation registered so far


def register(
    body: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
    cost: Callable[..., Cost],
) -> CustomOp:
    """Registers `body` as ``planecycle_fast::<its name>``. Its annotations make the schema; it mutates nothing.

    Args:
        body: computes the outputs, always in new memory, launching kernels by `launch`.
        fake: the outputs' shapes, strides and dtypes, without data.
        setup_context, backward: as in `torch.library.register_autograd`; `backward` calls registered operations
            only, so that it can be differentiated again.
        vmap: as in `torch.library.register_vmap`.
        cost: what a call with these arguments moves.
    """
    name = body.__name__.strip("_")
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    definition = make(f"{NAMESPACE}::{name}", body, mutates_args=())
    if INTERPRETED:
        definition.register_fake(fake)
    definition.register_autograd(backward, setup_context=setup_context)
    definition.register_vmap(vmap)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = CustomOp(name, body, cost, definition, overload)
    return OPS[name]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    **constants: Any,
) -> None:
    """Runs a kernel on `device`, whichever device is current, or shows it to the compiler that traces it."""
    if INTERPRETED:
        kernel[grid](*args, **constants)
    elif device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            torch.library.wrap_triton(kernel)[grid](*args, **constants)
    else:  # traced for a GPU that this machine does not have
        torch.library.wrap_triton(kernel)[grid](*args, **constants)


def with_tangents(
    linear: Callable[..., Tensor],
    x: Tensor,
    *args: Any,
) -> Tensor:
    """`linear(x, *args)` with forward-mode derivatives, for a function that is linear in x alone."""
    if forward_ad._current_level < 0:
        return linear(x, *args)
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None:
        return linear(x, *args)
    return forward_ad.make_dual(linear(primal, *args), linear(tangent, *args))
