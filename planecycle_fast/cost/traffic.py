"""Counts what a callable moves: bytes read and written, copies and GPU launches, per operation and in total.

The ledger's rules. An operation reads each input once and writes each output once; views and uninitialised
allocations cost nothing; an axis of stride 0 is read once; an operation in place reads what it needs and writes once.
A custom operation of this package counts what it declares (`CustomOp.cost`), and its body is looked into: whatever
torch operation runs in there, beside kernels, is counted too, so that a copy cannot hide. Launches are one per torch
operation: a lower bound, as torch may need more. Tensors may be on any device, `meta` included.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = {
    "_to_copy", "_unsafe_index", "cat", "clone", "copy_", "gather", "index", "index_copy_", "index_put_",
    "index_select", "repeat", "scatter", "slice_scatter", "stack",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_"}  # without reading
PICKS = {"index", "index_select", "gather", "embedding"}  # read of their input what they return


@dataclass
class Moved:
    """What all calls of one operation moved."""

    calls: int = 0
    read: int = 0  # bytes
    written: int = 0  # bytes
    launches: int = 0


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic: f(x)``, then `traffic.rows` by operation, and the totals.

    Args:
        smallest: tensors of fewer elements do not count (the ledger leaves out weights, statistics and tables).
        weights: casts of smaller matrices, as autocast makes them, count in a row "weight casts" of their own.
        ops: custom operations to look into, by name, and their namespace; None: those of this package.
    """

    def __init__(
        self,
        smallest: int = 1,
        ops: dict[str, Any] | None = None,
        namespace: str = "planecycle_fast",
        weights: bool = False,
    ) -> None:
        super().__init__()
        self.smallest, self.ops, self.namespace, self.weights = smallest, ops, namespace, weights
        self.rows = defaultdict(Moved)
        self.inside = ""  # of which custom operation's body

    @property
    def read(self) -> int:
        return sum(row.read for row in self.rows.values())

    @property
    def written(self) -> int:
        return sum(row.written for row in self.rows.values())

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows.values())

    @property
    def copies(self) -> dict[str, int]:
        """Calls by operation, of those that only move data; an operation in a custom one's body as ``"op in body"``."""
        return {name: row.calls for name, row in self.rows.items() if name.split(" in ")[0] in COPIES}

    @staticmethod
    def tensors(values: Any) -> list[Tensor]:
        """All tensors in nested containers."""
        return [v for v in tree_leaves(values) if isinstance(v, Tensor)]

    def add(self, name: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Counts one call of an operation: one launch, tensors read and tensors written."""
        self._add(name, sum(map(self._bytes, read)), sum(map(self._bytes, written)))

    def _add(self, name: str, read: int, written: int, launches: int = 1) -> None:
        row = self.rows[name]
        row.calls += 1
        row.launches += launches
        row.read += read
        row.written += written

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == self.namespace:
            ops = _registered() if self.ops is None else self.ops
            if name in ops:
                return self._custom(ops[name], func, args, kwargs)
        out = func(*args, **kwargs)
        if name not in ALLOCATIONS and torch.Tag.inplace_view not in func.tags:
            self._count(name, func, args, kwargs, out)
        return out

    def _count(self, name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        arguments = func._schema.arguments
        bound = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
        mutated = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        storages = {t.untyped_storage()._cdata for t in self.tensors(list(bound.values()))}
        written = [t for n in mutated for t in self.tensors(bound.get(n))]
        written += [t for t in self.tensors(out) if t.untyped_storage()._cdata not in storages]
        if not written and (self.tensors(out) or not storages):  # a view, or an input as it came; dtypes and sizes
            return
        if self.weights and name == "_to_copy" and args[0].ndim == 2 and args[0].numel() < self.smallest:
            self._add("weight casts", args[0].nbytes, out.nbytes)
            return
        overwritten = [a.name for a in arguments if a.is_out] or (mutated if name in OVERWRITES else [])
        if name.endswith("_like") or name.startswith("new_"):
            overwritten = list(bound)  # only their shape is read
        reads = [t for n, v in bound.items() if n not in overwritten for t in self.tensors(v)]
        if name in PICKS:
            reads = [*written, *reads[1:]]
        self.add(f"{name} in {self.inside}" if self.inside else name, reads, written)

    def _custom(self, op: Any, func: Any, args: tuple, kwargs: dict) -> Any:
        cost = op.cost(*args, **kwargs)
        self._add(op.name, cost.read, cost.written, cost.launches)
        if any(t.device.type == "meta" for t in self.tensors([args, kwargs])):
            return func(*args, **kwargs)  # no kernel runs there; the body was looked into elsewhere
        before, self.inside = self.inside, op.name
        try:
            with self:
                return op.body(*args, **kwargs)
        finally:
            self.inside = before

    def _bytes(self, t: Tensor) -> int:
        elements = math.prod([n for n, stride in zip(t.shape, t.stride()) if stride or n == 0])
        return elements * t.element_size() if elements >= self.smallest else 0


def _registered() -> dict[str, Any]:
    """The operations with Triton kernels, once something has imported them."""
    module = sys.modules.get("planecycle_fast.ops.registration")
    return {} if module is None else module.OPS
