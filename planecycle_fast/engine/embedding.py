"""Slices become tokens: by one matrix product of rows of pixels where that is known to be the same and faster, else by
the host's own patch embedding.

By product: always on a GPU. `ops.patch_embedding` makes rows of the volume as it lies, and their product with the
convolution's weights is the stream's first tensor, globals and all (`engine.stream.enter`). Of a volume of one channel,
expanded, pixels are read once and multiplied by the sum of the weights, unless the volume needs a gradient. Where a
host adds positions, that is a pass in place; with gradients one more, out of place.

On a CPU both ways embed a few slices at a time for inference, where nobody can tell: for some sizes oneDNN's
convolution takes 0.4 GiB of its own, in bfloat16 from five slices of 256 x 256 on. By product on backend "cpu" where
`benchmarks/bench_patchify.py` has it faster at all sizes: in bfloat16, and of one channel; with float32 it is 2
to 5% slower. Milliseconds, convolution and product, both up to the stream's first tensor, C = 384, two cores of an AMD
EPYC with bfloat16 products, medians of 9 by turns (all in one product, 1.00 to 1.31 of the convolution's in float32,
was no better):

| volume, patch 16 | float32 | bfloat16 | one channel, float32 | bfloat16 |
| --- | --- | --- | --- | --- |
| 1 x 16 x 256^2 | 14.3, 15.0 | 13.2, 9.3 | 14.3, 5.0 | 13.2, 3.5 |
| 4 x 64 x 64^2 | 15.4, 15.9 | 10.4, 8.9 | 15.4, 6.6 | 10.4, 4.1 |
| 1 x 32 x 256^2 | 30.1, 30.9 | 29.7, 20.7 | 30.1, 11.2 | 29.7, 6.5 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hosts import Adapter
from ..hosts.known import why_called
from ..ops.choice import Choice
from ..ops.patch_embedding.patchify import patchify_on
from ..ops.patch_embedding.pixel_rows import row_length
from ..runtime.repeats import rounds

ROWS = 1024  # patches at a time


class Embedded(NamedTuple):
    """Slices as tokens, in canonical order."""

    patches: Tensor  # (B*D, L, C), any strides
    globals_: Tensor  # (B*D, g, C), or (1, g, C): the same in all slices
    stream: Tensor | None = None  # (B*D, g + L, C), nobody else's: patches are its rows after the first g

    def become(
        self,
        patches: Tensor,  # (B*D, L, C)
    ) -> Embedded:
        """The same with other patches, or these after they have been written to."""
        return Embedded(patches, self.globals_, self.stream if patches is self.patches else None)


def embed(
    adapter: Adapter,
    volume: Tensor,  # (B, in_channels, D, height, width), any strides
    choice: Choice,
) -> Embedded:
    """`Adapter.embed_parts` of all slices."""
    projection = adapter.patch_projection() if may_be_product(volume, choice) else None
    if projection is None:
        images = volume.transpose(1, 2).flatten(0, 1)  # (B*D, in_channels, height, width)
        return Embedded(*_by_host(adapter, images, choice))
    return by_product(projection, adapter.from_patches, adapter.num_globals, volume, choice)


def may_be_product(
    volume: Tensor,  # (B, in_channels, D, height, width)
    choice: Choice,
) -> bool:
    """Whether a product is faster than the host's convolution; see above."""
    if choice.patchify != "reference":
        return True
    if choice.plane_switch != "cpu" or choice.grad or not choice.writes:
        return False
    dtype = choice.autocast or volume.dtype
    return dtype == torch.bfloat16 or (dtype == torch.float32 and is_one_channel(volume))


def is_one_channel(volume: Tensor) -> bool:
    """Whether all channels of a volume, with no gradient to keep apart, are the same memory."""
    return volume.stride(1) == 0 and volume.shape[1] > 1 and not volume.requires_grad


