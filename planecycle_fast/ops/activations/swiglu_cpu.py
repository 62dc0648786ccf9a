"""swiglu on backend "cpu": csrc/swiglu.cpp, its backward and its twin in place. `swiglu_ref` says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native_ops import register
from ..registry import refuse_transforms, refused_again
from .swiglu_autograd import _like, activate, backward_by, fake, setup_context

BACKWARD = register("swiglu_backward", fake=_like, **refused_again("swiglu_backward", "cpu"))
OP = register("swiglu", fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD))
IN_PLACE = register("swiglu_", fake=lambda gate, value: None)


def swiglu_cpu(
    gate: Tensor,  # (..., hidden), or (..., 2*hidden), any strides
    value: Tensor | None,  # (..., hidden), any strides
    inplace: bool,
) -> Tensor:  # (..., hidden), contiguous unless in place
    """`swiglu_ref` in one pass; what `rows_of` cannot take as it lies is copied first.

    Raises NotImplementedError for forward mode, torch.func's transforms or a second derivative.
    """
    refuse_transforms("swiglu", "cpu")
    fits = inplace and gate.is_contiguous() and gate.dtype == torch.promote_types(gate.dtype, value.dtype)
    return activate(OP, IN_PLACE if fits else None, gate, value, inplace)
