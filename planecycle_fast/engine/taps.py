"""`LiftedModel.tap`: a place where hooks meet the features of a layer as maps, within the pass and its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.planes import HW, permutation
from ..hosts.known import HOOKS, why_called
from .stream import Layer, Stream


class Tap(nn.Module):
    """What a layer's patches pass through as maps (B, C, D, H, W), while anybody watches this module.

    Its output is its input: a forward hook sees it, and may return other maps of the same shape.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer  # its index, from 0

    def forward(
        self,
        maps: Tensor,  # (B, C, D, H, W), canonical order
    ) -> Tensor:  # the same
        return maps.view_as(maps)  # a tensor of its own: backward hooks and in-place changes want one

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


def live(taps: dict[int, Tap]) -> dict[int, Tap]:
    """Those that somebody watches: the others cost nothing."""
    return {i: tap for i, tap in taps.items() if why_called(tap) is not None}


def hooks_on(taps: dict[int, Tap]) -> list[Any]:
    """Which layers are watched, and by whom."""
    return [(i, [[*tap.__dict__[kind].values()] for kind in HOOKS]) for i, tap in live(taps).items()]


def tapped(tap: Tap, run: Callable[[Stream, Layer], Stream], stream: Stream, layer: Layer) -> Stream:
    """A block, whose patches pass through a tap; globals pass beside it.

    Raises:
        TypeError: a hook has returned no tensor.
        ValueError: one of another shape.
    """
    tokens, g, plane = Stream(*run(stream, layer)).tokens(), layer.num_globals, layer.new  # (B*P, g + L, C)
    cells = tokens[:, g:].reshape(-1, *plane.ordered(layer.sizes), tokens.shape[-1])
    maps = cells.permute(permutation(plane, HW)).movedim(-1, 1)  # (B, C, D, H, W)
    given = tap(maps)
    if not isinstance(given, Tensor):
        raise TypeError(f"a hook on the tap of layer {tap.layer} must return a tensor, got {type(given).__name__}")
    if given.shape != maps.shape:
        raise ValueError(
            f"a hook on the tap of layer {tap.layer} must return maps of the same shape, {tuple(maps.shape)}, "
            f"got {tuple(given.shape)}"
        )
    rows = given.movedim(1, -1).permute(permutation(HW, plane)).reshape(tokens.shape[0], -1, tokens.shape[-1])
    return Stream(torch.cat([tokens[:, :g], rows], dim=1))
