"""Which attention runs, and why another one does not.

As with backends, one asked for by name never falls back. "auto" is what `attention_table` says, on a GPU; elsewhere
"sdpa", torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import why_not
from .tracing import constant_when_compiled

ATTENTIONS = (
    "auto", "triton", "flash", "cudnn", "efficient", "flash2", "flash3", "flash4", "sdpa", "reference",
)  # fmt: skip
MODULES = {  # where each FlashAttention that is a package keeps its `flash_attn_func`, by preference
    "flash2": ("flash_attn",),
    "flash3": ("flash_attn_interface", "fa3_fwd_interface"),
    "flash4": ("flash_attn.cute",),
}
SWITCHES = {  # of each kernel of torch's: what says whether it is on, and what turned it off
    "flash": (torch.backends.cuda.flash_sdp_enabled, "enable_flash_sdp"),
    "cudnn": (torch.backends.cuda.cudnn_sdp_enabled, "enable_cudnn_sdp"),
    "efficient": (torch.backends.cuda.mem_efficient_sdp_enabled, "enable_mem_efficient_sdp"),
}
HALVES = (torch.float16, torch.bfloat16)
ARCHITECTURES = {  # major compute capability
    "triton": range(8, 13), "flash": range(8, 13), "cudnn": range(9, 11), "efficient": range(5, 13),
    "flash2": range(8, 13), "flash3": range(9, 10), "flash4": range(8, 13),
}  # fmt: skip
LARGEST_HEAD = {"triton": 128, "flash": 256, "cudnn": 128, "flash2": 256, "flash3": 256, "flash4": 128}
CUDNN = 91500  # 9.15: older ones have been wrong
BACKWARD_LIMIT = 2**31  # elements of flash2's dq accumulator, whose offsets are 32-bit (TabPFN issue 1184)
PLAIN = (Tensor, torch.nn.Parameter)  # of others, say sharded ones, torch's own operation knows what to do
GRID_LIMIT = 2**16 - 1  # sequences: flash2's kernels have one in each block of a grid's second axis

_loaded: dict[str, Any] = {}  # (function, module name) or the reason why there is none


class AttentionCall(NamedTuple):
    """What attention is called with, but for data and strides. What is a symbol in torch.compile is None."""

    dtype: torch.dtype
    sequences: int | None  # N
    rows: int | None
    heads: int
    head_dim: int
    backward: bool  # whether gradients will be asked for
    scale: float | None = None  # of scores; None: 1/sqrt(hd)

    @staticmethod
    def of(
        q: Tensor,  # (N, rows, heads, hd)
        k: Tensor,  # like q
        v: Tensor,  # like q
        scale: float | None = None,
    ) -> AttentionCall:
        """That with these tensors, in the mode that is on now."""
        return AttentionCall.of_parts((q, k, v), q.shape[2], scale)

    @staticmethod
    def of_parts(
        made: Sequence[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
        heads: int,
        scale: float | None = None,
    ) -> AttentionCall:
        """The same, packed or not."""
        backward = torch.is_grad_enabled() and any([t.requires_grad for t in made])
        n, rows, _, head_dim = made[0].shape
        return AttentionCall(made[0].dtype, known(n), known(rows), heads, head_dim, backward, scale)


def known(size: int) -> int | None:
    """A size, or None where it is a symbol, which to compare would be to fix."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return size if has_static_value(size) else None
    return size if type(size) is int else None


