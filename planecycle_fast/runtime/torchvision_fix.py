"""Makes torchvision importable beside a torch that it was not built for, and timm and transformers with it.

torchvision's wheels do not load their compiled part beside another build of torch, a CPU-only one for example; its
import then fails with "operator torchvision::nms does not exist", and timm's and transformers' with it. The Python
part, which is all that they need, works once the two operators that it annotates at import have a schema.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

_library: torch.library.Library | None = None  # keeps the schemas registered


class TorchvisionFinder:
    """Finds torchvision as Python does, and runs it again with the schemas if it fails without; nothing else."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]  # of this one
        return spec


def watch_torchvision() -> None:
    """From now on torchvision, when somebody imports it, is mended if, and only if, it would fail. Imports nothing.

    `import planecycle_fast` does this.
    """
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def mend_torchvision() -> bool:
    """Imports torchvision, if it is installed, now; returns whether it had to be mended for that."""
    before = _library
    watch_torchvision()
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return False
    return _library is not before


def _execute(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    global _library
    try:
        run(module)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        run(module)
