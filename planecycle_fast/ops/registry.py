"""What every operation with kernels of its own is to torch and to the tests, whichever backend it belongs to.

`registration` registers those of Triton, `native_ops` those of csrc. `linear` adds the derivatives that torch.library
has no place for; operations that are not linear are differentiated once, in reverse (`refuse_transforms`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.tracing import transforms_active
from .eager import EagerOp


class Cost(NamedTuple):
    """What one call moves, by the traffic ledger: loads and stores of activations, and how many kernels.

    What programs of a kernel share by caches counts once.
    """

    read: int  # bytes
    written: int  # bytes
    launches: int


@dataclass(frozen=True)
class CustomOp:
    """An operation as torch and the tests know it. Calling it goes through torch's dispatcher only where that has to
    see it."""

    name: str
    body: Callable[..., Any]  # what runs: allocates outputs, launches kernels, nothing else
    cost: Callable[..., Cost] | None  # same arguments as the body; None of csrc's
    overload: Any  # torch.ops.planecycle_fast.<name>.default
    eager: EagerOp | None = None  # None: always through the dispatcher

    def __call__(self, *args: Any) -> Any:
        out = NotImplemented if self.eager is None else self.eager(args)
        return self.overload(*args) if out is NotImplemented else out


def refuse_transforms(name: str, backend: str = "triton") -> None:
    """Raises NotImplementedError within forward mode and torch.func's transforms, where tangents would be zero."""
    if transforms_active():
        raise NotImplementedError(
            f"{name} has no forward-mode derivatives and no torch.func transforms on backend {backend!r}; "
            "use backend='reference'"
        )


def refused_again(name: str, backend: str) -> Callable[..., None]:
    """`backward` of what a backward calls: raises NotImplementedError for who differentiates it again."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name} is differentiated twice, which backend {backend!r} does not do; use backend='reference'"
        )

    return backward


def linear(
    register: Callable[..., CustomOp],
    operation: Any,
    adjoint: Callable[..., tuple[Any, ...]],
    vmap: Callable[..., Any],
    **others: Any,
) -> tuple[CustomOp, Callable[..., Tensor]]:
    """Registers an operation that is linear in its first argument alone, with every kind of derivative.

    `torch.library` gives an operation reverse mode and vmap. Forward mode (silently zero) and torch.func's transforms
    (an error) need an `autograd.Function`, which torch.compile in turn does not take: so it serves just those.

    Args:
        register, operation, others: a backend's `register`, and what it takes.
        adjoint: the arguments with which the operation, ``op(x, *arguments)``, is its own transpose.
        vmap: ``vmap(function, in_dim, x, *arguments)`` calls `function` on x with the extra dimension folded in.

    Returns:
        the operation, and ``call(x, *arguments)``, to be used instead of it.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        nothing = [[None] * len(a) if _is_tensors(a) else None for a in ctx.arguments]  # as torch wants it for lists
        return call(grad, *adjoint(*ctx.arguments)), *nothing

    def many(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        return vmap(op, in_dims[0], x, *arguments)

    op = register(operation, setup_context=keep, backward=backward, vmap=many, **others)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *arguments: Any) -> Tensor:
            return op(x, *arguments)

        setup_context = staticmethod(keep)

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

    return op, call


def more_volumes(function: Callable[..., Tensor], in_dim: int, x: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    """`vmap` of an operation whose first axis, of input and output, is of volumes and what they consist of."""
    many = x.movedim(in_dim, 0)  # (V, B, ...)
    out = function(many.flatten(0, 1), *arguments)
    return out.unflatten(0, (len(many), out.shape[0] // max(len(many), 1))), 0


def _is_tensors(argument: object) -> bool:
    return isinstance(argument, list) and all([isinstance(item, Tensor) for item in argument])  # [None, t] is none
