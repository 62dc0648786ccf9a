"""swiglu: silu(gate) * value, the activation of gated MLPs; in place where nothing needs the gate again."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..backends import pick
from .gelu import check_inplace


def swiglu_ref(
    gate: Tensor,  # (..., hidden), any strides
    value: Tensor,  # (..., hidden), any strides
    inplace: bool = False,
) -> Tensor:  # (..., hidden)
    """Pure PyTorch, any device and floating dtype, differentiable any number of times unless in place."""
    activated = F.silu(gate, inplace=inplace)
    return activated.mul_(value) if inplace else activated * value


def swiglu(
    gate: Tensor,  # (..., hidden), any strides
    value: Tensor,  # (..., hidden), any strides
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:  # (..., hidden)
    """`swiglu_ref` on the backend asked for.

    Args:
        inplace: write into the gate and return it; only where autograd needs neither.

    Raises:
        TypeError: gate or value is not a floating-point tensor.
        ValueError: different shapes, `inplace` on a tensor that needs a gradient, or a backend that is unknown or
            not usable.
    """
    check_inplace(gate, inplace, "gate")
    check_inplace(value, inplace, "value")
    if gate.shape != value.shape:
        raise ValueError(f"value must have the gate's shape, {tuple(gate.shape)}, got {tuple(value.shape)}")
    pick(backend, gate.device, op="swiglu")
    return swiglu_ref(gate, value, inplace)
