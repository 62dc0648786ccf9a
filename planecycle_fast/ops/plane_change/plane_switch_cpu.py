"""plane_switch on backend "cpu": csrc/plane_switch.cpp with all its derivatives."""

from __future__ import annotations

from torch import Tensor

from ...geometry.planes import Plane, Sizes
from ...geometry.pooling import Transition
from ..native_ops import register
from ..registry import linear
from .plane_switch_shapes import adjoint, fake, more_volumes

OP, _switch = linear(register, "plane_switch", adjoint, more_volumes, taken=lambda x: x.contiguous(), fake=fake)


def plane_switch_cpu(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; copied first unless contiguous
    old: Plane,
    new: Plane,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`, contiguous
    """`plane_switch_ref` in one pass, with derivatives in forward and reverse mode, any number of times.

    Patches are bit for bit those of the reference; globals are summed in float64.
    """
    via = transition.num_prev if transition.via is None else transition.via
    return _switch(x, old.name, new.name, list(sizes), num_globals, via, transition.mean, False)
