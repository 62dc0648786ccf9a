"""swiglu on backend "cpu": csrc/swiglu.cpp, its backward and its twin in place. `swiglu_ref` says what it computes."""

from __future__ import annotations

from ..native_ops import register
from ..registry import refused_again
from .swiglu_autograd import _like, backward_by, call_of, fake, setup_context

BACKWARD = register("swiglu_backward", fake=_like, backward=refused_again("swiglu_backward", "cpu"))
OP = register("swiglu", fake=fake, setup_context=setup_context, backward=backward_by(BACKWARD))
IN_PLACE = register("swiglu_", fake=lambda gate, value: None)

swiglu_cpu = call_of(OP, IN_PLACE, "cpu")
