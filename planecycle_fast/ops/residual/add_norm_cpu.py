"""add_norm on backend "cpu", and plane_switch in full: csrc/add_norm.cpp and csrc/add_norm_backward.cpp."""

from __future__ import annotations

from ..native_ops import register
from ..registry import refused_again
from .add_norm_autograd import backward_by, calls_of, fake, fake_backward, setup_context

BACKWARD = register("add_norm_backward", fake=fake_backward, backward=refused_again("add_norm_backward", "cpu"))
OP = register("add_norm", fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD))
IN_PLACE = register("add_norm_", fake=lambda x, branch, scale, weight, bias, norm, eps, normed: None)

add_norm_cpu, add_rows_cpu = calls_of(OP, "cpu", rows_are_wide=True)
