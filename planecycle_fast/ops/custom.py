"""How an operation with kernels is registered with torch. CONTRIBUTING, "Add an operation", shows its use.

Two routes lead to the same body. On a GPU it is a `torch.library.triton_op`: torch.compile sees through it to the
kernels. Under TRITON_INTERPRET=1, where torch cannot wrap kernels (pytorch 152868), it is an opaque `custom_op`
with a fake of its own. `linear` adds the derivatives that torch.library has no place for; operations that are not
linear are differentiated once, in reverse (`register_backward`, `refuse_transforms`).
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
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
    cost: Callable[..., Cost],
) -> CustomOp:
    """Registers `body` as ``planecycle_fast::<its name>``. Its annotations make the schema.

    Under autocast an operation keeps the dtypes it is given, as the residual stream must; none is a matrix product.

    Args:
        body: computes the outputs, in new memory or in what it mutates, launching kernels by `launch`.
        fake: the outputs' shapes, strides and dtypes, without data.
        setup_context, backward: as in `torch.library.register_autograd`; `backward` calls registered operations
            only, so that it can be differentiated again. None for what is done in place, without gradients.
        vmap: as in `torch.library.register_vmap`; None where torch.func's transforms are refused.
        mutates: the arguments that it writes to.
        cost: what a call with these arguments moves.
    """
    name = body.__name__.removeprefix("_")
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    definition = make(f"{NAMESPACE}::{name}", body, mutates_args=mutates)
    if INTERPRETED:
        definition.register_fake(fake)
    if backward is not None:
        definition.register_autograd(backward, setup_context=setup_context)
    if vmap is not None:
        definition.register_vmap(vmap)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = CustomOp(name, body, cost, definition, overload)
    return OPS[name]


def register_backward(
    body: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
) -> CustomOp:
    """`register`, for what a backward calls and nobody may differentiate again: that raises NotImplementedError."""
    name = body.__name__.removeprefix("_")

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name} is differentiated twice, which backend 'triton' does not do; use backend='reference'"
        )

    return register(body, fake=fake, setup_context=lambda ctx, inputs, output: None, backward=backward, cost=cost)


def transforms_active() -> bool:
    """Whether this runs within forward mode or one of torch.func's transforms."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_transforms(name: str) -> None:
    """Raises NotImplementedError within forward mode and torch.func's transforms, where tangents would be zero."""
    if transforms_active():
        raise NotImplementedError(
            f"{name} has no forward-mode derivatives and no torch.func transforms on backend 'triton'; "
            "use backend='reference'"
        )


def launch(
    kernel: Any,  # what `torch.library.wrap_triton` gives, or the kernel itself in the interpreter
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    **constants: Any,
) -> None:
    """Runs a kernel on `device`, whichever device is current, or shows it to the compiler that traces it."""
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:  # interpreted, or traced for a GPU that this machine does not have
        kernel[grid](*args, **constants)


def linear(
    op: CustomOp,
    adjoint: Callable[..., tuple[Any, ...]],
    vmap: Callable[..., Any],
) -> Callable[..., Tensor]:
    """An operation that is linear in its first argument alone, with every kind of derivative.

    `torch.library` gives an operation reverse mode and vmap. Forward mode (silently zero) and torch.func's transforms
    (an error) need an `autograd.Function`, which torch.compile in turn does not take: so it serves just those.

    Args:
        op: the operation, ``op(x, *arguments)``.
        adjoint: the arguments with which `op` is its own transpose.
        vmap: ``vmap(function, in_dim, x, *arguments)`` calls `function` on x with the extra dimension folded in.
    """

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *arguments: Any) -> Tensor:
            return op(x, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.arguments = inputs[1:]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            return Linear.apply(grad, *adjoint(*ctx.arguments)), *[None] * len(ctx.arguments)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            return Linear.apply(tangent, *ctx.arguments)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
            return vmap(Linear.apply, in_dims[0], x, *arguments)

    def call(x: Tensor, *arguments: Any) -> Tensor:
        if transforms_active():
            return Linear.apply(x, *arguments)
        return op(x, *arguments)

    return call
