"""Counts what a callable computes, moves and keeps in memory: the `Traffic` ledger, FLOPs and living bytes.

Works on tensors without data (`meta`, or torch's FakeTensorMode) as on real ones.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from .traffic import Traffic
from .workspaces import workspace

aten = torch.ops.aten


class Meter(Traffic):
    """``with Meter() as meter: f(x)``, then what `Traffic` has, `flops`, `live` and `peak`.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention, two for one of each pair,
            by the formulas of torch.utils.flop_counter.
        live: bytes of storages that operations under the meter have made, and that are still alive. Views, and what
            was there before, count nothing.
        peak: the largest `live` so far, with the workspace of each operation that is known to need one.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.flops = self.live = self.peak = 0
        self._followed: dict[int, tuple[int, weakref.ref]] = {}  # by address of the storage: bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = _FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        made = self.tensors(out)
        if made:
            before = {t.untyped_storage()._cdata for t in self.tensors([args, kwargs])}
            for t in made:
                self._follow(t, before)
        self.peak = max(self.peak, self.live + workspace(func, args, kwargs))
        return out

    def _follow(self, t: Tensor, before: set[int]) -> None:
        """Counts a storage that an operation has made, until it is freed."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in before or key in self._followed:
            return
        size = storage.nbytes()
        self._followed[key] = size, weakref.ref(storage, lambda _: self._freed(key))
        self.live += size

    def _freed(self, key: int) -> None:
        self.live -= self._followed.pop(key)[0]


def _linear_flops(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


# Of operations that torch's table lacks: oneDNN's linear layers, and attention on a CPU.
_FORMULAS = {
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
