"""rope on backend "cpu": csrc/rope.cpp, which takes tables; an operation and its twin in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..native_ops import register
from ..registry import linear
from .angles import Axial, Tables
from .rope_autograd import Turning, adjoint, vmap_by

OP, _turn = linear(register, "rope", adjoint, vmap_by("cpu"), fake=lambda x, *_: x.new_empty(x.shape))
IN_PLACE = register("rope_", fake=lambda x, *_: None)


def arguments_of(
    x: Tensor, angles: Tables | Axial, num_globals: int, turned: int | None, in_table_dtype: bool
) -> tuple[Any, ...]:
    """What the operations take after x. Tables are made here of what they can be made of."""
    sin, cos = angles.tables() if isinstance(angles, Axial) else angles
    dtype = sin[0].dtype
    rest: tuple[Any, ...] = [t.shape[0] for t in sin], list(sin), list(cos), [], [], "", False, False, dtype, dtype
    return False, num_globals, x.shape[2] if turned is None else turned, in_table_dtype, *rest


rope_cpu = Turning("cpu", arguments_of, _turn, IN_PLACE)
