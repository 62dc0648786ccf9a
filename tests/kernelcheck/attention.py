"""Attentions on views of a packed qkv: output and gradient within the budget of torch's plain operations."""

import functools

import torch

from planecycle_fast.ops import attention_ref

from .budget import check_all, reference_errors

SEEDS = 32  # plain operations' largest error in float32 is 0.6e-6 for one input and 2.0e-6 for another


def check_attention(function, shape, dtype, device="cpu"):
    """Raises BudgetError where `function` of q, k and v is further from float64 than it may be.

    Args:
        shape: N, rows, heads, hd.
    """
    check_all(_results(function, *_inputs(shape, dtype, device, 0), dtype), *_allowed(shape, dtype, device))


@functools.cache
def _allowed(shape, dtype, device):  # the same for all attentions
    def compute(seed):
        inputs = _inputs(shape, dtype, device, seed)
        return _results(attention_ref, *inputs, dtype), _results(attention_ref, *inputs, torch.float64)

    return reference_errors(compute, SEEDS)


def _inputs(shape, dtype, device, seed):
    """A packed qkv (N, rows, 3, heads, hd) and the gradient of the output (N, rows, heads, hd)."""
    generator = torch.Generator(device).manual_seed(seed)
    n, rows, heads, head_dim = shape
    sizes = ((n, rows, 3, heads, head_dim), (n, rows, heads, head_dim))
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def _results(function, packed, grad, dtype):
    leaf = packed.detach().to(dtype).requires_grad_()
    out = function(*leaf.unbind(2))
    (gradient,) = torch.autograd.grad(out, leaf, grad.to(dtype))
    return {"output": out.detach(), "gradient": gradient}
