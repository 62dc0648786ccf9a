"""Whether a module of a host may be replaced: it is of a kind that we know, and nobody can tell that it is not called.

A subclass of somebody else's, a class whose forward somebody replaced, and what hooks, patches and compilers are on may
compute something else. Then the host's own module is called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import Norm

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Contents = tuple[frozenset[str], frozenset[str]]  # names of children, parameters and buffers: needed, optional
LINEAR = (nn.Linear, "LinearKMaskedBias")  # the second is of facebookresearch/dinov3, which is no package
_NORMS = ("LayerNorm of torch or timm", "RMSNorm of torch")
_IDLE = "transformers.utils.output_capturing"  # leaves hooks behind, which record only in the 2D model's own forward


def why_called(module: nn.Module, *kinds: type | str) -> str | None:
    """Why a module has to be called as it is, or None if it may be replaced by what it computes.

    Args:
        kinds: of which it has to be, a class, ``package.ClassName`` of a library, or ``ClassName`` of code that is no
            package; none: of any, which the caller has looked at.
    """
    if kinds and type(module) not in kinds and not is_of(module, *kinds):
        return f"{kind_of(module)} is of an unknown kind"
    members = module.__dict__
    for hooks in HOOKS:
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


def is_of(module: nn.Module, *kinds: type | str) -> bool:
    """Whether a module is of one of these kinds (`why_called`), of a library also with the library's forward."""
    kind, cls = kind_of(module), type(module)
    return cls in kinds or cls.__name__ in kinds or (kind in kinds and comes_from(module, (f"{kind.split('.')[0]}.",)))


def contents(needed: str, optional: str = "") -> Contents:
    """From names separated by spaces."""
    return frozenset(needed.split()), frozenset(optional.split())


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
    needed, optional = known
    names = needed | optional
    held |= {name for name in names if isinstance(module.__dict__.get(name), Tensor)}
    return needed <= held <= names


def known_norm(module: nn.Module) -> tuple[Norm | None, str | None]:
    """A host's norm as operations take it, or the reason why it must be called."""
    kind = kind_of(module)
    if not is_of(module, "torch.LayerNorm", "timm.LayerNorm", "torch.RMSNorm"):
        return None, f"{kind} is no {' or '.join(_NORMS)} with the forward of its library"
    if (reason := why_called(module)) is not None:
        return None, reason
    if getattr(module, "_fast_norm", False):
        return None, "timm's fast norm is on"
    if len(module.normalized_shape) != 1 or module.eps is None:
        return None, f"it normalises {tuple(module.normalized_shape)} with eps {module.eps}"
    return Norm(module.weight, getattr(module, "bias", None), module.eps, kind.endswith("RMSNorm")), None


def known_activation(module: nn.Module, kind: str) -> bool:
    """Whether a module computes the exact GELU ("gelu"), or SiLU ("silu")."""
    if kind == "silu":
        return is_of(module, "torch.SiLU", "transformers.SiLUActivation")
    if is_of(module, "transformers.GELUActivation"):
        return getattr(module, "act", None) is nn.functional.gelu
    return is_of(module, "torch.GELU") and module.approximate == "none"


def known_dropout(module: nn.Module) -> bool:
    """Whether a module is torch's Dropout or a library's DropPath, and so the identity outside training."""
    kind = kind_of(module)
    own = kind.startswith("transformers.") and kind.endswith("DropPath")
    return is_of(module, "torch.Dropout", "timm.DropPath", *([kind] if own else []))


def is_identity(*modules: nn.Module | None) -> bool:
    """Whether all of them are absent or torch's Identity."""
    return all([module is None or type(module) is nn.Identity for module in modules])
