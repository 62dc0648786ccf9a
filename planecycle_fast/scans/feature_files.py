"""Features in files: tensors and what they are, as safetensors or npz, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..optional import reason, require

SUFFIXES = (".safetensors", ".npz")
_METADATA = "metadata"  # the array of an npz that holds it, as JSON


class FeatureFile(NamedTuple):
    """What `load_features` returns."""

    tensors: dict[str, Tensor]  # by name; `save_features` says which ones, and their shapes
    metadata: dict[str, Any]  # JSON values


def save_features(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and metadata, JSON values, to a .safetensors or .npz file.

    `planecycle-fast features` writes `patches` (D, H, W, C), `cls` (S, C), `registers` (S, r, C), where the
    model has them, and `pooled` (C,), float32, with ``layer<i>.`` before each name where layers were
    asked for. Metadata: `affine` (4, 4) takes the index (d, h, w, 1) of a patch to the millimetres of
    its centre, RAS+; `axes`, `spacing`, `model` and whatever else made the features what they are.

    Of an array of N volumes all have an axis N before the others, and the array's labels (N, ...) are `labels`, in
    their own dtype; metadata have `volumes`, which is N, and `split`, MedMNIST's name for the array, or None.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written; nothing is left behind then.
        MissingPackageError: a .safetensors without the package safetensors.
    """
    path = Path(path)
    suffix = check_suffix(path)
    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    if suffix == ".npz":
        text = np.array(json.dumps(dict(metadata)))
        with whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: t.numpy() for name, t in arrays.items()}, **{_METADATA: text})
        return
    safetensors = require("safetensors.torch", "scans")
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with whole(path) as temporary:
        try:
            safetensors.save_file(arrays, temporary, metadata=texts)
        except require("safetensors", "scans").SafetensorError as error:  # a full disk, for example
            raise OSError(f"features cannot be written to {path}: {error}") from error


def load_features(path: str | Path) -> FeatureFile:
    """Reads what `save_features` wrote, which says what it is.

    Raises:
        ValueError: another suffix, or a file that is missing, damaged, or not of `save_features`.
        MissingPackageError: a .safetensors without the package safetensors.
    """
    with _opened(Path(path)) as (tensors, metadata):
        return FeatureFile(dict(tensors), metadata)


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata alone, without reading tensors. Raises like `load_features`."""
    with _opened(Path(path)) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]]:
    """Tensors by name, each read when it is asked for, and metadata."""
    suffix = check_suffix(path)
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                metadata = json.loads(str(file[_METADATA][()]))
                yield ((name, torch.from_numpy(file[name])) for name in file.files if name != _METADATA), metadata
        else:
            with require("safetensors", "scans").safe_open(path, framework="pt") as file:
                metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                yield ((name, file.get_tensor(name)) for name in list(file.keys())), metadata
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"features {path} cannot be read: {reason(error)}") from error


def check_suffix(path: Path) -> str:
    """The suffix in lower case. Raises ValueError unless it is one of SUFFIXES."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"features must go to or come from a file ending in {', '.join(SUFFIXES)}, got {path}")
    return path.suffix.lower()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when all went well, and is removed otherwise.

    Every process has its own. One that is killed leaves it, a hidden file that nothing reads.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        temporary.touch()  # with the permissions of any new file, which libraries may take away
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
