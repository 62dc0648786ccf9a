"""linear_gelu: fc1 and its exact GELU in inference, against the two one after the other, and cuBLASLt's tanh epilogue.

The last is another function, off by up to 4.8e-4. Inductor may fuse GELU into its own products (`reference, compiled`).

make bench
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.ops import gelu_ref, linear_gelu, linear_gelu_ref
from planecycle_fast.ops.activations.linear_gelu import linear_gelu_tanh

from .op_benchmark import benchmark_of
from .op_cells import INFERENCE, LARGEST, OURS, REFERENCE, OpCell, Shape, backend_of, fixed
from .op_peers import SEPARATE, TANH_EPILOGUE


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape in shapes:
        yield cell(shape, device, dtype)


def cell(shape: Shape, device: str, dtype: torch.dtype) -> OpCell:
    channels, hidden = shape.channels, 4 * shape.channels
    rows = min(math.prod(shape.sequences), 2 * LARGEST // hidden)

    def ours():
        return partial(linear_gelu, backend=backend_of(device, "linear_gelu"))

    def tanh():
        if device != "cuda":
            raise NotHereError("cuBLASLt needs a CUDA device")
        return linear_gelu_tanh

    return OpCell(
        "linear_gelu", shape.label, INFERENCE, dtype,
        {"x": (rows, channels), "weight": (hidden, channels), "bias": (hidden,)},
        {OURS: ours, REFERENCE: fixed(linear_gelu_ref), SEPARATE: fixed(_in_place), TANH_EPILOGUE: tanh},
        flops=2 * rows * channels * hidden, spread={"weight": channels**-0.5},
    )  # fmt: skip


def _in_place(
    x: Tensor,  # (rows, C)
    weight: Tensor,  # (hidden, C)
    bias: Tensor,  # (hidden,)
) -> Tensor:  # (rows, hidden)
    """As blocks run it otherwise."""
    return gelu_ref(F.linear(x, weight, bias), inplace=True)


test_linear_gelu = benchmark_of(cells)