def by_product(
    projection: nn.Conv2d,
    finish: Callable[[Tensor, int, int, bool], tuple[Tensor, Tensor]],  # `Adapter.from_patches`
    num_globals: int,  # g
    volume: Tensor,  # (B, in_channels, D, height, width), any strides
    choice: Choice,
) -> Embedded:
    """What a host makes of its convolution's output, with one matrix product for that."""
    weight, bias, (height, width) = projection.weight, projection.bias, volume.shape[3:]
    dtype = weight.dtype if choice.autocast is None or weight.dtype == torch.float64 else choice.autocast
    patch = int(weight.shape[2]), int(weight.shape[3])
    if is_one_channel(volume):
        volume = volume[:, :1]
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)).sum(1, keepdim=True)
    weight = weight.flatten(1).to(dtype)  # (C, channels*ph*pw)
    if zeros := row_length(weight.shape[1], dtype) - weight.shape[1]:
        weight = F.pad(weight, (0, zeros))  # (C, K)
    multiply = partial(_multiplied, weight, bias, patch, num_globals, dtype, choice.patchify)
    few = choice.patchify == "reference" and choice.writes and not choice.grad
    stream = _in_rounds(multiply, volume, num_globals, patch) if few else multiply(volume)
    patches = stream[:, num_globals:]
    # Projected rows of globals hold the bias, and are written over in any case.
    finished, globals_ = finish(patches, height, width, choice.may_overwrite(stream, new=True))
    return Embedded(patches, globals_, stream).become(finished)


def _multiplied(
    weight: Tensor,  # (C, K)
    bias: Tensor | None,  # (C,)
    patch: tuple[int, int],
    num_globals: int,
    dtype: torch.dtype,
    backend: str,
    volume: Tensor,  # (B, channels, D, height, width)
) -> Tensor:  # (B*D, g + L, C)
    rows = patchify_on(backend, volume, patch, num_globals, dtype)  # (B*D, g + L, K)
    product = F.linear(rows.flatten(0, 1), weight, bias)
    return torch.ops.aten._unsafe_view(product, [rows.shape[0], rows.shape[1], weight.shape[0]])  # FSDP warns of views


def _in_rounds(
    multiply: Callable[[Tensor], Tensor],  # (B, channels, D, height, width) to (B*D, g + L, C)
    volume: Tensor,  # (B, channels, D, height, width)
    num_globals: int,  # g
    patch: tuple[int, int],
) -> Tensor:  # (B*D, g + L, C)
    """A few slices at a time, of several volumes where these are small."""
    batch, _, depth, height, width = volume.shape
    at_once = max(1, ROWS // max(1, (height // patch[0]) * (width // patch[1])))
    if batch * depth <= at_once:
        return multiply(volume)
    slices, volumes = min(depth, at_once), max(1, at_once // depth)
    starts = range(-(-batch // volumes) * -(-depth // slices))
    stream: Any = None  # until the first slices are there
    for start in rounds(starts):
        b, d = start // -(-depth // slices) * volumes, start % -(-depth // slices) * slices
        some = multiply(volume[b : b + volumes, :, d : d + slices])
        if stream is None:
            stream = some.new_empty(batch * depth, *some.shape[1:])
        stream[b * depth + d :][: len(some)] = some
    return stream


def _by_host(
    adapter: Adapter,
    images: Tensor,  # (N, in_channels, height, width)
    choice: Choice,
) -> tuple[Tensor, Tensor]:  # patches (N, L, C), any strides; globals (N, g, C), or (1, g, C)
    """By the host's own modules."""
    if choice.grad or not choice.writes or choice.plane_switch != "cpu":  # else sizes may be symbols
        return adapter.embed_parts(images)
    length = (images.shape[2] // adapter.patch_size[0]) * (images.shape[3] // adapter.patch_size[1])
    at_once = max(1, ROWS // length)
    if len(images) <= at_once or not _nobody_can_tell(adapter):
        return adapter.embed_parts(images)
    patches: Any = None  # they and the globals: until the first slices are there
    globals_, alike = patches, False
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
