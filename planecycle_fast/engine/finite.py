"""Features that are not finite: found before they are written, and where they began."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .stream import Stream


def check_features(
    model: Any,  # a LiftedModel
    pixels: Tensor,  # (B, channels, D, height, width), finite
    features: Mapping[str, Tensor],  # what the model made of them, any shapes
    again: Callable[[], object] | None = None,
) -> None:
    """Raises ValueError, which says from which layer on they are not, unless all features are finite.

    To see where they begin the model is run once more: by `again`, or on the pixels.
    """
    for name, tensor in features.items():
        if not (finite := torch.isfinite(tensor)).all():
            bad = tensor.numel() - int(finite.sum())
            raise ValueError(
                f"features must be finite, got {bad} of {tensor.numel()} NaN or infinite in {name}: "
                f"{_beginning(model, again or (lambda: model(pixels)))}, in {str(pixels.dtype).removeprefix('torch.')}"
            )


def _beginning(model: Any, again: Callable[[], object]) -> str:
    """Where the first ones are, seen in another pass through the model."""
    found: list[str] = []

    def look(place: str) -> Callable[[Stream], None]:
        def see(stream: Stream) -> None:
            if not found and not torch.isfinite(stream.tokens()).all():
                found.append(place)

        return see

    with torch.inference_mode(), ExitStack() as hooks:
        for i, block in enumerate(model.blocks):
            if i == 0:
                see = look("they begin before layer 0, where patches are embedded")
                before = block.register_forward_pre_hook(lambda module, args, see=see: see(args[0]))
                hooks.callback(before.remove)
            see = look(f"they begin in layer {i} of 0 to {len(model.blocks) - 1}")
            after = block.register_forward_hook(lambda module, args, out, see=see: see(out))
            hooks.callback(after.remove)
        again()
    return found[0] if found else "they begin behind the last layer, in the norm or the mean"
