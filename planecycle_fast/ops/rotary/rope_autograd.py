"""What torch is told of rope, whichever backend computes it, and how it is called.

Turning is linear in x, by the same angles for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...runtime.tracing import transforms_active
from .angles import Axial, Tables


def adjoint(back: bool, *rest: Any) -> tuple[Any, ...]:
    """Turning back, see `registry.linear`."""
    return not back, *rest


def vmap_by(backend: str) -> Callable[..., tuple[Tensor, int]]:
    """More sequences, see `registry.linear`. Raises ValueError unless all have the same angles."""

    def more_sequences(
        function: Callable[..., Tensor], in_dim: int | None, x: Tensor, *arguments: Any
    ) -> tuple[Tensor, int]:
        sin, cos, periods, drawn = arguments[5:9]
        several = [t.ndim != 2 for t in (*sin, *cos)] + [t.ndim != 1 for t in (*periods, *drawn) if t is not None]
        if in_dim is None or any(several):
            raise ValueError(
                f"angles must be the same for all of a vmap on backend {backend!r}; use backend='reference'"
            )
        many = x.movedim(in_dim, 0)  # (V, N, g + L, heads, hd)
        return function(many.flatten(0, 1), *arguments).unflatten(0, many.shape[:2]), 0

    return more_sequences


def check_fixed(arguments: Iterable[Any], backend: str) -> None:
    """Raises ValueError where a tensor in a list among `arguments`, which make angles, needs a derivative."""
    for t in [t for argument in arguments if isinstance(argument, list) for t in argument if isinstance(t, Tensor)]:
        tangent = forward_ad.unpack_dual(t).tangent if forward_ad._current_level >= 0 else None
        if (t.requires_grad and torch.is_grad_enabled()) or tangent is not None:
            raise ValueError(
                f"angles must not need a gradient on backend {backend!r}, which differentiates x alone; "
                "use backend='reference'"
            )


@dataclass(frozen=True)
class Turning:
    """`rope_ref` in one pass on a backend, with derivatives in forward and reverse mode, any number of times."""

    backend: str
    arguments_of: Callable[..., tuple[Any, ...]]  # what the operations take after x
    turn: Callable[..., Tensor]  # what `linear` gives for the operation
    in_place: Callable[..., None]  # its twin

    def __call__(
        self,
        x: Tensor,  # (N, g + L, heads, hd), any strides
        angles: Tables | Axial,
        num_globals: int,  # g
        turned: int | None,
        inplace: bool,
        in_table_dtype: bool,
    ) -> Tensor:  # like x, contiguous; x itself in place
        """Differentiable for x alone.

        Raises ValueError for angles that need a gradient; on "triton" also for more than 2**30 rows or heads, 1024
        channels of a head or 2**31 - 1 programs.
        """
        arguments = self.arguments_of(x, angles, num_globals, turned, in_table_dtype)
        check_fixed(arguments, self.backend)
        if not inplace:
            return self.turn(x, *arguments)
        if transforms_active():  # which see what happens to x only if torch writes it
            return x.copy_(self.turn(x, *arguments))
        self.in_place(x, *arguments)
        return x
