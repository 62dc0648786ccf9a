"""How the operations of csrc become torch operations: what torch cannot know of C++ code, its fakes and derivatives.

Their schemas are those of the Triton operations (csrc/ops.cpp), in the namespace ``planecycle_fast_cpu``. Importing a
module ``<op>_cpu`` needs the library (`native.ready`). Under autocast they keep the dtypes that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..runtime import native
from .registry import CustomOp

NAMESPACE = "planecycle_fast_cpu"
OPS: dict[str, CustomOp] = {}  # every operation registered so far


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> CustomOp:
    """The operation ``planecycle_fast_cpu::<name>``; arguments as `registration.register` takes them.

    Raises ValueError where the library is not usable.
    """
    if not native.ready():
        raise ValueError(f"backend 'cpu' is not usable: {native.why_not_native()}")
    qualified = f"{NAMESPACE}::{name}"
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap)
    OPS[name] = CustomOp(name, overload, None, overload)
    return OPS[name]
