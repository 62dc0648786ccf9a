"""A host's transformer block taken apart, so that the stream can run its parts, and what forbids it.

A pre-norm block is ``x + ls1 * attn(norm1(x))``, then ``x + ls2 * mlp(norm2(x))``. Linear layers are always called, so
that LoRA, quantisation and hooks on them work. Everything between them is replaced by operations, part by part, unless
something would be lost: hooks, dropout, a kind that is not known. Then the host's own part runs (`Parts` says why).

Modules and parameters may be exchanged between passes: `reading.Reading` says how long parts hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import Norm

WHOLE = "its adapter does not take blocks apart"
NORMS = ("LayerNorm of torch or timm", "RMSNorm of torch")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IDLE = "transformers.utils.output_capturing"  # leaves hooks behind, which record only in the 2D model's own forward


def watched(module: nn.Module) -> str | None:
    """Why calling this module cannot be told from not calling it: it has hooks, or is patched or compiled. Or None."""
    members = module.__dict__
    for hooks in _HOOKS:
        if members[hooks] and not all([getattr(hook, "__module__", None) == _IDLE for hook in members[hooks].values()]):
            return "it has hooks"
    if "forward" in members and not _is_own(members["forward"], module):
        return "its forward is patched"
    if members.get("_compiled_call_impl") is not None:
        return "it is compiled"
    return "all modules have hooks" if _has_any_global_hook() else None


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a forward among a module's attributes is its class's after all: transformers 5.0 leaves them behind."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def kind_of(module: Any) -> str:
    """``package.ClassName`` of the very class."""
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


def comes_from(module: nn.Module, packages: tuple[str, ...]) -> bool:
    """Whether the very class of a module and its forward are of one of these packages (``package.``).

    A subclass of somebody else's, and a class whose forward somebody replaced, may compute something else.
    """
    kind = type(module)
    if not kind.__module__.startswith(packages):  # first: a scripted module's class has no forward to look at
        return False
    return (getattr(kind.forward, "__module__", None) or "").startswith(packages)


def _is(module: nn.Module, *kinds: str) -> bool:
    """Whether a module is of one of these kinds (`kind_of`), and its forward is its library's."""
    kind = kind_of(module)
    return kind in kinds and comes_from(module, (f"{kind.split('.')[0]}.",))


class Contents(NamedTuple):
    """Names of children, parameters and buffers."""

    needed: frozenset[str]
    optional: frozenset[str]


def contents(needed: str, optional: str = "") -> Contents:
    """From names separated by spaces."""
    return Contents(frozenset(needed.split()), frozenset(optional.split()))


def consists_of(module: nn.Module, known: Contents) -> bool:
    """Whether a module has all that is needed and nothing that is not known, which its forward may use.

    What is None counts as absent. Where FSDP has a flat parameter, its views are attributes in place of parameters.
    """
    held = {
        name
        for held in (module._modules, module._parameters, module._buffers)
        for name, value in held.items()
        if value is not None
    }
    names = known.needed | known.optional
    held |= {name for name in names if isinstance(module.__dict__.get(name), Tensor)}
    return known.needed <= held <= names


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
            if module is not None and (reason := watched(module)) is not None:
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
    output: nn.Module | None = None  # the projection
    in_table_dtype: bool = False  # see `ops.rope`


@dataclass(frozen=True)
class Mlp:
    """Linear layers around an activation: "gelu" of one; "swiglu" of two, or of one that holds gate and value."""

    module: nn.Module
    part: Part
    activation: str = ""
    first: Sequence[nn.Module] = ()
    last: nn.Module | None = None


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
        return watched(self.block)

    def norm(self, number: int) -> nn.Module:
        """norm1 or norm2."""
        return getattr(self.block, f"norm{number}")

    def norm_or_reason(self, number: int) -> tuple[Norm | None, str | None]:
        """norm1 or norm2 as operations take it, or the reason why it must be called."""
        return known_norm(self.norm(number))

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


