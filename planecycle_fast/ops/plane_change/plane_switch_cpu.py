"""plane_switch on backend "cpu": csrc/plane_switch.cpp with all its derivatives."""

from __future__ import annotations

from ..native_ops import register
from ..registry import linear, more_volumes
from .plane_switch_shapes import adjoint, call_of, fake

OP, _switch = linear(register, "plane_switch", adjoint, more_volumes, fake=fake)

plane_switch_cpu = call_of(_switch)
