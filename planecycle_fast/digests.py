"""SHA-256 of scans and models: by them a run knows whether features that are there are the ones it would compute."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from .scan_files import other_file


def digest_of_model(model: nn.Module) -> str:
    """Of the names and values of a CPU model's state_dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_scan(scan: Path) -> str:
    """Of a scan's file, with the other one where header and voxels are two, or of a folder's, hidden ones left out.

    Raises ValueError for a path that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = [file for file in (scan, other_file(scan)) if file is not None]
        if scan.is_dir():
            files = sorted(file for file in scan.iterdir() if file.is_file() and not file.name.startswith("."))
        for file in files:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise ValueError(f"volume {scan} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
