"""Files of a model by name: in its folder, in the local cache, or on Hugging Face's hub, and whether that answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from ..optional import require

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers, found out quickly: its client would retry for most of a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    url = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or {"http": 80}.get(url.scheme, 443)
    try:
        socket.create_connection((url.hostname, port), timeout).close()
    except OSError:
        return False
    return True


def cached(name: str, files: Iterable[str] = WEIGHTS) -> str | None:
    """The first of these files of a hub's model that is in the local cache, or None."""
    find = require("huggingface_hub", "hf").try_to_load_from_cache
    found = [find(name, file) for file in files]
    return next((path for path in found if isinstance(path, str)), None)


def local_file(name: str, files: Iterable[str] = WEIGHTS) -> str | None:
    """The first of these files of a folder, or of a hub's model as `cached`, or None."""
    if Path(name).is_dir():
        return next((str(Path(name, file)) for file in files if Path(name, file).is_file()), None)
    return cached(name, files)


def hub_file(name: str, *files: str) -> str | None:
    """The first of these small files of a folder, or of a hub's model in the cache, or else on the hub; or None."""
    found = local_file(name, files)
    if found is None and not Path(name).is_dir() and hub_reachable():
        for file in files:
            try:
                return require("huggingface_hub", "hf").hf_hub_download(name, file)
            except OSError:  # not every model has one
                continue
    return found
