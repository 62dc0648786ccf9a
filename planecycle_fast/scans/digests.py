"""SHA-256 of scans and models: by them a run knows whether features that are there are the ones it would compute."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from ..optional import one_line
from .checks import Refused
from .files import other_file
from .formats.dicom_series import files_of


def digest_of_model(model: nn.Module) -> str:
    """Of the names and values of a CPU model's state_dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_scan(scan: Path, series: str | None = None) -> str:
    """Of a scan's file, with the other one where header and voxels are two, one after another.

    Of a folder those of its only DICOM series, or of the one that is picked.

    Raises ValueError for a path that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        beside = other_file(scan)
        for file in files_of(scan, series) if scan.is_dir() else [scan] if beside is None else [scan, beside]:
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise ValueError(f"volume {scan} cannot be read: {error.strerror or error}") from error
    except Refused as error:
        raise ValueError(f"volume {scan} {one_line(str(error))}") from error
    return digest.hexdigest()
