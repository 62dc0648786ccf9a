"""attention: softmax(q k^T * scale) v within each sequence, by torch's kernels, a FlashAttention, or plain operations.

Tensors are (N, rows, heads, hd): views of a packed qkv as a linear layer makes it go in as they are, and what comes
out is contiguous, as the projection after it wants it. torch's kernels are called as such: choosing among them by a
context takes the host as long as a small attention takes the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime.attention_table import choose_attention
from ...runtime.attentions import (
    SWITCHES,
    AttentionCall,
    check_attention,
    flash_function,
    lie_as_kernels_want,
    too_long_for_backward,
    why_not_for,
)
from ...runtime.backends import pick
from ...runtime.tracing import recorder, transforms_active


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
        attention: "auto", or a name of `attentions.attentions()`. "auto" is what `runtime.attention_table` says for
            these sizes on a GPU, "sdpa" elsewhere, and the reference in forward mode and, on a CPU, torch.func's
            transforms, which that has no rules for. "flash", "cudnn" and "efficient" are torch's kernels by name,
            "sdpa" its scaled_dot_product_attention: whichever of them its own switches and priorities say.

    Raises:
        TypeError: q, k or v is not a floating-point tensor.
        ValueError: different shapes, or an attention that is unknown, not usable, or does not take these tensors.
    """
    check_heads(q, k, v)
    check_attention(attention)
    check_takes(attention, q, k, v, scale)
    name = resolve_attention(attention, q.device)
    if name == "auto":
        plain = not torch.compiler.is_compiling() and lie_as_kernels_want(q, k, v) and q.dtype == k.dtype == v.dtype
        own = pick("auto", q.device) == "triton"
        name = "sdpa"
        if plain and not _casts(q):
            name = choose_attention(q.device, AttentionCall.of(q, k, v, scale), repeats=False, own=own).attention
    return attention_on(name, q, k, v, scale)


def check_takes(
    attention: str,
    q: Tensor,  # (N, rows, heads, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> None:
    """Raises ValueError, with the reason, where an attention that can be chosen does not take these tensors."""
    reason = why_not_for(attention, q, k, v, scale)
    if reason is not None:
        raise ValueError(f"attention {attention!r} does not take these tensors: {reason}; use 'auto'")


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
    """What "auto" is for tensors on a device, now; on an NVIDIA GPU still "auto", which depends on sizes as well.

    Torch's own but where that has no rules for derivatives; that too for those who record or transform operations.
    """
    if attention != "auto":
        return attention
    transformed = transforms_active()
    if forward_ad._current_level >= 0 or (device.type == "cpu" and transformed):
        return "reference"
    table = device.type == "cuda" and not torch.version.hip and not transformed and recorder() is None
    return "auto" if table else "sdpa"


def attention_on(
    name: str,  # one that takes these tensors
    q: Tensor,  # (N, rows, heads, hd), channels next to each other
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """`attention` of what is known to belong together."""
    if name == "reference":
        return attention_ref(q, k, v, scale)
    if name == "triton":
        from .self_attention_triton import self_attention_triton

        return self_attention_triton(q, k, v, None, 0, scale, False)
    if name not in TORCHS:
        out = flash_function(name)(q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out  # some versions return the logarithms of sums as well
    out = TORCHS[name](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return out.transpose(1, 2).contiguous()  # no copy but for torch's plain implementation


def _sdpa(
    q: Tensor,  # (N, heads, rows, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> Tensor:  # (N, heads, rows, hd)
    if q.device.type == "cuda" and not torch.compiler.is_compiling() and too_long_for_backward(q.transpose(1, 2)):
        efficient = SWITCHES["efficient"][0]()
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if efficient else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _flash(
    q: Tensor,  # (N, heads, rows, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> Tensor:  # (N, heads, rows, hd)
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0]


def _with_sums(
    operation: Callable[..., tuple[Tensor, ...]],
    q: Tensor,  # (N, heads, rows, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
    scale: float | None,
) -> Tensor:  # (N, heads, rows, hd)
    """Of those that are told whether backward will need the logarithms of sums."""
    keep = torch.is_grad_enabled() and any([t.requires_grad for t in (q, k, v)])
    return operation(q, k, v, None, keep, scale=scale)[0]


TORCHS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "cudnn": partial(_with_sums, torch.ops.aten._scaled_dot_product_cudnn_attention.default),
    "efficient": partial(_with_sums, torch.ops.aten._scaled_dot_product_efficient_attention.default),
}


def _casts(
    q: Tensor,  # any shape
) -> bool:
    """Whether autocast would cast it for scaled_dot_product_attention: its kernels, called as such, do not."""
    return torch.is_autocast_enabled(q.device.type) and q.dtype != torch.get_autocast_dtype(q.device.type)
