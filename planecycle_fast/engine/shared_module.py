"""A module that is another one under a second name: what a lifted model, its blocks and containers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class SharedModule(nn.Module):
    """A module with the dictionaries and the mode, training or not, of another one, `self.host`.

    What it lacks is read from the host, and set on the host if the host has it.
    """

    told: tuple[str, ...] = ()  # further attributes that are the host's whoever sets them

    def __init__(self, host: nn.Module) -> None:
        nn.Module.__init__(self)  # not super's: there may be a framework's class between
        # Sharing the dictionaries themselves is what makes both modules one: keys, Parameter objects,
        # replaced submodules (LoRA) and assigned parameters are the same in both, copies included.
        for shared in SHARED:
            self.__dict__[shared] = host.__dict__[shared]
        self.__dict__["host"] = host  # past nn.Module.__setattr__: no child

    @property
    def training(self) -> bool:
        """Shared with the host, like everything else."""
        return self.host.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "host" in self.__dict__:  # not yet while nn.Module.__init__ runs
            self.host.training = mode

    def passes_on(self, name: str) -> bool:
        """Whether an attribute that this module lacks is read from the host, if that has it.

        Names with underscores are what frameworks note on a module that they have changed: that is this one alone.
        """
        return not name.startswith("_") or name in self.told

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "host" not in self.__dict__ or not self.passes_on(name):
                raise
        return getattr(self.host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SHARED and "host" in self.__dict__:
            self._share(name, value)
        elif self._is_hosts(name):  # what one reads through this module, one sets through it
            setattr(self.host, name, self._for_host(name, value))
        else:
            nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_hosts(name):
            delattr(self.host, name)
        else:
            nn.Module.__delattr__(self, name)

    def _share(self, name: str, value: Any) -> None:
        """One of the dictionaries is exchanged."""
        setattr(self.host, name, value)
        self.__dict__[name] = value

    def _for_host(self, name: str, value: Any) -> Any:
        """What an attribute of the host becomes where `value` is set here."""
        return value

    def _is_hosts(self, name: str) -> bool:
        """Whether an attribute, no parameter, buffer or module, is the host's."""
        if "host" not in self.__dict__ or name in self.__dict__ or name in ("training", "__class__"):
            return False
        if any([name in self.__dict__[held] for held in ("_parameters", "_buffers", "_modules")]):
            return False
        if any([name in vars(cls) and not isinstance(vars(cls)[name], OfHost) for cls in type(self).__mro__]):
            return False
        return name in self.told or (self.passes_on(name) and hasattr(self.host, name))

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "a lifted model cannot be compiled by torch.jit.script; use torch.export, or torch.jit.trace for one shape"
        )

    def train(self, mode: bool = True) -> SharedModule:
        self.host.train(mode)  # hosts override this, to keep norms frozen for example
        for module in self.around():
            module.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedModule:
        self.host._apply(fn) if recurse else self.host._apply(fn, recurse=False)  # overridden by hosts as well
        for module in self.around() if recurse else ():
            nn.Module._apply(module, fn, recurse=False)
        return self

    def around(self) -> Iterator[nn.Module]:
        """Modules within this one that are not within the host: what has been put around lifted blocks."""
        return iter(())

    # What a module saves of itself is the host's affair; the tree below it is walked through as it is shown.
    def _save_to_state_dict(self, *args: Any) -> None:
        self.host._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.host._load_from_state_dict(*args)

    @property
    def _version(self) -> int:  # type: ignore[override]  # the host's, which nobody sets
        return self.host._version


class OfHost:
    """An attribute of a framework's class, as the host has it."""

    def __init__(self, base: type, name: str) -> None:
        self.base, self.name = base, name

    def __get__(self, module: SharedModule | None, owner: type) -> Any:
        return getattr(self.base if module is None or "host" not in module.__dict__ else module.host, self.name)
