"""What every operation with kernels of its own is to torch and to the tests, whichever backend it belongs to.

`custom` registers those of Triton, `native_ops` those of csrc. `linear` adds the derivatives that torch.library has no
place for; operations that are not linear are differentiated once, in reverse (`refuse_transforms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..runtime.tracing import transforms_active


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


def refuse_transforms(name: str, backend: str = "triton") -> None:
    """Raises NotImplementedError within forward mode and torch.func's transforms, where tangents would be zero."""
    if transforms_active():
        raise NotImplementedError(
            f"{name} has no forward-mode derivatives and no torch.func transforms on backend {backend!r}; "
            "use backend='reference'"
        )


def check_fixed(arguments: Iterable[Any], backend: str) -> None:
    """Raises ValueError where a tensor in a list among `arguments`, which make angles, needs a derivative."""
    for t in [t for argument in arguments if isinstance(argument, list) for t in argument if isinstance(t, Tensor)]:
        tangent = forward_ad.unpack_dual(t).tangent if forward_ad._current_level >= 0 else None
        if (t.requires_grad and torch.is_grad_enabled()) or tangent is not None:
            raise ValueError(
                f"angles must not need a gradient on backend {backend!r}, which differentiates x alone; "
                "use backend='reference'"
            )


def refuse_second(name: str, backend: str = "triton") -> None:
    """Raises NotImplementedError: of what a backward calls, and nobody may differentiate again."""
    raise NotImplementedError(
        f"{name} is differentiated twice, which backend {backend!r} does not do; use backend='reference'"
    )


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
