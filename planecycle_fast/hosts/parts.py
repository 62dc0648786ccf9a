"""A host's transformer block taken apart by its adapter, so that the stream can run its parts.

A pre-norm block is ``x + ls1 * attn(norm1(x))``, then ``x + ls2 * mlp(norm2(x))``. Linear layers are always called, so
that LoRA, quantisation and hooks on them work. Everything between them is replaced by operations, part by part, unless
something would be lost: hooks, dropout, a kind that is not known. Then the host's own part runs (`Part.why_not`).

`description.describe` reads a block's parts once, for everybody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from .known import is_identity, kind_of, known_dropout, why_called

WHOLE = "its adapter does not take blocks apart"
NOTHING: Any = None  # in the place of what is not taken apart: nobody asks for it there


class Part(NamedTuple):
    """What a part is made of, of those modules that are not called any more."""

    replaced: Sequence[nn.Module | None] = ()
    dropouts: Sequence[nn.Module | None] = ()  # replaced as well, and inactive
    unknown: str | None = None  # why it cannot be taken apart

    def why_not(self) -> str | None:
        """The reason why the host's own modules must run, or None."""
        if self.unknown is not None:
            return self.unknown
        for module in (*self.replaced, *self.dropouts):
            if module is not None and (reason := why_called(module)) is not None:
                return f"{type(module).__name__}: {reason}"
        for module in self.dropouts:
            if is_identity(module):
                continue
            if not known_dropout(module):
                return f"{kind_of(module)} is of an unknown kind"
            if module.training and (p := getattr(module, "p", getattr(module, "drop_prob", 0))):
                return f"{type(module).__name__}: it drops {p:g} in training"
        return None


@dataclass(frozen=True)
class Attention:
    """Self-attention. `qkv` are one packed linear layer, or three."""

    module: nn.Module  # the host's own
    part: Part
    qkv: Sequence[Callable[[Tensor], Tensor]] = ()  # (N, rows, C) to (N, rows, 3*heads*hd), or in three
    heads: int = 0
    scale: float | None = None  # of scores; None: 1/sqrt(hd)
    output: nn.Module = NOTHING  # the projection
    in_table_dtype: bool = False  # see `ops.rope`
    qk_norm: Sequence[nn.Module] = ()  # of each query and each key, (..., hd), before they turn; called


@dataclass(frozen=True)
class Mlp:
    """Linear layers around an activation: "gelu" of one; "swiglu" of two, or of one that holds gate and value."""

    module: nn.Module
    part: Part
    activation: str = ""
    first: Sequence[nn.Module] = ()
    last: nn.Module = NOTHING


@dataclass(frozen=True)
class Scale:
    """What becomes of a branch before it is added: LayerScale, then drop path."""

    gamma: Tensor | None  # (C,)
    part: Part
    modules: Sequence[nn.Module] = field(default_factory=tuple)  # the host's own, in order
    parameter: Tensor | None = None  # (C,), of hosts whose LayerScale is no module; multiplied before `modules`

    def own(
        self,
        branch: Tensor,  # (N, rows, C)
    ) -> Tensor:  # (N, rows, C)
        """As the host does it."""
        if self.parameter is not None:
            branch = self.parameter * branch
        for module in self.modules:
            branch = module(branch)
        return branch


class BlockParts(ABC):
    """A block of one family of hosts, taken apart. See `planecycle_fast.hosts`."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def why_not(self) -> str | None:
        """The reason why the block as a whole must be called, or None."""
        return why_called(self.block)

    def norm(self, number: int) -> nn.Module:
        """norm1 or norm2."""
        return getattr(self.block, f"norm{number}")

    @abstractmethod
    def call_attention(
        self,
        normed: Tensor,  # (N, g + L, C)
        sincos: tuple[Tensor, Tensor] | None,  # RoPE tables, (L, hd) each
    ) -> Tensor:  # (N, g + L, C)
        """The host's own attention, as a whole."""

    @abstractmethod
    def attention(self) -> Attention: ...

    @abstractmethod
    def mlp(self) -> Mlp: ...

    @abstractmethod
    def scale(self, number: int) -> Scale:
        """Of the attention's branch, 1, or the MLP's, 2."""

    def settings(self) -> Sequence[Any]:
        """What parts depend on besides modules, their attributes, parameters and hooks; compared by `is`."""
        return ()