class Snapshot(BlockParts):
    """The parts of a block in one pass, each read once."""

    def __init__(self, parts: BlockParts) -> None:
        super().__init__(parts.block)
        self._parts, self._found = parts, {}

    def _read(self, name: str, *number: int) -> Any:
        key = (name, *number)
        if key not in self._found:
            self._found[key] = getattr(self._parts, name)(*number)
        return self._found[key]

    def why_not(self) -> str | None:
        return self._read("why_not")

    def norm(self, number: int) -> nn.Module:
        return self._read("norm", number)

    def call_attention(
        self,
        normed: Tensor,  # (N, g + L, C)
        sincos: tuple[Tensor, Tensor] | None,  # (L, hd) each
    ) -> Tensor:  # (N, g + L, C)
        return self._parts.call_attention(normed, sincos)

    def attention(self) -> Attention:
        return self._read("attention")

    def mlp(self) -> Mlp:
        return self._read("mlp")

    def scale(self, number: int) -> Scale:
        return self._read("scale", number)

    def plan(self) -> Plan:
        """`plan` of these parts."""
        return self.once("plan", lambda: plan(self))

    def norm_or_reason(self, number: int) -> tuple[Norm | None, str | None]:
        return self._read("norm_or_reason", number)

    def known_norm(self, number: int) -> Norm | None:
        """norm1 or norm2 as operations take it."""
        return self._read("norm_or_reason", number)[0]

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` makes of these parts, made once."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]


def known_norm(module: nn.Module, channels: int | None = None) -> tuple[Norm | None, str | None]:
    """A host's norm as operations take it, or the reason why it must be called."""
    kind = kind_of(module)
    if not _is(module, "torch.LayerNorm", "timm.LayerNorm", "torch.RMSNorm"):
        return None, f"{kind} is no {' or '.join(NORMS)} with the forward of its library"
    if (reason := watched(module)) is not None:
        return None, reason
    if getattr(module, "_fast_norm", False):
        return None, "timm's fast norm is on"
    if len(module.normalized_shape) != 1 or module.eps is None:
        return None, f"it normalises {tuple(module.normalized_shape)} with eps {module.eps}"
    return Norm(module.weight, getattr(module, "bias", None), module.eps, kind.endswith("RMSNorm")), None


def known_activation(module: nn.Module, kind: str) -> bool:
    """Whether a module computes the exact GELU ("gelu"), or SiLU ("silu")."""
    if kind == "silu":
        return _is(module, "torch.SiLU", "transformers.SiLUActivation")
    if _is(module, "transformers.GELUActivation"):
        return getattr(module, "act", None) is nn.functional.gelu
    return _is(module, "torch.GELU") and module.approximate == "none"


def known_dropout(module: nn.Module) -> bool:
    """Whether a module is torch's Dropout or a library's DropPath, and so the identity outside training."""
    kind = kind_of(module)
    own = kind.startswith("transformers.") and kind.endswith("DropPath")
    return _is(module, "torch.Dropout", "timm.DropPath", *([kind] if own else []))


def is_identity(*modules: nn.Module | None) -> bool:
    """Whether all of them are absent or torch's Identity."""
    return all([module is None or type(module) is nn.Identity for module in modules])


@dataclass(frozen=True)
class Plan:
    """Which parts of a block the host runs itself: the reason by part, None where operations do."""

    block: str | None = None
    norm1: str | None = None
    attention: str | None = None
    scale1: str | None = None
    norm2: str | None = None
    mlp: str | None = None
    scale2: str | None = None

    def reasons(self) -> dict[str, str]:
        """Of the parts that are not replaced."""
        return {name: reason for name, reason in vars(self).items() if reason is not None}


def plan_of(parts: Snapshot | str) -> Plan:
    """The plan of parts that have been read, or of a block that has none, and why."""
    return Plan(block=parts) if isinstance(parts, str) else parts.plan()


def plan(parts: BlockParts | str) -> Plan:
    """What can be replaced in a block now. `parts` is a reason where the block is of an unknown kind."""
    if isinstance(parts, str):
        return Plan(block=parts)
    if (reason := parts.why_not()) is not None:
        return Plan(block=reason)
    return Plan(
        norm1=parts.norm_or_reason(1)[1],
        attention=parts.attention().part.why_not(),
        scale1=parts.scale(1).part.why_not(),
        norm2=parts.norm_or_reason(2)[1],
        mlp=parts.mlp().part.why_not(),
        scale2=parts.scale(2).part.why_not(),
    )
