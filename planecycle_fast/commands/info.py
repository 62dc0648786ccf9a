"""`planecycle-fast info`: what is installed, what runs here, what does not and why, and where caches are."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import torch

from ..optional import require, shortened
from ..runtime import native
from ..runtime.attentions import attentions
from ..runtime.backends import backends
from ..version import versions


def devices() -> dict[str, str]:
    """Devices that torch can use here, by torch's name for them."""
    found = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        found[f"cuda:{i}"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def caches() -> dict[str, Path]:
    """Folders that models and compiled kernels are kept in, whether they exist yet or not."""
    folders = {"torch hub": Path(torch.hub.get_dir())}
    if importlib.util.find_spec("huggingface_hub"):
        from huggingface_hub.constants import HF_HUB_CACHE

        folders["Hugging Face and timm models"] = Path(HF_HUB_CACHE)
    home = os.environ.get("TRITON_HOME", str(Path.home()))
    folders["operations of backend cpu"] = native.cache()
    folders["Triton kernels"] = Path(os.environ.get("TRITON_CACHE_DIR", Path(home) / ".triton" / "cache"))
    return folders


def library() -> str:
    """Which library has the operations of backend "cpu", or why none has."""
    reason = native.why_not_native()
    if reason is not None:
        return reason
    found = native.found()
    return str(found) if found is not None else "not built yet: on first use, or by planecycle-fast build"


def imports() -> dict[str, str]:
    """Whether the libraries that models are from can be imported here, and if not, why and what would help."""
    found = {}
    if importlib.util.find_spec("torchvision") is not None:
        found["torchvision"] = why_not_torchvision() or "usable"
    # What they import is read at their first model.
    for package, model in (("timm", "create_model"), ("transformers", "AutoModel"), ("peft", "PeftModel")):
        if importlib.util.find_spec(package) is not None:
            try:
                getattr(importlib.import_module(package), model)
                found[package] = "usable"
            except Exception as error:  # whatever is wrong with an installation
                found[package] = f"cannot be imported: {shortened(error.__cause__ or error, 300)}"
    return found


def why_not_torchvision() -> str | None:
    """What is wrong with torchvision beside this torch, and what would help; None: nothing."""
    release = [int(part) for part in torch.__version__.split(".")[:2]]
    wanted = f"0.{release[1] + 15}" if release[0] == 2 else "that belongs to it"  # 0.15 came with torch 2.0
    help_ = f"torch {torch.__version__} needs torchvision {wanted}, from where torch was installed from"
    try:
        importlib.import_module("torchvision")
        if importlib.import_module("torchvision.extension")._has_ops():
            return None
    except Exception as error:  # whatever is wrong with an installation
        return f"cannot be imported: {shortened(error, 300)}; {help_}"
    return (
        "its compiled operations do not load beside this torch. Nothing here needs them, and it can be imported after "
        f"planecycle_fast, but not before; {help_}"
    )


def run_info() -> None:
    """Versions, devices, what runs here and what does not and why, and where caches are."""
    console = require("rich.console", "scans").Console(soft_wrap=True, highlight=False, markup=False)
    sections = {
        "version": versions(),
        "device": devices(),
        "backend": {name: reason or "usable" for name, reason in backends().items()},
        "library": {"cpu": library()},
        "attention": {name: reason or "usable" for name, reason in attentions().items()},
        "import": imports(),
        "cache": {name: f"{path}{'' if path.exists() else ' (not there yet)'}" for name, path in caches().items()},
    }
    for title, rows in sections.items():
        width = max(map(len, rows))
        for name, value in rows.items():
            console.print(f"{title:<11}{name:<{width}}  {value}")
            title = ""
