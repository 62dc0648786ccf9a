"""A plain block in training: autograd functions before, in and after its attention.

Each is what `block._run_parts` does there, as one node of autograd's graph instead of several: on small volumes nodes
are what a step takes. Gradients are by the operations' own formulas, and by the products that torch makes for linear
layers. Within a function rows of all sequences are one axis, as products want them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.eager import Kept, KnownCall

AGAIN = "a block is differentiated twice, which backend 'triton' does not do; use backend='reference'"


class _BeforeAttention(torch.autograd.Function):
    """residual + scale * branch in the new plane's order, its norm, and qkv."""

    @staticmethod
    def forward(
        ctx: Any,
        known: KnownCall,  # add_norm, of the stream
        residual: Tensor,  # (B*P1, g + L1, C)
        branch: Tensor | None,  # like residual
        scale: Tensor | None,  # (C,)
        weight: Tensor | None,  # (C,), of the norm
        bias: Tensor | None,  # (C,)
        *linears: Any,  # weights (out, C) and biases (out,), which may be None
    ) -> tuple[Tensor, ...]:  # (B*P2, g + L2, C), and of each linear layer (B*P2, g + L2, out)
        stream = [t for t in (residual, branch, scale) if t is not None]
        out = known(*stream)
        normed = out[1].view(-1, out[1].shape[2])  # (rows of all, C)
        kept = known.keep(ctx.needs_input_grad[1:6], stream, out)
        learns = any(ctx.needs_input_grad[6::2])  # one of the weights
        ctx.save_for_backward(normed if learns else None, *linears[::2], *kept.taken())
        ctx.known, ctx.kept, ctx.added = known, kept, out[0].numel() > 0
        ctx.set_materialize_grads(False)
        x = out[0] if ctx.added else residual
        made = [F.linear(normed, weight, bias) for weight, bias in zip(linears[::2], linears[1::2])]
        return x, *[t.view(*x.shape[:2], t.shape[1]) for t in made]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        normed, *rest = ctx.saved_tensors
        weights, ctx.kept.saved_tensors = rest[: len(grads)], rest[len(grads) :]
        needed, of_normed = ctx.needs_input_grad, None
        of_linears: list[Tensor | None] = []
        for i in reversed(range(len(grads))):  # in autograd's order: the last one first
            of_x, *found = linear_gradients(grads[i], normed, weights[i], (True, *needed[6 + 2 * i : 8 + 2 * i]))
            of_normed = of_x if of_normed is None else of_normed if of_x is None else of_normed + of_x
            of_linears = found + of_linears
        of_stream = [*ctx.known.back(ctx.kept, grad if ctx.added else None, of_normed, None, None)[:5]]
        if not ctx.added and grad is not None:
            of_stream[0] = grad if of_stream[0] is None else of_stream[0] + grad
        ctx.kept.taken()
        return once(None, *of_stream, *of_linears)


class _OwnAttention(torch.autograd.Function):
    """RoPE and attention by kernels of ours."""

    @staticmethod
    def forward(
        ctx: Any,
        known: KnownCall,  # self_attention
        *made: Tensor,  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
    ) -> Tensor:  # (N, rows, heads, hd)
        out = known(*made)
        kept = known.keep(ctx.needs_input_grad[1:], made, out)
        ctx.save_for_backward(*kept.taken())
        ctx.known, ctx.kept = known, kept
        ctx.set_materialize_grads(False)
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        ctx.kept.saved_tensors = ctx.saved_tensors
        found = ctx.known.back(ctx.kept, grad, None)[: len(ctx.needs_input_grad) - 1]
        ctx.kept.taken()
        return once(None, *found)


