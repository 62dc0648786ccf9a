"""Which implementations a pass runs, and in which mode: decided once, and carried along by `engine.stream.Layer`.

Operations that are called directly decide for themselves, by the same rules (`runtime.backends`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..runtime.attention_table import ChosenAttention, choose_attention
from ..runtime.attentions import AttentionCall
from ..runtime.backends import LACKS, asked_for, choose
from ..runtime.sizes_seen import seen_before
from ..runtime.tracing import may_write
from .activations.linear_gelu import why_not_on
from .multihead_attention.attention import resolve_attention
from .residual.add_norm import backend_of_rows

OPERATIONS = ("plane_switch", "add_norm", "rope", "swiglu")  # gelu is torch's own, whatever the backend


@dataclass(frozen=True)
class Choice:
    """Of one pass on one device."""

    asked: str  # the backend, or "auto"
    strict: bool
    device: torch.device
    plane_switch: str  # backends: of a change of planes alone,
    add_norm: str  # of one in full, and of the sum and its norm,
    rope: str
    swiglu: str
    patchify: str  # "triton" or "reference"; `engine.embedding` says where a host embeds patches itself
    attention: str  # "sdpa", "reference", the one asked for by name, or "auto": `attention_for` says what that is
    grad: bool  # whether gradients are recorded
    writes: bool  # whether what nobody else holds may be written to, see `tracing.may_write`
    autocast: torch.dtype | None  # what linear layers cast to
    gelu: str = "exact"  # or "triton", exact in fc1's epilogue where that pays, or "tanh_epilogue", by name
    repeats: bool = False  # whether volumes of these sizes have come before, see `sizes_seen`

    @staticmethod
    def of(
        backend: str,
        attention: str,
        strict: bool,
        device: torch.device,
        gelu: str = "exact",
        sizes: Sequence[int] | None = None,
    ) -> Choice:
        """`sizes` are the volume's, of a pass that begins.

        Raises ValueError, with the reason, for a backend asked for by name that is not usable there.
        """
        asked = asked_for(backend)
        first = choose(asked, device, OPERATIONS[0], strict)
        chosen = [choose(asked, device, op, strict) if op in LACKS[first] else first for op in OPERATIONS]
        plane_switch, add_norm, rope, swiglu = chosen  # written out, as they have types
        patchify = "reference" if "patchify" in LACKS[first] else first
        by = (plane_switch, add_norm, rope, swiglu, patchify, resolve_attention(attention, device))
        compiled = torch.compiler.is_compiling()  # fc1 and GELU are two there
        if gelu == "exact" and add_norm == "triton" and not compiled and why_not_on(device) is None:
            gelu = "triton"
        repeats = by[-1] == "auto" and sizes is not None and seen_before(sizes)
        return Choice(asked, strict, device, *by, *_mode(device), gelu, repeats)

    def for_rows(self, channels: int) -> Choice:
        """The same for rows of so many channels. Raises ValueError as `backend_of_rows` does."""
        chosen = backend_of_rows(self.add_norm, self.asked, channels)
        return self if chosen == self.add_norm else replace(self, add_norm=chosen)

    def here(
        self,
        x: Tensor,  # (..., C)
    ) -> Choice:
        """The same for rows like x, in the mode that is on now: hooks may have changed it, or the device."""
        if x.device != self.device:
            gelu = "tanh_epilogue" if self.gelu == "tanh_epilogue" else "exact"
            moved = Choice.of(self.asked, self.attention, self.strict, x.device, gelu).for_rows(x.shape[-1])
            return replace(moved, repeats=self.repeats)
        grad, writes, autocast = mode = _mode(x.device)
        if mode == (self.grad, self.writes, self.autocast):
            return self
        return replace(self, grad=grad, writes=writes, autocast=autocast)

    def attention_for(self, call: AttentionCall, plain: bool) -> ChosenAttention:
        """The attention of one layer, and why: where it is "auto", by the table.

        Args:
            plain: whether q, k and v lie as every kernel wants them (`attentions.lie_as_kernels_want`; a plain linear
                layer's do), of one dtype.
        """
        if self.attention != "auto":
            return ChosenAttention(self.attention, "chosen" if self.attention != "sdpa" else "torch's own")
        if not plain or self.autocast not in (None, call.dtype):
            return ChosenAttention("sdpa", "static: it copies and casts what kernels do not take as it is")
        return choose_attention(self.device, call, self.repeats, own=self.rope == "triton")

    def plain(self) -> Choice:
        """The same by references, nothing in place."""
        references: dict[str, Any] = dict.fromkeys((*OPERATIONS, "patchify", "attention"), "reference")
        return replace(self, writes=False, **references)

    def may_overwrite(
        self,
        t: Tensor,  # any shape
        new: bool,  # whether it has just been made, and nobody else holds it
    ) -> bool:
        """The one rule for what is written in place."""
        return new and self.writes and not t.requires_grad


def _mode(device: torch.device) -> tuple[bool, bool, torch.dtype | None]:
    """Grad, writes and autocast, as they are now."""
    autocast, kind = None, device.type
    if torch._C._is_any_autocast_enabled():
        # torch 2.11 cannot trace is_autocast_available.
        available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
        autocast = torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), may_write(), autocast
