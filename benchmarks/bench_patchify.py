"""The patch embedding, from pixels to the stream's first tensor, globals included: rows by patchify and one product,
against the model's own convolution and what else torch has.

make bench
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.ops import patchify

from .op_benchmark import benchmark_of
from .op_cells import GLOBALS, OURS, REFERENCE, STEPS, TRAINING, OpCell, Shape, backend_of, fixed

PATCH = 16
LAST = "convolution, channels last"
OF_PROTOTYPE = [
    Shape("ViT-S, 32 x 512^2", (32, 32, 32), 384, 6, 8),
    Shape("ViT-B, 32 x 512^2", (32, 32, 32), 768, 12, 8),
]


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape, step in product(shapes, STEPS):
        yield cell(shape, step, device, dtype)


def cell(shape: Shape, step: str, device: str, dtype: torch.dtype) -> OpCell:
    depth, *pixels = shape.sizes[0], *[PATCH * n for n in shape.sizes[1:]]
    tensors = {
        "volume": (shape.batch, 3, depth, *pixels), "weight": (shape.channels, 3, PATCH, PATCH),
        "bias": (shape.channels,), "globals_": (1, GLOBALS, shape.channels),
    }  # fmt: skip

    def ours():
        backend = backend_of(device, "patchify") if device == "cuda" else "reference"  # csrc has none

        def embed(volume: Tensor, weight: Tensor, bias: Tensor, globals_: Tensor) -> Tensor:
            rows = patchify(volume, (PATCH, PATCH), GLOBALS, backend=backend)  # (B*D, g + L, K)
            stream = torch.ops.aten._unsafe_view(
                F.linear(rows.flatten(0, 1), weight.flatten(1), bias), [*rows.shape[:2], len(bias)]
            )
            stream[:, :GLOBALS] = globals_
            return stream

        return embed

    outputs = math.prod(shape.sequences) * shape.channels
    inputs = sum([math.prod(tensors[name]) for name in ("volume", "weight", "globals_")])
    return OpCell(
        "patchify", shape.label, step, dtype, tensors,
        {OURS: ours, REFERENCE: fixed(convolved), LAST: fixed(channels_last)},
        moved=(inputs + outputs) * (2 if step == TRAINING else 1),  # and their gradients
        spread={"weight": 0.03},
    )  # fmt: skip


def convolved(
    volume: Tensor,  # (B, 3, D, height, width)
    weight: Tensor,  # (C, 3, PATCH, PATCH)
    bias: Tensor,  # (C,)
    globals_: Tensor,  # (1, g, C)
) -> Tensor:  # (B*D, g + L, C)
    """As a host embeds slices."""
    return _after(F.conv2d(volume.transpose(1, 2).flatten(0, 1), weight, bias, PATCH), globals_)


def channels_last(volume: Tensor, weight: Tensor, bias: Tensor, globals_: Tensor) -> Tensor:
    """The same with pixels and weights in the order that tensor cores want."""
    images = volume.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return _after(F.conv2d(images, weight.contiguous(memory_format=torch.channels_last), bias, PATCH), globals_)


def _after(
    maps: Tensor,  # (N, C, h, w)
    globals_: Tensor,  # (1, g, C)
) -> Tensor:  # (N, g + h*w, C)
    return torch.cat([globals_.expand(len(maps), -1, -1), maps.flatten(2).mT], 1)


def all_cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    """On a GPU also of the volumes for which a prototype has been timed."""
    yield from cells([*shapes, *(OF_PROTOTYPE if device == "cuda" else [])], device, dtype)


test_patchify = benchmark_of(all_cells)