def why_not_attention(attention: str) -> str | None:
    """The reason why an attention cannot be chosen by name on this machine, or None if it can.

    Raises ValueError for an unknown name.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "triton":
        return why_not("triton", op="self_attention")
    if attention in SWITCHES:
        is_on, turn = SWITCHES[attention]
        if not torch.cuda.is_available():
            return "no CUDA device was found"
        if not is_on():
            return f"torch.backends.cuda.{turn}(False) turned it off"
        if attention == "cudnn" and (found := torch.backends.cudnn.version() or 0) < CUDNN:
            return f"it needs cuDNN 9.15 or newer, got {_dotted(found) if found else 'none'}"
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
    scale: float | None = None,
) -> str | None:
    """The reason why an attention that can be chosen does not take these tensors, or None.

    Not without a copy; "triton" makes its own, of rows of heads that do not lie as its kernels want them.
    """
    if attention not in ARCHITECTURES:
        return None
    if not q.dtype == k.dtype == v.dtype:
        return f"it needs one dtype, got {', '.join([_short(t.dtype) for t in (q, k, v)])}"
    reason = why_not_call(attention, q.device, AttentionCall.of(q, k, v, scale))
    if reason is not None or attention == "triton":
        return reason
    for argument, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1:
            return f"it needs channels next to each other, got a stride of {t.stride(3)} in {argument}"
        if attention in ("flash3", "flash4") and not starts_aligned(t):
            return f"it needs rows of {argument} that start at multiples of 16 bytes, or copies them"
    return None


def why_not_call(attention: str, device: torch.device, call: AttentionCall) -> str | None:
    """The reason why an attention that can be chosen does not take tensors of such sizes, or None."""
    if attention not in ARCHITECTURES:
        return None
    if attention == "triton":
        reason = why_not("triton", device, "self_attention")
        if reason is not None:
            return reason
    elif device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # or interpreted
    name = _load(attention)[1] if attention in MODULES else attention
    dtype, sequences, rows, _, head_dim, backward, scale = call
    if major not in ARCHITECTURES[attention]:
        return f"it does not run on compute capability {major}.x"
    dtypes: tuple[torch.dtype, ...] = HALVES if name != "fa3_fwd_interface" else (torch.bfloat16,)
    if attention in ("triton", "efficient"):
        dtypes = (torch.float32, torch.float16, *((torch.bfloat16,) if major >= 8 else ()))
    if attention == "triton" and device.type != "cuda":  # interpreted; not every GPU has the shared memory
        dtypes += (torch.float64,)
    if dtype not in dtypes:
        return f"it needs {' or '.join([_short(each) for each in dtypes])}, got {_short(dtype)}"
    step = 16 // dtype.itemsize if attention == "efficient" else 8
    largest = 256 if attention == "flash4" and major == 9 else LARGEST_HEAD.get(attention, head_dim)
    if head_dim % step or head_dim > largest:
        at_most = f" and at most {largest}" if attention in LARGEST_HEAD else ""
        return f"it needs a head dimension that is a multiple of {step}{at_most}, got {head_dim}"
    if attention == "triton":
        refused = scale is not None and not 0 < scale < float("inf")
        return f"it needs a scale that is positive and finite, got {scale}" if refused else None
    if sequences == 0 or rows == 0:
        return f"it needs at least one token, got {sequences} sequences of {rows} rows"
    if attention == "cudnn" and rows == 1:
        return "it needs at least two rows"
    if attention == "cudnn" and backward and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if attention in ("flash", "flash2") and sequences is not None:
        if sequences > GRID_LIMIT:
            return f"it takes at most {GRID_LIMIT} sequences, got {sequences}"
        if backward and rows is not None and _past_backward_limit(sequences, rows, *call[3:5]):
            return f"its backward counts in 32 bits, too few for {(sequences, *call[2:5])}"
    if backward and (name == "fa3_fwd_interface" or (attention == "flash4" and major == 8)):
        return f"{name} has no backward" + ("" if attention == "flash3" else f" on compute capability {major}.x")
    if backward and attention == "flash" and head_dim > 192 and (major, minor) in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"its backward needs a head dimension of at most 192 on compute capability {major}.{minor}"
    return None


def lie_as_kernels_want(
    *tensors: Tensor,  # (N, rows, heads, hd) each
) -> bool:
    """Whether every attention takes them as they lie: plain tensors, channels side by side, rows at 16 bytes."""
    return all([type(t) in PLAIN and t.stride(3) == 1 and starts_aligned(t) for t in tensors])


def starts_aligned(
    t: Tensor,  # (N, rows, heads, hd)
) -> bool:
    """Whether each head of each row starts at a multiple of 16 bytes."""
    offsets = (t.storage_offset(), *t.stride()[:3])
    return not any([offset * t.element_size() % 16 for offset in offsets])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(version: int) -> str:
    """Of cuDNN: 91002 is 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def too_long_for_backward(
    q: Tensor,  # (N, rows, heads, hd)
) -> bool:
    """Whether FlashAttention 2's backward, torch's own included, would count past 32 bits."""
    return _past_backward_limit(*q.shape)


def _past_backward_limit(sequences: int, rows: int, heads: int, head_dim: int) -> bool:
    padded = -(-rows // 128) * 128
    return sequences * heads * padded * max(head_dim, 32) > BACKWARD_LIMIT


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