class _AfterAttention(torch.autograd.Function):
    """The attention's projection, x + scale * that, its norm, and the MLP: two linear layers around the exact GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        known: KnownCall,  # add_norm
        x: Tensor,  # (N, rows, C)
        context: Tensor,  # (N, rows, heads, hd), contiguous
        output: Tensor,  # (C, heads*hd), the projection
        output_bias: Tensor | None,  # (C,)
        scale: Tensor | None,  # (C,)
        weight: Tensor | None,  # (C,), of the norm
        bias: Tensor | None,  # (C,)
        first: Tensor,  # (hidden, C)
        first_bias: Tensor | None,  # (hidden,)
        last: Tensor,  # (C, hidden)
        last_bias: Tensor | None,  # (C,)
    ) -> tuple[Tensor, Tensor]:  # (N, rows, C) each: the sum, and the branch
        rows = context.view(-1, output.shape[1])  # (rows of all, heads*hd)
        branch = F.linear(rows, output, output_bias).view(x.shape)
        out = known(x, branch)
        total, normed = out[0], out[1].view(-1, x.shape[2])
        needed = ctx.needs_input_grad
        kept = known.keep((needed[1], True, *needed[5:8]), (x, branch), out)
        hidden = F.linear(normed, first, first_bias)
        activated = F.gelu(hidden)
        learns = needed[3], needed[8], needed[10]  # the weights
        inputs = [t if need else None for t, need in zip((rows, normed, activated), learns)]
        ctx.save_for_backward(*inputs, output, first, last, hidden, *kept.taken())
        ctx.known, ctx.kept, ctx.heads = known, kept, context.shape
        ctx.set_materialize_grads(False)
        return total, F.linear(activated, last, last_bias).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_branch: Tensor | None) -> tuple[Any, ...]:
        rows, normed, activated, output, first, last, hidden, *ctx.kept.saved_tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_activated, *of_last = linear_gradients(of_branch, activated, last, (True, *needed[10:12]))
        of_hidden = None if of_activated is None else torch.ops.aten.gelu_backward.default(of_activated, hidden)
        of_normed, *of_first = linear_gradients(of_hidden, normed, first, (True, *needed[8:10]))
        found = ctx.known.back(ctx.kept, grad, of_normed, None, None)
        ctx.kept.taken()
        of_rows, *of_output = linear_gradients(found[1], rows, output, needed[2:5])
        of_context = None if of_rows is None else of_rows.view(ctx.heads)
        return once(None, found[0], of_context, *of_output, *found[2:5], *of_first, *of_last)


class _Whole(torch.autograd.Function):
    """All three, where attention is by kernels of ours too."""

    @staticmethod
    def forward(
        ctx: Any,
        known: Sequence[KnownCall],  # of the three
        heads: int,  # of what a linear layer makes: three times as many where q, k and v are packed
        num_before: int,  # of the tensors that the first takes
        *tensors: Tensor | None,  # what the first takes, and the third after x and context
    ) -> tuple[Tensor, Tensor]:  # (B*P2, g + L2, C) each: the sum, and the branch
        needed, end = ctx.needs_input_grad, 3 + num_before
        of_qkv = [True] * ((num_before - 5) // 2)
        before, within = Kept((False, *needed[3:end])), Kept((False, *of_qkv))
        after = Kept((False, True, True, *needed[end:]))
        x, *made = _BeforeAttention.forward(before, known[0], *tensors[:num_before])  # type: ignore[arg-type]
        context = _OwnAttention.forward(within, known[1], *[t.view(*x.shape[:2], heads, -1) for t in made])
        out = _AfterAttention.forward(after, known[2], x, context, *tensors[num_before:])  # type: ignore[arg-type]
        parts = before, within, after
        kept = [part.taken() for part in parts]
        ctx.parts, ctx.counts = parts, [len(each) for each in kept]
        ctx.save_for_backward(*kept[0], *kept[1], *kept[2])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_branch: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        for part, number in zip(ctx.parts, ctx.counts):
            part.saved_tensors = [*islice(saved, number)]
        before, within, after = ctx.parts
        _, of_x, of_context, *of_after = _AfterAttention.backward(after, grad, of_branch)
        _, *of_made = _OwnAttention.backward(within, of_context)
        _, *of_before = _BeforeAttention.backward(before, of_x, *of_made)
        for part in ctx.parts:
            part.taken()
        return None, None, None, *of_before, *of_after


def linear_gradients(
    grad: Tensor | None,  # (..., out)
    x: Any,  # (rows, in); None where the weight's gradient is not needed
    weight: Tensor,  # (out, in)
    needed: Sequence[bool],  # of x, weight and bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # of x (rows, in), weight and bias
    """Of ``linear(x, weight, bias)``, by the products that torch makes."""
    if grad is None:
        return None, None, None
    if grad.ndim != 2:
        grad = grad.reshape(-1, weight.shape[0])
    of_x = grad.mm(weight) if needed[0] else None
    return of_x, grad.t().mm(x) if needed[1] else None, grad.sum(0) if needed[2] else None


def once(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients; where they are to be differentiated again NotImplementedError is raised then."""
    return _Once.apply(*grads) if torch.is_grad_enabled() else grads


class _Once(torch.autograd.Function):
    """Whose gradient nobody has."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple([None if grad is None else grad.view_as(grad) for grad in grads])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(AGAIN)


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``apply`` without its questions about transforms: none is active where blocks are repeated."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


before_attention, after_attention, whole_block = map(_applied, (_BeforeAttention, _AfterAttention, _Whole))
