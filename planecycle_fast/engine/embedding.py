"""Slices become tokens: a few at a time for inference on a CPU, where nobody can tell.

For some sizes oneDNN's convolution takes 0.4 GiB of its own, in bfloat16 from five slices of 256 x 256 on.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..hosts import Adapter
from ..hosts.known import why_called
from ..ops.choice import Choice
from ..runtime.repeats import rounds

ROWS = 1024  # patches at a time


def embed(
    adapter: Adapter,
    images: Tensor,  # (N, in_channels, height, width)
    choice: Choice,
) -> tuple[Tensor, Tensor]:  # patches (N, L, C), any strides; globals (N, g, C), or (1, g, C)
    """`Adapter.embed_parts` of all slices."""
    if choice.grad or not choice.writes or choice.plane_switch != "cpu":  # else sizes may be symbols
        return adapter.embed_parts(images)
    length = (images.shape[2] // adapter.patch_size[0]) * (images.shape[3] // adapter.patch_size[1])
    at_once = max(1, ROWS // length)
    if len(images) <= at_once or not _nobody_can_tell(adapter):
        return adapter.embed_parts(images)
    patches = globals_ = alike = None
    for start in rounds(range(0, len(images), at_once)):
        here = slice(start, start + at_once)
        some, g = adapter.embed_parts(images[here])
        if patches is None:
            patches = some.new_empty(len(images), *some.shape[1:])
            alike = at_once > 1 and len(g) == 1  # of a single slice nobody can tell
            globals_ = g if alike else g.new_empty(len(images), *g.shape[1:])
        patches[here] = some
        if not alike:
            globals_[here] = g
    return patches, globals_


def _nobody_can_tell(adapter: Adapter) -> bool:
    if adapter.model.training:  # what it draws depends on how many slices there are
        return False
    outside = _outside(adapter.model, {id(block) for block in adapter.blocks})
    return all([why_called(module) is None for module in outside])


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    """The modules of a model but for its blocks."""
    for child in module.children():
        if id(child) not in blocks:
            yield child
            yield from _outside(child, blocks)
