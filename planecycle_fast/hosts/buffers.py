"""Buffers that a model computes from its configuration and does not save: refused where they hold something else.

What builds a model without data and loads a checkpoint into it leaves such buffers as memory happened to be, unless it
knows how to fill them. Features are then wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..ops.registry import transforms_active

ROUNDED = 2.0**-7  # relative error of what was cast to 16 bits, perhaps more than once


class Computed(NamedTuple):
    """A buffer of a host, and what its configuration gives."""

    module: nn.Module  # the buffer's
    name: str
    make: Callable[[], Tensor]  # of the buffer's shape
    atol: float = 1e-6  # allowed besides `ROUNDED`

    def why_not(self) -> str | None:
        """What is wrong with the buffer, or None."""
        found = getattr(self.module, self.name).detach()
        wanted = self.make().to(found.device, torch.float64)
        if found.shape != wanted.shape:
            return f"shape {tuple(found.shape)}, where the model's configuration gives {tuple(wanted.shape)}"
        if not torch.allclose(found.double(), wanted, rtol=ROUNDED, atol=self.atol):
            return "other values than the model's configuration gives"
        return None


class BufferCheck:
    """Checks the buffers of a host when it sees them first, and when one that is computed has changed."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []  # computed buffers and their versions; none: not checked yet
        self._checked = False

    def __call__(self, adapter: Any) -> None:  # an `Adapter`
        """Raises ValueError, with the buffer's name, for one that holds NaN or is not what it should be."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        computed = adapter.computed_buffers()
        found = [getattr(each.module, each.name) for each in computed]
        seen = self._seen
        same = len(found) == len(seen) and all([t is s and version(t) == at for t, (s, at) in zip(found, seen)])
        if self._checked and same:
            return
        # Among others FakeTensorMode: what is seen then may be without data, and what reads it no part of the model.
        if transforms_active() or _get_current_dispatch_mode_stack() or not all([_has_data(t) for t in found]):
            return
        self._refuse({name: t for name, t in adapter.model.named_buffers() if _has_data(t)}, computed)
        self._seen, self._checked = [(t, version(t)) for t in found], True

    @torch.no_grad()
    def _refuse(self, buffers: dict[str, Tensor], computed: list[Computed]) -> None:
        for name, t in buffers.items():
            if t.is_floating_point() and t.isnan().any():  # infinities: masks, and ranges that nobody has observed yet
                raise ValueError(f"{name} must be finite, got {_values(t)}: {_ADVICE}")
        for each in computed:
            if (reason := each.why_not()) is not None:
                t = getattr(each.module, each.name)
                name = next((name for name, buffer in buffers.items() if buffer is t), each.name)
                raise ValueError(f"{name} has {reason}, got {_values(t)}: {_ADVICE}")

    def __reduce__(self) -> tuple:  # copies have buffers of their own
        return BufferCheck, ()


_ADVICE = (
    "a buffer that the model computes and does not save stays as memory was where a model is built without data and "
    "nobody fills it; build it on a device, or call the module's own initialisation after loading"
)


def version(t: Tensor) -> Any:
    """Changes with what is written to a tensor."""
    return None if t.is_inference() else t._version


def _has_data(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.device.type != "meta" and not t.is_quantized


def _values(t: Tensor) -> str:
    return ", ".join([f"{value:g}" for value in t.flatten()[:4].tolist()]) + (", ..." if t.numel() > 4 else "")
