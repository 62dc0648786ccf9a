"""What torch is told of self_attention's derivatives, and how its operation is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...runtime.attentions import starts_aligned
from ...runtime.tracing import constant_when_compiled
from ..registry import refuse_transforms
from ..rotary.angles import Axial, Tables
from ..rotary.rope_autograd import check_fixed


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """As `torch.library.register_autograd` takes it."""
    q, k, v, scale, num_globals, grid, sin, cos, load, in_table_dtype, _, precision = inputs
    ctx.save_for_backward(q, k, v, *output, *sin, *cos)
    ctx.settings = scale, num_globals, grid, load, in_table_dtype, precision
    ctx.set_materialize_grads(False)


def backward_by(operation: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """The same, of a backend's ``self_attention_backward``."""

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *tables = ctx.saved_tensors
        scale, num_globals, grid, load, in_table_dtype, precision = ctx.settings
        axes = len(tables) // 2
        sin, cos = tables[:axes], tables[axes:]
        grads: list[Tensor | None] = [None] * 3
        if grad is not None:
            grad = aligned(grad)
            turns = (num_globals, grid, sin, cos, load, load, in_table_dtype, precision)
            grads = [*operation(grad, q, k, v, out, lse, scale, *turns), None, None][:3]
        return *grads, None, None, None if grid else [], [None] * axes, [None] * axes, None, None, None, None

    return backward


def call_of(op: Callable[..., tuple[Tensor, Tensor]], backend: str) -> Callable[..., Tensor]:
    """`self_attention_ref` by an operation, which takes what `attentions.why_not_call` has nothing against.

    It raises NotImplementedError for forward mode, torch.func's transforms or a second derivative, ValueError for
    angles that need a gradient and for more than 2**30 rows or 2**31 - 1 programs.
    """

    def self_attention(
        q: Tensor,  # (N, rows, heads, hd), any strides; without k and v (N, rows, 3*heads, hd)
        k: Tensor | None,  # (N, rows, heads, hd)
        v: Tensor | None,  # like k
        angles: Tables | Axial | None,
        num_globals: int,
        scale: float | None,
        in_table_dtype: bool,
        load: str = "qk",  # what turns: those that have turned already do not
    ) -> Tensor:  # (N, rows, heads, hd), contiguous
        refuse_transforms("self_attention", backend)
        return op(*arguments_of(backend, q, k, v, angles, num_globals, scale, in_table_dtype, load))[0]

    return self_attention


def arguments_of(
    backend: str,
    q: Tensor,  # as of `self_attention`
    k: Tensor | None,
    v: Tensor | None,
    angles: Tables | Axial | None,
    num_globals: int,
    scale: float | None,
    in_table_dtype: bool,
    load: str,
) -> tuple[Any, ...]:
    """What the operation takes. Raises ValueError for angles that need a gradient."""
    held = [aligned(t) for t in (q, k, v) if t is not None]
    grid, sin, cos = table_arguments(angles.tables() if isinstance(angles, Axial) else angles)
    check_fixed((sin, cos), backend)
    keep = torch.is_grad_enabled() and any([t.requires_grad for t in held])
    scale = int(q.shape[3]) ** -0.5 if scale is None else scale
    settings = scale, num_globals, grid, sin, cos, load if sin else "", in_table_dtype, keep
    return *held, *[None] * (3 - len(held)), *settings, product_precision(q.dtype)


def aligned(
    t: Tensor,  # (N, rows, heads, hd), any strides
) -> Tensor:  # the same, channels dense
    """t itself where its heads start at multiples of 16 bytes, else a copy: kernels of whole tiles in
    registers have none left for an address of each element."""
    if t.stride(3) == 1 and (torch.compiler.is_compiling() or starts_aligned(t)):  # a compiler aligns its own memory
        return t
    return t.clone(memory_format=torch.contiguous_format)


def table_arguments(angles: Tables | None) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Grid, sines and cosines as the operations take them."""
    if angles is None:
        return [], [], []
    sin, cos = [[t.contiguous() for t in ts] for ts in angles]
    return [t.shape[0] for t in sin], sin, cos


def product_precision(dtype: torch.dtype) -> str:
    """Of products of float32 on tensor cores: tf32 where torch's own may be, else three of them for one.

    These leave out what is about 2^-22 of a product, as much as float32 rounds sums of 64.
    """
    return ("tf32" if _tf32_allowed() else "tf32x3") if dtype == torch.float32 else "ieee"


@constant_when_compiled
def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
