"""What a block consists of, and which of its parts the host's own code runs: read once, for everybody.

`engine.block` runs what a description says, `report` prints it, `pack` makes of it what csrc takes. Parts follow
every module, its class's forward, hook, parameter, buffer and setting of a block. Reading them takes hundreds of
calls; seeing that everything is still the same object as before is one comparison (`Reading`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from ..ops import Norm
from .known import HOOKS, LINEAR, known_norm, why_called
from .parts import NOTHING, Attention, BlockParts, Mlp, Scale

_FORWARD = attrgetter("__class__.forward")  # which somebody may replace in a class
_END = object()  # of what was seen: nothing equals it but itself
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # other subclasses, quantised or sharded, have their own ways
WeightAndBias = tuple[Tensor, "Tensor | None"]  # (out, in), (out,)


class PackedSettings(NamedTuple):
    """What blocks have to agree in to run in one call."""

    num_qkv: int  # one packed layer, or three
    num_first: int  # one layer; gated two, or one that is twice as wide
    norms: tuple[str, str]  # "layer" or "rms", norm1 and norm2
    eps: tuple[float, float]
    heads: int
    scale: float | None  # of scores
    in_table_dtype: bool  # see `ops.rope`
    gated: bool  # SwiGLU instead of GELU


class Packed(NamedTuple):
    """What a block that runs in groups is made of."""

    settings: PackedSettings
    linears: Sequence[Tensor | None]  # weights (out, in) and biases (out,): qkv, out, first, last
    made: Sequence[tuple[int, Callable[[], WeightAndBias]]]  # of these, by position: those that are made when needed
    vectors: Sequence[Tensor | None]  # (C,): norm1's weight and bias, gamma, norm2's weight and bias, gamma

    def tensors(self, dtype: torch.dtype) -> list[Tensor | None] | None:
        """All of them as they are now, or None where they are not of a stream's dtype.

        A LayerScale may be of another that does not widen the sum.
        """
        linears = [*self.linears]
        for position, make in self.made:
            linears[position : position + 2] = make()
        if not all([t is None or (t.dtype is dtype and type(t) in PLAIN) for t in linears]):
            return None
        for gamma in self.vectors[2::3]:
            if gamma is not None and gamma.dtype is not dtype and torch.promote_types(dtype, gamma.dtype) != dtype:
                return None
        return [*linears, *self.vectors]


class NormPart(NamedTuple):
    """norm1 or norm2."""

    module: nn.Module  # the host's own
    known: Norm | None  # as operations take it; None: it is called


@dataclass(frozen=True)
class BlockDescription:
    """A block of a host, taken apart as it is now."""

    parts: BlockParts  # nothing of a block that cannot be taken apart
    kept: Mapping[str, str]  # by part, why the host's own code runs it; "block": all of it, and nothing else is there
    norm1: NormPart = NOTHING
    attention: Attention = NOTHING
    scale1: Scale = NOTHING
    norm2: NormPart = NOTHING
    mlp: Mlp = NOTHING
    scale2: Scale = NOTHING
    plain_qkv: bool = False  # whether what these layers return is x @ weight + bias, and nobody else's
    plain_first: bool = False
    plain_last: bool = False  # both last layers, the attention's output and the MLP's
    prepared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # by `engine.prepared_block`

    @property
    def whole(self) -> str | None:
        """Why the block as a whole must be called, or None."""
        return self.kept.get("block")

    @property
    def why_not_attention(self) -> str | None:
        """Why attention is not taken apart, or None."""
        return self.kept.get("block") or self.kept.get("attention")

    @cached_property
    def is_plain(self) -> bool:
        """Whether all of it is known, and its linear layers are their weights and biases."""
        plain = self.plain_qkv and self.plain_first and self.plain_last
        return plain and not self.kept and not self.attention.qk_norm

    @cached_property
    def packed(self) -> Packed | None:
        """For csrc/blocks.cpp, or None."""
        return pack(self)


def describe(parts: BlockParts | str) -> BlockDescription:
    """What a block consists of now. `parts` is a reason where the block is of an unknown kind."""
    whole = parts if isinstance(parts, str) else parts.why_not()
    if whole is not None:
        return BlockDescription(NOTHING if isinstance(parts, str) else parts, {"block": whole})
    attention, mlp, scale1, scale2 = parts.attention(), parts.mlp(), parts.scale(1), parts.scale(2)
    norms = [parts.norm(1), parts.norm(2)]
    (known1, reason1), (known2, reason2) = map(known_norm, norms)
    found = {
        "norm1": reason1,
        "attention": attention.part.why_not(),
        "scale1": scale1.part.why_not(),
        "norm2": reason2,
        "mlp": mlp.part.why_not(),
        "scale2": scale2.part.why_not(),
    }
    kept = {name: reason for name, reason in found.items() if reason is not None}
    plain_qkv = "attention" not in kept and all([is_plain(linear) for linear in attention.qkv])
    plain_first = "mlp" not in kept and all([is_plain(linear) for linear in mlp.first])
    lasts = () if "attention" in kept or "mlp" in kept else (attention.output, mlp.last)
    return BlockDescription(
        parts, kept,
        norm1=NormPart(norms[0], known1), attention=attention, scale1=scale1,
        norm2=NormPart(norms[1], known2), mlp=mlp, scale2=scale2,
        plain_qkv=plain_qkv, plain_first=plain_first,
        plain_last=len(lasts) > 0 and all([is_plain(linear) for linear in lasts]),
    )  # fmt: skip


def is_plain(linear: Any) -> bool:
    """Whether a linear layer may be replaced by its weight and bias; what is no module says so itself."""
    return why_called(linear, *LINEAR) is None if isinstance(linear, nn.Module) else linear.is_plain


def pack(block: BlockDescription) -> Packed | None:
    """None where a part is left to the host or unknown to csrc, or a linear layer is more than its weight and bias."""
    attention, mlp = block.attention, block.mlp
    if not block.is_plain:
        return None
    linears, made = [], []
    for i, linear in enumerate((*attention.qkv, attention.output, *mlp.first, mlp.last)):
        if type(linear) is nn.Linear:
            linears += [linear.weight, linear.bias]
        else:
            linears += [None, None]
            made.append((2 * i, weight_and_bias(linear)))
    norms = [block.norm1.known, block.norm2.known]
    vectors = [
        t for norm, scale in zip(norms, (block.scale1, block.scale2)) for t in (norm.weight, norm.bias, scale.gamma)
    ]
    if not all([t is None or type(t) in PLAIN for t in vectors]):
        return None
    settings = PackedSettings(
        len(attention.qkv),
        len(mlp.first),
        tuple(["rms" if norm.rms else "layer" for norm in norms]),
        tuple([norm.eps for norm in norms]),
        attention.heads,
        attention.scale,
        attention.in_table_dtype,
        mlp.activation == "swiglu",
    )
    return Packed(settings, linears, made, vectors)


def weight_and_bias(linear: Any) -> Callable[[], WeightAndBias]:
    """Reads those of a plain linear layer; ``LinearKMaskedBias`` of dinov3 masks its bias."""
    if hasattr(linear, "weight_and_bias"):
        return linear.weight_and_bias
    weight, bias = linear.weight, linear.bias
    if type(linear) is nn.Linear or bias is None:
        return lambda: (weight, bias)
    mask = linear.bias_mask
    return lambda: (weight, bias * (mask if mask.dtype is bias.dtype else mask.to(bias.dtype)))


class Reading:
    """Describes a block when something has changed since it did so last.

    Other threads may change the block, or read it, meanwhile: what was read is exchanged as one, and never changed.
    """

    def __init__(self, parts: BlockParts | str) -> None:
        self.parts = parts  # or the reason why there are none
        self._last: tuple[_Watched, BlockDescription] | None = None  # what was read, and what from

    def now(self) -> BlockDescription:
        """The block as it is at this moment, all of it."""
        if isinstance(self.parts, str) or torch.compiler.is_compiling():  # its guards are for what is read
            return describe(self.parts)
        last = self._last
        if last is not None and last[0].is_as_it_was():
            return last[1]
        while True:
            # What is scripted has no dictionaries to look at, and nothing of it changes.
            block, error, found = self.parts.block, None, None
            watched = _Watched([m for m in block.modules() if not isinstance(m, torch.jit.ScriptModule)], self.parts)
            try:
                found = describe(self.parts)
            except Exception as reason:  # of a block that is half changed, or stays so
                error = reason
            if watched.is_as_it_was():  # else a hook came, or a module was replaced, in between
                if error is not None:
                    raise error
                self._last = watched, found
                return found

    def anew(self) -> BlockDescription:
        """The block read once more, whatever has been kept."""
        return describe(self.parts)

    def __reduce__(self) -> tuple:  # copies look for themselves
        return Reading, (self.parts,)


class _Watched:
    """The modules of a block, and all that parts are read from, as it was when this was made.

    It is looked at in every pass. Python compares dictionaries fast, and takes what is the same object for equal;
    tensors have an equality of their own, so those are compared one by one.
    """

    def __init__(self, modules: list[nn.Module], parts: BlockParts) -> None:
        self._parts, self._modules = parts, modules
        attributes = [m.__dict__ for m in modules]
        children = [found[name] for found in attributes for name in ("_modules", "_parameters", "_buffers")]
        hooks = [found[name] for found in attributes for name in HOOKS]
        held = [some for some in (*attributes, *children) if some]
        of_tensors = [any([isinstance(value, Tensor) for value in some.values()]) for some in held]
        self._compared = [some for some, one_by_one in zip(held, of_tensors) if not one_by_one]
        self._one_by_one = [some for some, one_by_one in zip(held, of_tensors) if one_by_one]
        self._empty = [none for none in (*children, *hooks) if not none]  # most of them
        self._hooks = [some for some in hooks if some]
        self._before = [dict(some) for some in self._compared]
        self._tensors = [*self._values()]
        self._types, self._forwards = [type(m) for m in modules], [*map(_FORWARD, modules)]
        self._held_hooks, self._settings = [[*some.values()] for some in self._hooks], self._asked()

    def is_as_it_was(self) -> bool:
        """Whether nothing has changed since."""
        try:
            if self._compared != self._before or any(self._empty):
                return False
        except Exception:  # of objects that cannot be compared, and so are not the same
            return False
        return (
            all(map(is_, self._values(), self._tensors))
            and [*map(type, self._modules)] == self._types
            and [*map(_FORWARD, self._modules)] == self._forwards
            and all(map(is_, self._asked(), self._settings))
            and (not self._hooks or [[*some.values()] for some in self._hooks] == self._held_hooks)
        )

    def _values(self) -> Iterator[Any]:
        return chain(chain.from_iterable(map(dict.values, self._one_by_one)), map(len, self._one_by_one))

    def _asked(self) -> tuple[Any, ...]:
        return _has_any_global_hook(), *self._parts.settings(), _END
