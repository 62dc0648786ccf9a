"""Many volumes in one array, such as those of MedMNIST3D, and their features in one file."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checks import Refused, ScanOptions, ScanWarning, complaints, gib, warn
from .files import check_no_series, checked, filled, in_place
from .formats.arrays import read_volumes
from .preprocess import ModelInput
from .scan import MAX_BYTES, Scan
from .volume_lists import PIXELS


@dataclass(frozen=True, eq=False)
class VolumeSet(Sequence[Scan]):
    """Volumes of one shape.

    Attributes:
        path: their file.
        voxels: (N, D, H, W), as stored; indexing gives one as a Scan, and raises ValueError where it cannot be used.
        spacing: (3,) float64, mm along D, H, W.
        labels: (N, ...), or None.
        split: of MedMNIST, "train", "val" or "test"; or None.
        options: how they are read.
    """

    path: Path
    voxels: np.ndarray
    spacing: np.ndarray
    labels: np.ndarray | None
    split: str | None
    options: ScanOptions

    def __len__(self) -> int:
        return len(self.voxels)

    def __getitem__(self, index: int) -> Scan:
        number = range(len(self))[operator.index(index)]  # no slices: they would be one scan of four dimensions
        with complaints(self.path):
            try:
                voxels = filled(self.voxels[number].copy(), self.options)
                return checked(in_place(voxels, self.spacing, self.options))
            except Refused as error:
                raise Refused(f"{error} (its volume {number})") from None


def load_volumes(
    path: str | Path, array: str | None = None, max_bytes: int = MAX_BYTES, *, fill_nan: float | None = None
) -> VolumeSet:
    """Reads all volumes of an array (N, D, H, W) in an .npz, with their labels where it is MedMNIST's.

    ``load_volumes("organmnist3d.npz", "train_images")`` also reads `train_labels` (N, 1). Voxels are of 1 mm, or as
    the array `spacing` (3,) says, mm along D, H, W.

    Args:
        path: the file.
        array: its name; by default the only one, or `volume`.
        max_bytes: refuse, before reading any voxel, volumes that need more memory: all as stored, and one in float32.
        fill_nan: takes the place of NaN voxels, which otherwise are refused.

    Raises ValueError where there are no such volumes, or they cannot be read.
    """
    return read_set(Path(path), ScanOptions(array=array, fill_nan=fill_nan), max_bytes)


def read_set(path: Path, options: ScanOptions, max_bytes: int = MAX_BYTES) -> VolumeSet:
    """`load_volumes` by options."""
    with complaints(path):
        if not path.is_file() or path.suffix.lower() != ".npz":
            raise Refused("must be an .npz file to hold an array of volumes")
        check_no_series(options)
        with path.open("rb") as file:  # what the system refuses, it says best itself
            file.read(1)
        return VolumeSet(path, *read_volumes(path, options, max_bytes), options)


def features_of(
    volumes: VolumeSet,
    prepared: Callable[[Scan], ModelInput],
    compute: Callable[[Tensor], dict[str, Tensor]],  # pixels (B, channels, D, height, width) to tensors (B, ...)
    done: Callable[[], None],
    max_bytes: int = MAX_BYTES,
) -> tuple[dict[str, Tensor], ModelInput]:
    """Features of all volumes, (N, ...) under their names with `labels` beside them, and the last volume's input.

    A few volumes at a time pass through the model, and `done` is called after each. ScanWarnings become one.

    Raises ValueError where all features would need more than max_bytes, and for what is wrong with any volume.
    """
    odd: list[str] = []
    tensors: dict[str, Tensor] = {}
    start, given = 0, None
    for inputs in _together(volumes, prepared, odd):
        given = inputs[-1]
        stop = start + len(inputs)
        try:
            some = compute(torch.cat([each.pixels for each in inputs]))
        except ValueError as error:
            raise ValueError(f"volumes {start} to {stop - 1}: {error}") from error
        if not tensors:
            size = sum(tensor[0].nbytes for tensor in some.values()) * len(volumes)
            if size > max_bytes:
                raise ValueError(
                    f"features of {len(volumes)} volumes must need at most {gib(max_bytes)}, got {gib(size)}; "
                    "pool (--pool) keeps one vector of each"
                )
            tensors = {name: tensor.new_empty(len(volumes), *tensor.shape[1:]) for name, tensor in some.items()}
        for name, tensor in some.items():
            tensors[name][start:stop] = tensor
        start = stop
        for _ in inputs:
            done()
    if odd:
        warn(f"{len(odd)} of {len(volumes)} volumes; {odd[0]}")
    if volumes.labels is not None:
        labels = volumes.labels
        tensors["labels"] = torch.from_numpy(labels.astype(labels.dtype.newbyteorder("=")))
    return tensors, given


def _together(volumes: VolumeSet, prepared: Callable[[Scan], ModelInput], odd: list[str]) -> Iterator[list[ModelInput]]:
    """The inputs of a few volumes at a time; what is odd in them is added to a list."""
    inputs: list[ModelInput] = []
    for i, scan in enumerate(volumes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                inputs.append(prepared(scan))
            except ValueError as error:
                raise ValueError(f"{error} (its volume {i})") from error
        for warning in caught:
            if issubclass(warning.category, ScanWarning):
                odd.append(f"volume {i}: {warning.message}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if (len(inputs) + 1) * math.prod(inputs[0].pixels.shape[2:]) > PIXELS or i == len(volumes) - 1:
            yield inputs
            inputs = []
