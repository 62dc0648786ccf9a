"""add_norm on backend "cpu", and plane_switch in full: csrc/add_norm.cpp and csrc/add_norm_backward.cpp."""

from __future__ import annotations

from torch import Tensor

from ..native_ops import register
from ..registry import refused_again
from .add_norm_autograd import backward_by, calls_of, fake, fake_backward, setup_context
from .norm import Norm

BACKWARD = register("add_norm_backward", fake=fake_backward, backward=refused_again("add_norm_backward", "cpu"))
OP = register("add_norm", fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD))
IN_PLACE = register("add_norm_", fake=lambda x, branch, scale, weight, bias, norm, eps, normed: None)

add_norm_cpu, add_rows_cpu = calls_of(OP, "cpu", rows_are_wide=True)


def add_norm_in_place(
    x: Tensor,  # (N, rows, C), contiguous; becomes the sum
    branch: Tensor,  # like x
    scale: Tensor | None,  # (C,)
    norm: Norm,
    normed: Tensor,  # like x, of any dtype; becomes the norm
) -> None:
    """`add_rows_cpu` into memory that is there, for inference.

    Raises ValueError where the sum's dtype is not x's.
    """
    kind = "rms" if norm.rms else "layer"
    IN_PLACE(x, branch.contiguous(), scale, norm.weight, norm.bias, kind, norm.eps, normed)
