"""The version of this package, and of every package that it can use."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

__version__ = "0.1.0"
PACKAGES = (
    *("torch", "triton", "numpy", "timm", "transformers", "peft", "torchvision", "flash-attn"),
    *("nibabel", "SimpleITK", "pydicom", "onnx", "onnxscript", "onnxruntime", "safetensors", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Version of this package, of Python and of every package that it can use; "not installed" otherwise."""
    found = {"planecycle-fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = torch.__version__ if package == "torch" else metadata.version(package)  # with its build
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
