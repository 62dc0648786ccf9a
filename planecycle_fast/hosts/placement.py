"""Where a model's weights are while its modules run: sharded by FSDP, or brought and taken away by accelerate.

accelerate (`cpu_offload`, `disk_offload`, `dispatch_model`, ``device_map``) gives a module another forward: it brings
the module's own weights and its arguments to a device, and may take the weights away after it. What is called as a
module needs nothing else; here is what a lifted model reads without calling it, and what it does instead of the 2D
model's forward. The one rule for rows: they go where the module that is called with them runs, and RoPE tables go with
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

READ = ("rope", "rope_embed", "rope_embeddings", "rel_pos_bias")  # a host's modules that are read, and not called
_HOOK = "_hf_hook"  # an `accelerate.hooks.ModelHook`


class TensorsOfHost(nn.Module):
    """Of a module that stands for another one, `host`: a tensor in a parameter's place is the host's as well.

    FSDP with a flat parameter puts views of it there, as attributes of the module that it meets.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            if name in self.__dict__:
                self.__dict__["host"].__dict__[name] = value
            else:  # a parameter or buffer again
                self.__dict__["host"].__dict__.pop(name, None)

    def __delattr__(self, name: str) -> None:
        if isinstance(self.__dict__.get(name), Tensor):
            self.__dict__["host"].__dict__.pop(name, None)
        super().__delattr__(name)


def hooks_of(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    """accelerate's hooks on a module and on the host's that it stands for, with the module that each is on."""
    both = (module, module.__dict__.get("host"))
    return [(each, each.__dict__[_HOOK]) for each in both if each is not None and _HOOK in each.__dict__]


def running_place(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of a model's first floating-point parameter when its module runs; None without any."""
    parameters = model.__dict__.get("host", model).parameters()
    parameter = next((p for p in parameters if p.is_floating_point()), None)
    if parameter is None:
        return None
    device = parameter.device
    if device.type == "meta":  # taken away: hooks know where it will be, the innermost the best
        holders = [m for m in model.modules() if any([p is parameter for p in m.parameters()])]
        found = [_device_of(hook) for holder in holders for _, hook in hooks_of(holder)]
        device = next((each for each in reversed(found) if each is not None), device)
    return device, parameter.dtype


def _device_of(hook: Any) -> torch.device | None:
    """Where a hook, or the last one of several in a row, lets its module run."""
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    return next((torch.device(device) for device in reversed(devices) if device is not None), None)


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether they are one; "cuda" is whichever cuda device."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


@contextmanager
def brought(*modules: nn.Module) -> Iterator[None]:
    """All weights within modules brought to where they run, and these called as if nobody had to bring them."""
    held = [(m, m.__dict__[_HOOK]) for module in modules for m in module.modules() if _HOOK in m.__dict__]
    forwards = [module.__dict__["forward"] for module, _ in held]
    try:
        for module, hook in held:
            module.__dict__["forward"] = module.__dict__["_old_forward"]
            hook.pre_forward(module)
        yield
    finally:
        for (module, hook), forward in zip(held, forwards):
            module.__dict__["forward"] = forward
            hook.post_forward(module, None)


def run_placed(
    lifted: nn.Module,
    method: str,
    run: Callable[[Tensor], Any],
    volume: Tensor,  # (B, C, D, height, width)
) -> Any:
    """``run(volume)`` with everything where it runs: with what hooks do around the 2D model's forward, which a lifted
    model does not call, and around its own forward also where another `method` of it was called.

    Raises ValueError where weights are sharded such that nothing will gather them.
    """
    check_sharded(lifted, method)
    hooks = [found for found in hooks_of(lifted) if method != "forward" or found[0] is not lifted]
    found = [module for module in map(lifted.host._modules.get, READ) if module is not None]
    read = [module for module in found if any([_HOOK in inner.__dict__ for inner in module.modules()])]

    def with_weights(volume: Tensor) -> Any:  # (B, C, D, height, width)
        with brought(*read):
            return run(volume)

    return _with_hooks(hooks, with_weights if read else run, volume)


def _with_hooks(
    hooks: Sequence[tuple[nn.Module, Any]],
    run: Callable[[Tensor], Any],
    volume: Tensor,  # (B, C, D, height, width)
) -> Any:
    if not hooks:
        return run(volume)
    (module, hook), *rest = hooks
    (volume,), _ = hook.pre_forward(module, volume)
    return hook.post_forward(module, _with_hooks(rest, run, volume))


def check_sharded(lifted: nn.Module, method: str) -> None:
    """Raises ValueError where FSDP has sharded weights of the root and nothing will gather them.

    Args:
        lifted: the lifted model; `host` is its 2D model.
        method: its method that was called.
    """
    if is_sharded(lifted.host):
        raise ValueError(
            "model is a 2D model that fully_shard was called on: its own forward, which gathers its weights, does not "
            "run here; expected the lifted model to be sharded: lift(model) first, then fully_shard(block) for each of "
            "lifted.blocks and fully_shard(lifted)"
        )
    unregistered = is_sharded(lifted) and method != "forward" and method not in lifted.__dict__
    if unregistered and hasattr(next(lifted.host.parameters(), None), "full_tensor"):  # still a shard
        raise ValueError(
            f"{method} of a model that is sharded needs its weights gathered; call "
            f"torch.distributed.fsdp.register_fsdp_forward_method(lifted, {method!r}) once"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module's weights."""
    return hasattr(type(module), "set_is_last_backward")  # of torch's FSDPModule
