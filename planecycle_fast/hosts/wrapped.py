"""Modules as frameworks leave them: compiled, sharded, checkpointed, parametrised, or with adapters inside.

A host's modules are called, whatever they have become, so that LoRA and quantisation take effect. What is read from
one, a size or a setting, is read here: the attribute may be one of the module inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Children of torch's wrappers that compute what the module inside computes: torch.compile, FSDP, activation
# checkpointing and offloading, DistributedDataParallel.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_DERIVED = ("torch.nn.utils.parametrize", "torch.distributed.")  # classes made of a module's own: FSDP2's, parametrised


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what torch has put around it. Other wrappers may compute something of their own: they stay."""
    while type(module).__module__.startswith("torch.") and not isinstance(module, torch.jit.ScriptModule):
        inside = [module._modules[name] for name in _INSIDE if module._modules.get(name) is not None]
        if not inside:
            break
        module = inside[0]
    return module


def own_class(module: nn.Module) -> type:
    """A module's class, or the one that torch made its class from."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith(_DERIVED))


def read(module: nn.Module, name: str, default: Any) -> Any:
    """An attribute of a module, or of the first one inside it that has it: an adapter's base layer, for example."""
    return next((getattr(found, name) for found in module.modules() if _has(found, name)), default)


def _has(module: nn.Module, name: str) -> bool:
    """Whether it has an attribute of its own, and does not pass on that of another."""
    if isinstance(module, torch.jit.ScriptModule):
        return hasattr(module, name)
    held = (vars(module), module._parameters, module._buffers, module._modules)
    return any([name in each for each in held]) or hasattr(type(module), name)
