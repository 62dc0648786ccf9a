"""`pyramid`: maps at several resolutions for decoders, of features that a transformer has at one. It learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .features import VolumeFeatures

SCALES = (4, 2, 1, 0.5)  # strides 4, 8, 16, 32 of a model with patches of 16 pixels


def pyramid(
    features: VolumeFeatures | Sequence[VolumeFeatures],
    scales: Sequence[float] = SCALES,
    depth_scales: float | Sequence[float] = 1,
) -> list[Tensor]:
    """Maps (B, C, D*depth_scale, H*scale, W*scale), one per scale, in the order of `scales`.

    What grows is interpolated linearly along each axis, what shrinks is the mean of the area that a cell covers (no
    aliasing); a scale of 1 leaves an axis as it is. So a decoder gets what it expects of a CNN, or of UNETR's and
    ViTDet's ViTs: ``pyramid(lifted.intermediate(volume, 4))`` are four levels from four layers, the early ones fine;
    ``pyramid(lifted(volume))`` are those of ViTDet, all from the last layer. Differentiable.

    Args:
        features: of as many layers as there are scales, in order; or of one, which gives all levels.
        scales: cells per patch along H and W: a stride in pixels is the patch divided by it.
        depth_scales: cells per slice along D, one for all levels or one each. Patches are as thick as a slice, so that
            1 gives levels that differ within slices only.

    Raises:
        TypeError: features are no VolumeFeatures, or scales no numbers.
        ValueError: another number of layers than scales, or a scale that does not give whole numbers of cells.
    """
    across = _numbers(scales, "scales")
    depths = _numbers(depth_scales, "depth_scales")
    depths = depths * len(across) if len(depths) == 1 else depths
    layers: list[Any] = [features] if hasattr(features, "maps") else list(features)  # within a trace of its own class
    for i, layer in enumerate(layers):
        if not hasattr(layer, "maps"):
            raise TypeError(f"features must be VolumeFeatures or a list of them, got {type(layer).__name__} at {i}")
    layers = layers * len(across) if len(layers) == 1 else layers
    for name, given in (("features", layers), ("depth_scales", depths)):
        if len(given) != len(across):
            raise ValueError(f"{name} must be one, or one for each of the {len(across)} scales, got {len(given)}")
    return [_scaled(layer.maps, (depth, scale, scale)) for layer, scale, depth in zip(layers, across, depths)]


def _scaled(
    maps: Tensor,  # (B, C, D, H, W)
    scales: Sequence[Fraction],  # of D, H, W
) -> Tensor:  # (B, C, D', H', W')
    # n * a // b keeps sizes that are symbols as they are.
    sizes = [n * scale.numerator // scale.denominator for n, scale in zip(maps.shape[2:], scales)]
    for axis, n, scale in zip("DHW", maps.shape[2:], scales):
        if n * scale.numerator % scale.denominator:
            raise ValueError(f"scale {float(scale):g} must give whole numbers of cells, got {n} patches along {axis}")
    grown = [size if scale > 1 else n for n, size, scale in zip(maps.shape[2:], sizes, scales)]
    if any([scale > 1 for scale in scales]):
        maps = F.interpolate(maps, grown, mode="trilinear", align_corners=False)
    depth, height, width = sizes
    return F.adaptive_avg_pool3d(maps, (depth, height, width)) if any([scale < 1 for scale in scales]) else maps


def _numbers(given: float | Sequence[float], name: str) -> list[Fraction]:
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for number in listed:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{name} must hold numbers, got {number!r}")
        if not 0 < number < float("inf"):
            raise ValueError(f"{name} must hold finite numbers above 0, got {number!r}")
    if not listed:
        raise ValueError(f"{name} must hold at least one number, got none")
    return [Fraction(number).limit_denominator(1024) for number in listed]
