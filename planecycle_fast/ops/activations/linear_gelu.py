"""linear_gelu: a linear layer and the exact GELU of what it returns, which a GPU computes in the layer's epilogue.

The linear layer's result is activated before it is rounded, and never written: one pass over the widest activations of
a block instead of three. For inference: training keeps what goes into GELU. SwiGLU would need both halves of its layer
in one tile, twice the accumulators, and is not built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...runtime.backends import pick
from ...runtime.tracing import constant_when_compiled, may_write, transforms_active
from . import linear_gelu_table
from .gelu import gelu_tanh
from .linear_gelu_table import ALIGNED, LEAST_ROWS, EpilogueRow

DTYPES = (torch.float16, torch.bfloat16)


def linear_gelu_ref(
    x: Tensor,  # (..., C), any strides
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None = None,  # (hidden,)
) -> Tensor:  # (..., hidden)
    """Pure PyTorch, any device and floating dtype, differentiable any number of times."""
    return F.gelu(F.linear(x, weight, bias))


def linear_gelu(
    x: Tensor,  # (..., C), any strides
    weight: Tensor,  # (hidden, C), any strides
    bias: Tensor | None = None,  # (hidden,)
    backend: str = "auto",
) -> Tensor:  # (..., hidden)
    """`linear_gelu_ref` on the backend asked for.

    "triton" is one kernel for inference in float16 and bfloat16, on NVIDIA GPUs of compute capability 9.0 and later
    whose shared memory holds its tiles (not 12.x): sums, bias and GELU in float32, rounded once; GELU itself to 7e-6 of
    its value in float16 and 2.9e-4 in bfloat16, below half a rounding of either. "auto" takes it where
    `linear_gelu_table` says that it is faster, and not under torch.compile. "cpu" is torch's linear layer, then GELU,
    as is the reference.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor.
        ValueError: shapes, dtypes (but under autocast) or devices that do not belong together; a backend that is
            unknown or not usable, or, asked for by name, that does not take these tensors.
        NotImplementedError: on "triton" by name, gradients, forward mode or torch.func's transforms.
    """
    check_linear(x, weight, bias)
    chosen = pick(backend, x.device, op="linear_gelu")
    if chosen == "triton":
        reason = why_not_linear_gelu(x, weight, bias)
        if reason is not None and backend != "auto":
            raise ValueError(f"backend 'triton' does not take these tensors: {reason}; use 'auto'")
        recorded = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, weight, bias)])
        if backend != "auto" or (may_write() and not recorded and pays(x, weight, bias)):
            return linear_gelu_on(x, weight, bias)
    return linear_gelu_ref(x, weight, bias)


def linear_gelu_on(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> Tensor:  # (..., hidden)
    """By the kernel, which takes these."""
    from .linear_gelu_triton import linear_gelu_triton

    return linear_gelu_triton(x, weight, bias)


def linear_gelu_tanh(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> Tensor:  # (..., hidden)
    """`linear_gelu_ref` with GELU's tanh approximation, off by up to `TANH_ERROR`: on CUDA cuBLASLt's epilogue.

    Without gradients there. On a CPU torch's function of that name computes the exact GELU, so it is not called.
    """
    if x.device.type != "cuda" or bias is None:
        return gelu_tanh(F.linear(x, weight, bias), True)
    out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def pays(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> bool:
    """Whether the kernel takes these tensors, and the table says that it is faster: for many rows."""
    if x.numel() < LEAST_ROWS * x.shape[-1] or why_not_linear_gelu(x, weight, bias) is not None:
        return False
    return row_for(x.device, *weight.shape[::-1]).wins


def check_linear(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> None:
    """Raises TypeError or ValueError for arguments of `linear_gelu` that do not belong together."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if not (t is None and name == "bias") and (not isinstance(t, Tensor) or not t.is_floating_point()):
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        expected = "(..., C)" if x.ndim == 0 else f"(hidden, {x.shape[-1]})"
        name, got = ("x", x) if x.ndim == 0 else ("weight", weight)
        raise ValueError(f"{name} must have shape {expected}, got {tuple(got.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None or (t.device == x.device and t.dtype == x.dtype):
            continue
        if t.device != x.device or not torch.is_autocast_enabled(x.device.type):  # which casts them
            expected = f"on the device of x and of its dtype, {x.device} and {x.dtype}"
            raise ValueError(f"{name} must be {expected}, got {t.device} and {t.dtype}")


def why_not_linear_gelu(
    x: Tensor,  # (..., C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor | None,  # (hidden,)
) -> str | None:
    """The reason why the kernel does not take these tensors as they lie, or None. What is missing is never copied."""
    if (reason := why_not_on(x.device)) is not None:
        return reason
    given = [t for t in (x, weight, bias) if t is not None]
    if x.dtype not in DTYPES or any([t.dtype != x.dtype for t in given]):
        got = ", ".join([str(t.dtype).removeprefix("torch.") for t in given])
        return f"it needs float16 or bfloat16, the same of all, got {got}"
    if any([t.device != x.device for t in given]):
        return f"it needs all tensors on one device, got {', '.join([str(t.device) for t in given])}"
    (hidden, channels), unit = weight.shape, ALIGNED // x.element_size()
    if channels % unit or hidden % unit or channels == 0:
        return f"it needs channels that are multiples of {unit}, got {channels} to {hidden}"
    if bias is not None and bias.stride(0) != 1:
        return f"it needs a dense bias, got a stride of {bias.stride(0)}"
    for name, t in (("x", x), ("weight", weight)):
        if not t.is_contiguous() and (t.ndim != 2 or t.stride(1) != 1 or t.stride(0) < channels):
            return f"it needs rows of {name} at one distance and channels next to each other, got strides {t.stride()}"
        # Under torch.compile and torch.func there are no addresses; the body looks at them when it runs.
        hidden_address = torch.compiler.is_compiling() or transforms_active() or type(t) is FakeTensor
        start = 0 if hidden_address else t.data_ptr() // t.element_size()
        if start % unit or (t.ndim == 2 and t.stride(0) % unit):
            return f"it needs rows of {name} that start at multiples of {ALIGNED} bytes"
    return None


@constant_when_compiled
def why_not_on(device: torch.device) -> str | None:
    """The reason why the kernel does not run on a device, or None."""
    from ..registration import INTERPRETED

    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it needs tensors on a CUDA device, got {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9 or major == 12:
        return f"its tiles are for compute capability 9.0, 10.x and 11.x, got {major}.{minor}"
    return None


def row_for(device: torch.device, channels: int, hidden: int) -> EpilogueRow:
    """What the table says of a layer on a device."""
    if (reason := why_not_on(device)) is not None:
        return EpilogueRow(False, reason)
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return linear_gelu_table.row(capability, channels, hidden)
