"""What a lifted model returns, and `pyramid`: maps of it at several resolutions, for decoders."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

SCALES = (4, 2, 1, 0.5)  # strides 4, 8, 16, 32 of a model with patches of 16 pixels


class VolumeFeatures(NamedTuple):
    """Features of a batch of volumes, in canonical order whatever plane the layer looked along.

    S, the number of sets of globals per volume, is D by default, 1 for flatten3d, and the slices P of
    the layer's plane under ``globals_at="plane"``.
    """

    patches: Tensor  # (B, D, H, W, C)
    cls: Tensor | None  # (B, S, C), None for a model without a class token
    registers: Tensor | None  # (B, S, r, C), None for a model without register tokens

    @property
    def maps(self) -> Tensor:  # (B, C, D, H, W)
        """The patches as convolutions take them, a view."""
        return self.patches.movedim(-1, 1)

    def pooled(self) -> Tensor:
        """One vector per volume, (B, C): the mean class token, or the mean patch where there is none."""
        if self.cls is not None:
            return self.cls.mean(1)
        return self.patches.mean((1, 2, 3))


def named_in_programs(kind: type[tuple[Any, ...]]) -> None:
    """Makes a NamedTuple one that torch.export.save writes; torch.export.load says what to import if it is missing."""
    _register_namedtuple(kind, serialized_type_name=f"planecycle_fast.{kind.__name__} (import planecycle_fast)")


named_in_programs(VolumeFeatures)


def traceable(features: VolumeFeatures) -> VolumeFeatures:
    """Within a trace: the features without what is None, which it cannot return. Attributes are what they were."""
    if not torch.jit.is_tracing():
        return features
    present = {name: t for name, t in features._asdict().items() if t is not None}
    absent = dict.fromkeys([name for name in features._fields if name not in present])
    kind = namedtuple("VolumeFeatures", [*present])  # type: ignore[misc]  # known when it runs
    methods = {"pooled": VolumeFeatures.pooled, "maps": VolumeFeatures.maps}
    return type("VolumeFeatures", (kind,), absent | methods)(**present)


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
    levels, depths = _numbers(scales, "scales"), _numbers(depth_scales, "depth_scales")
    depths = depths * len(levels) if len(depths) == 1 else depths
    layers: list[Any] = [features] if hasattr(features, "maps") else list(features)
    for i, layer in enumerate(layers):
        if not hasattr(layer, "maps"):
            raise TypeError(f"features must be VolumeFeatures or a list of them, got {type(layer).__name__} at {i}")
    layers = layers * len(levels) if len(layers) == 1 else layers
    for name, given in (("features", layers), ("depth_scales", depths)):
        if len(given) != len(levels):
            raise ValueError(f"{name} must be one, or one for each of the {len(levels)} scales, got {len(given)}")
    return [_scaled(layer.maps, (depth, scale, scale)) for layer, scale, depth in zip(layers, levels, depths)]


def _scaled(
    maps: Tensor,  # (B, C, D, H, W)
    scales: Sequence[Fraction],  # of D, H, W
) -> Tensor:  # (B, C, D', H', W')
    # n * a // b keeps sizes that are symbols as they are.
    sizes: Any = [n * scale.numerator // scale.denominator for n, scale in zip(maps.shape[2:], scales)]
    for axis, n, scale in zip("DHW", maps.shape[2:], scales):
        if n * scale.numerator % scale.denominator:
            raise ValueError(f"scale {float(scale):g} must give whole numbers of cells, got {n} patches along {axis}")
    grown = [size if scale > 1 else n for n, size, scale in zip(maps.shape[2:], sizes, scales)]
    if any([scale > 1 for scale in scales]):
        maps = F.interpolate(maps, grown, mode="trilinear", align_corners=False)
    return F.adaptive_avg_pool3d(maps, sizes) if any([scale < 1 for scale in scales]) else maps


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
