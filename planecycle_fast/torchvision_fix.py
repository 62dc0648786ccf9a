"""Makes torchvision importable beside a CPU-only torch, for the command line, the tests and the benchmarks.

torchvision's wheels may not load their compiled part beside another build of torch; its import then
fails with "operator torchvision::nms does not exist", and timm's and transformers' with it. The
Python part works once the two operators that it annotates at import have a schema.
"""

from __future__ import annotations

import importlib

import torch

_library: torch.library.Library | None = None  # keeps the schemas registered


def mend_torchvision() -> bool:
    """Registers the missing schemas if, and only if, torchvision is installed and fails to import.

    Returns whether that was necessary. Never called by the library itself.
    """
    global _library
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return True
