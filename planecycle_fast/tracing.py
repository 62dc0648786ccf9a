"""What torch.export and torch.jit.trace, and torch.onnx's exporters that are built on them, need of what they record.

"auto" is the reference (`backends.why_not`), and nothing is written in place (`ops.registry.may_write`). A trace is one
run: sizes are numbers in it, and what is returned holds tensors only.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import VolumeFeatures


def recorder() -> str | None:
    """What records torch's own operations now, to be run without us, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    # Not is_exporting(), which up to torch 2.11 is true in all that torch.compile takes.
    return "torch.export" if torch.compiler._is_exporting_flag else None


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
    return type("VolumeFeatures", (kind,), absent | {"pooled": VolumeFeatures.pooled})(**present)
