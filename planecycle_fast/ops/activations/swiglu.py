"""swiglu: silu(gate) * value, the activation of gated MLPs; in place where nothing needs the gate again."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...runtime.backends import pick
from .gelu import check_inplace


def swiglu_ref(
    gate: Tensor,  # (..., hidden), any strides; without a value (..., 2*hidden): the gate's half, then the value's
    value: Tensor | None = None,  # (..., hidden), any strides
    inplace: bool = False,
) -> Tensor:  # (..., hidden)
    """Pure PyTorch, any device and floating dtypes, differentiable any number of times unless in place."""
    if value is None:
        gate, value = gate.chunk(2, dim=-1)
    activated = F.silu(gate, inplace=inplace)
    return activated.mul_(value) if inplace else activated * value


def swiglu(
    gate: Tensor,  # (..., hidden), any strides; without a value (..., 2*hidden): the gate's half, then the value's
    value: Tensor | None = None,  # (..., hidden), any strides
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:  # (..., hidden)
    """`swiglu_ref` on the backend asked for.

    Backends "triton" and "cpu" compute in float32 (float64 for float64), round once and are differentiated once, in
    reverse; gate and value in one tensor have their gradients written to one, without the copy that joins two.

    Args:
        value: of any floating dtype; the result has the dtype that torch promotes to.
        inplace: write into the gate, in its dtype, and return it; only where autograd needs neither. The value must
            not overlap it in memory, but for being the same.

    Raises:
        TypeError: gate or value is not a floating-point tensor.
        ValueError: different shapes, a last axis that has no halves where there is no value, `inplace` on a tensor that
            needs a gradient or on gate and value in one, or a backend that is unknown or not usable.
        NotImplementedError: on "triton" and "cpu", forward mode, torch.func's transforms or a second derivative.
    """
    check_swiglu(gate, value, inplace)
    return swiglu_on(pick(backend, gate.device, op="swiglu"), gate, value, inplace)


def swiglu_on(
    chosen: str,  # a backend that can be used
    gate: Tensor,  # (..., hidden), or without a value (..., 2*hidden)
    value: Tensor | None,  # (..., hidden)
    inplace: bool,
) -> Tensor:  # (..., hidden)
    """`swiglu` of what is known to belong together."""
    if chosen == "reference":
        return swiglu_ref(gate, value, inplace)
    if chosen == "cpu":
        from .swiglu_cpu import swiglu_cpu as activate
    else:
        from .swiglu_triton import swiglu_triton as activate

    return activate(gate, value, inplace)


def check_swiglu(
    gate: Tensor,  # as of `swiglu`
    value: Tensor | None,
    inplace: bool = False,
) -> None:
    """Raises TypeError or ValueError for arguments of `swiglu` that do not belong together."""
    check_inplace(gate, inplace, "gate")
    if gate.ndim == 0:
        raise ValueError("gate must have shape (..., hidden), got ()")
    if value is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate must have shape (..., 2*hidden) without a value, got {tuple(gate.shape)}")
        if inplace:
            raise ValueError("inplace must be False without a value, whose half would leave gaps, got True")
        return
    check_inplace(value, inplace, "value")
    if gate.shape != value.shape:
        raise ValueError(f"value must have the gate's shape, {tuple(gate.shape)}, got {tuple(value.shape)}")
