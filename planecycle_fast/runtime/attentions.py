"""Which attention runs, and why another one does not.

As with backends, one asked for by name never falls back. "auto" is "sdpa", torch's scaled_dot_product_attention, until
there is a table of measurements to go by.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import constant_when_compiled

ATTENTIONS = ("auto", "flash2", "flash3", "flash4", "sdpa", "triton", "reference")
MODULES = {  # where each FlashAttention keeps its `flash_attn_func`, by preference
    "flash2": ("flash_attn",),
    "flash3": ("flash_attn_interface", "fa3_fwd_interface"),
    "flash4": ("flash_attn.cute",),
}
ARCHITECTURES = {"flash2": range(8, 13), "flash3": range(9, 10), "flash4": range(8, 13)}  # major compute capability
LARGEST_HEAD = {"flash2": 256, "flash3": 256, "flash4": 128}
BACKWARD_LIMIT = 2**31  # elements of flash2's dq accumulator, whose offsets are 32-bit (TabPFN issue 1184)

_loaded: dict[str, Any] = {}  # (function, module name) or the reason why there is none


def why_not_attention(attention: str) -> str | None:
    """The reason why an attention cannot be chosen by name on this machine, or None if it can.

    Raises ValueError for an unknown name.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "triton":
        from .backends import why_not
        return why_not("triton", op="self_attention")
    if attention not in MODULES:
        return None
    found = _load(attention)
    if isinstance(found, str):
        return found
    return None if torch.cuda.is_available() else "no CUDA device was found"


def attentions() -> dict[str, str | None]:
    """Every attention: None if it can be chosen, else the reason why not."""
    return {name: why_not_attention(name) for name in ATTENTIONS}


def check_attention(attention: str) -> None:
    """Raises ValueError, with the reason, for an attention that is unknown or not usable."""
    reason = why_not_attention(attention)
    if reason is not None:
        usable = ", ".join([name for name in ATTENTIONS if why_not_attention(name) is None])
        raise ValueError(f"attention {attention!r} is not usable: {reason}; usable: {usable}")


def why_not_for(
    attention: str,
    q: Tensor,  # (N, rows, heads, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
) -> str | None:
    """The reason why an attention that can be chosen does not take these tensors without a copy, or None."""
    if attention not in MODULES:
        return None
    if q.device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {q.device}"
    backward = torch.is_grad_enabled() and any([t.requires_grad for t in (q, k, v)])
    major = torch.cuda.get_device_capability(q.device)[0]
    head_dim, name = q.shape[3], _load(attention)[1]
    dtypes = (torch.bfloat16,) if name == "fa3_fwd_interface" else (torch.float16, torch.bfloat16)
    if major not in ARCHITECTURES[attention]:
        return f"it does not run on compute capability {major}.x"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in dtypes:
        expected = " or ".join([str(dtype).removeprefix("torch.") for dtype in dtypes])
        return f"it needs {expected}, got {', '.join([str(t.dtype).removeprefix('torch.') for t in (q, k, v)])}"
    largest = 256 if attention == "flash4" and major == 9 else LARGEST_HEAD[attention]
    if head_dim % 8 or head_dim > largest:
        return f"it needs a head dimension that is a multiple of 8 and at most {largest}, got {head_dim}"
    if backward and (name == "fa3_fwd_interface" or (attention == "flash4" and major == 8)):
        return f"{name} has no backward" + ("" if attention == "flash3" else f" on compute capability {major}.x")
    if backward and attention == "flash2" and too_long_for_backward(q):
        return f"its backward counts in 32 bits, too few for {tuple(q.shape)}"
    if q.shape[0] == 0 or q.shape[1] == 0:
        return f"it needs at least one token, got {tuple(q.shape)}"
    for argument, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1:
            return f"it needs channels next to each other, got a stride of {t.stride(3)} in {argument}"
        offsets = (t.storage_offset(), *t.stride()[:3])
        if attention != "flash2" and any([offset * t.element_size() % 16 for offset in offsets]):
            return f"it needs rows of {argument} that start at multiples of 16 bytes, or copies them"
    return None


def too_long_for_backward(
    q: Tensor,  # (N, rows, heads, hd)
) -> bool:
    """Whether FlashAttention 2's backward, torch's own included, would count past 32 bits."""
    padded = -(-q.shape[1] // 128) * 128
    return q.shape[0] * q.shape[2] * padded * max(q.shape[3], 32) > BACKWARD_LIMIT


def flash_function(attention: str) -> Callable[..., Any]:
    """`flash_attn_func` of a FlashAttention that is installed."""
    return _load(attention)[0]


@constant_when_compiled
def _load(attention: str) -> Any:
    if attention not in _loaded:
        _loaded[attention] = _look_for(attention)
    return _loaded[attention]


def _look_for(attention: str) -> Any:
    reasons = []
    for name in MODULES[attention]:
        try:
            return importlib.import_module(name).flash_attn_func, name
        except ModuleNotFoundError as error:
            missing = name.startswith(error.name or " ")
            reasons.append(f"{name} is not installed" if missing else f"importing {name} failed: {error}")
        except AttributeError:
            reasons.append(f"{name} has no flash_attn_func")
        except Exception as error:  # a broken installation raises anything
            reasons.append(f"importing {name} failed: {type(error).__name__}: {error}")
    return "; ".join(reasons)
