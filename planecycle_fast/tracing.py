"""What torch.jit.trace, and torch.onnx's exporter that is built on it, need of what they record.

A trace is one run: sizes are numbers in it, "auto" is the reference (`backends.why_not`), nothing is written in place,
and what is returned holds tensors only.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import VolumeFeatures


def shape_of(
    volume: Tensor,  # (B, channels, D, height, width)
) -> Sequence[int]:
    """Its shape, in numbers. Within a trace sizes are tensors, and whatever is made of them becomes part of it."""
    return [int(n) for n in volume.shape] if torch.jit.is_tracing() else volume.shape


def fix_shape(
    volume: Tensor,  # (B, channels, D, height, width)
) -> Tensor:  # the same
    """Within a trace: the volume such that another shape given to the trace raises RuntimeError."""
    if not torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # ONNX declares the shapes of inputs
        return volume
    for axis, size in enumerate(shape_of(volume)):
        volume = volume.unflatten(axis, (size,))  # nothing but a check, which what comes after depends on
    return volume


def traceable(features: VolumeFeatures) -> VolumeFeatures:
    """Within a trace: the features without what is None, which it cannot return. Attributes are what they were."""
    if not torch.jit.is_tracing():
        return features
    present = {name: t for name, t in features._asdict().items() if t is not None}
    absent = dict.fromkeys([name for name in features._fields if name not in present])
    kind = namedtuple("VolumeFeatures", present)
    methods = {"pooled": VolumeFeatures.pooled, "maps": VolumeFeatures.maps}
    return type("VolumeFeatures", (kind,), absent | methods)(**present)
