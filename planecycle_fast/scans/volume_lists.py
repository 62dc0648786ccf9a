"""Volumes of different sizes: together where they are alike, results in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..features import VolumeFeatures
from ..inputs import check_volume, plain, wanted_layers
from ..lifted import LiftedModel, lifted_in
from .preprocess import ModelInput, prepare
from .scan import Scan

PIXELS = 2**21  # that pass through the model together, if a volume has no more: a few small ones


def map_volumes(
    lifted: nn.Module,
    volumes: Iterable[Tensor | ModelInput | Scan],
    *,
    batch: int | None = None,
    layers: int | Sequence[int] | None = None,
    done: Callable[[int], Any] | None = None,
) -> list[VolumeFeatures] | list[list[VolumeFeatures]]:
    """Features of volumes of any sizes, in their order: those of one size, dtype and device pass through together.

        features = pcf.map_volumes(lifted, [a, b, c])                                # tensors (3, D, height, width)
        features = pcf.map_volumes(lifted, pcf.volume_sets.load_volumes("organmnist3d.npz", "train_images"))
        features = pcf.map_volumes(lifted, (pcf.prepare(pcf.load_scan(p), lifted, "-160,240") for p in paths))

    Equal to the volumes one by one, to the bit with ``batch=1``; together, up to the roundings of products of another
    number of rows. Gradients flow where torch records them.

    Args:
        lifted: of `lift`, in eval mode or not; also within DistributedDataParallel or torch.compile.
        volumes: each a tensor (C, D, height, width), or (B, C, D, height, width), which stays together; what `prepare`
            returned; or a Scan, which is prepared as `prepare` does by itself. A list, a generator, a `VolumeSet`: no
            more of them are held than wait for others of their size.
        batch: volumes that pass together at most; None: as many as have 2 million pixels together, at least one.
        layers: as `n` of `LiftedModel.intermediate`; None: the last layer alone.
        done: is called after each volume, with its index.

    Returns for each volume its own VolumeFeatures, with B of 1 or its own; a list of them, one per layer, where layers
    are asked for.

    Raises:
        TypeError: lifted is no lifted model, or one of volumes is something else; it is named by its index.
        ValueError: a batch below 1, layers that the model lacks, or a volume that the model refuses, by its index.
    """
    inside = lifted_in(lifted)
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise ValueError(f"batch must be a number of volumes, 1 or more, got {batch!r}")
    if layers is not None:
        wanted_layers(layers, len(inside.blocks), "layers")
    if isinstance(volumes, Tensor) or not isinstance(volumes, Iterable):
        raise TypeError(f"volumes must be a list or another iterable of volumes, got {type(volumes).__name__}")
    waiting: dict[tuple, list[tuple[int, Tensor]]] = {}
    results: dict[int, Any] = {}

    def run(group: list[tuple[int, Tensor]]) -> None:
        indices = [i for i, _ in group]
        pixels = group[0][1] if len(group) == 1 else torch.cat([volume for _, volume in group])
        try:
            features = [lifted(pixels)] if layers is None else inside.intermediate(pixels, layers)
        except (ValueError, TypeError) as error:
            raise type(error)(f"volumes {', '.join(map(str, indices))}: {error}") from error
        split = [_split(each, [len(volume) for _, volume in group]) for each in features]  # by layer, then volume
        for place, i in enumerate(indices):
            results[i] = split[0][place] if layers is None else [each[place] for each in split]
            if done is not None:
                done(i)

    for i, given in enumerate(volumes):
        volume = _volume(given, i, inside)
        kind = (volume.shape[1:], volume.dtype, volume.device)
        most = batch or max(1, PIXELS // math.prod(volume.shape[2:]))
        if kind in waiting and sum([len(each) for _, each in waiting[kind]]) + len(volume) > most:
            run(waiting.pop(kind))
        group = waiting.setdefault(kind, [])
        group.append((i, volume))
        if sum([len(each) for _, each in group]) >= most:
            run(waiting.pop(kind))
    for group in waiting.values():
        run(group)
    return [results[i] for i in range(len(results))]


def _volume(given: Tensor | ModelInput | Scan, i: int, lifted: LiftedModel) -> Tensor:  # (B, C, D, height, width)
    """What the model takes of one volume. Raises TypeError and ValueError, which name it."""
    name = f"volumes[{i}]"
    if isinstance(given, Scan):
        try:
            given = prepare(given, lifted)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    given = plain(given.pixels if isinstance(given, ModelInput) else given)
    if isinstance(given, Tensor) and given.ndim == 4:
        given = given[None]
    elif isinstance(given, Tensor) and given.ndim != 5:
        raise ValueError(
            f"{name} must have shape (C, D, height, width) or (B, C, D, height, width), got {tuple(given.shape)}"
        )
    check_volume(given, lifted.adapter.in_channels, lifted, name)
    try:
        lifted.adapter.check_image_size(*given.shape[3:])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return given


def _split(features: VolumeFeatures, counts: list[int]) -> list[VolumeFeatures]:
    """Features of several volumes that have passed together, apart."""
    if len(counts) == 1:
        return [features]
    parts = [[None] * len(counts) if tensor is None else tensor.split(counts) for tensor in features]
    return [VolumeFeatures(*each) for each in zip(*parts)]
