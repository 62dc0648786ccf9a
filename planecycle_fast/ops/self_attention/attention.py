"""attention: softmax(q k^T * scale) v within each sequence, over FlashAttention 2, 3 and 4, torch's own, or plain ops.

Tensors are (N, rows, heads, hd): views of a packed qkv as a linear layer makes it go in as they are, and what comes
out is contiguous, as the projection after it wants it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime.attentions import check_attention, flash_function, too_long_for_backward, why_not_for
from ...runtime.tracing import transforms_active


def attention_ref(
    q: Tensor,  # (N, rows, heads, hd), any strides
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None = None,
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """Pure PyTorch, any device and floating dtype, differentiable any number of times. Softmax in at least float32."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, heads, rows, hd)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (N, heads, rows, rows)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


def attention(
    q: Tensor,  # (N, rows, heads, hd), channels next to each other
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None = None,
    attention: str = "auto",
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """Scaled dot-product attention of every sequence and head (paper section 2.2), by the implementation asked for.

    Args:
        scale: of the scores; None: 1/sqrt(hd).
        attention: "auto", or a name of `attentions.attentions()`; "auto" is torch's own, and the reference in forward
            mode and, on a CPU, torch.func's transforms, which that has no rules for. "sdpa" is torch's
            scaled_dot_product_attention; on a GPU never its cuDNN part, which takes about a second for each new shape.

    Raises:
        TypeError: q, k or v is not a floating-point tensor.
        ValueError: different shapes, or an attention that is unknown, not usable, or does not take these tensors.
    """
    check_heads(q, k, v)
    check_attention(attention)
    reason = why_not_for(attention, q, k, v)
    if reason is not None:
        raise ValueError(f"attention {attention!r} does not take these tensors: {reason}; use 'auto'")
    return attention_on(resolve_attention(attention, q.device), q, k, v, scale)


def check_heads(
    q: Tensor,  # (N, rows, heads, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
) -> None:
    """Raises TypeError or ValueError for queries, keys and values that are none, or do not belong together."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.ndim != 4 or t.shape != q.shape:
            expected = "(N, rows, heads, hd)" if t is q else f"q's shape, {tuple(q.shape)}"
            raise ValueError(f"{name} must have {'shape ' if t is q else ''}{expected}, got {tuple(t.shape)}")


def resolve_attention(attention: str, device: torch.device) -> str:
    """What "auto" is for tensors on a device, now: torch's own but where that has no rules for derivatives."""
    if attention != "auto":
        return attention
    lacks_rules = forward_ad._current_level >= 0 or (device.type == "cpu" and transforms_active())
    return "reference" if lacks_rules else "sdpa"


def attention_on(
    chosen: str,  # "sdpa", "reference", or a FlashAttention that takes these tensors
    q: Tensor,  # (N, rows, heads, hd), channels next to each other
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """`attention` of what is known to belong together."""
    if chosen == "reference":
        return attention_ref(q, k, v, scale)
    if chosen != "sdpa":
        out = flash_function(chosen)(q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out  # some versions return the logarithms of sums as well
    q4, k4, v4 = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cuda":
        choices = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if too_long_for_backward(q):
            choices = choices[1:]
        with sdpa_kernel(choices):
            out = F.scaled_dot_product_attention(q4, k4, v4, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q4, k4, v4, scale=scale)
    return out.transpose(1, 2).contiguous()  # no copy but for torch's plain implementation
