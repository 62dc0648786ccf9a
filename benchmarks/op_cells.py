"""One operation on one shape, and everything that can compute it: what each `bench_<op>.py` declares.

`op_measure.py` compares and times the contenders, `op_benchmark.py` hands their times to pytest-benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from planecycle_fast.bench.cells import GLOBALS
from planecycle_fast.runtime.backends import pick

OURS, REFERENCE, COMPILED = "planecycle_fast", "reference", "reference, compiled"
STEPS = INFERENCE, TRAINING = "inference", "training"  # without gradients; forward, and backward for all inputs
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
LARGEST = 2**28  # elements of a tensor within an MLP


class Shape(NamedTuple):
    """Tokens as a model has them."""

    label: str
    sizes: tuple[int, int, int]  # (D, H, W) in tokens
    channels: int
    heads: int
    batch: int  # volumes

    @property
    def sequences(self) -> tuple[int, int]:
        """(N, rows) along HW, globals among the rows."""
        return self.batch * self.sizes[0], GLOBALS + self.sizes[1] * self.sizes[2]

    @property
    def hidden_rows(self) -> tuple[int, int]:
        """(rows, 4*C) of what is within an MLP; fewer rows where it would take gigabytes."""
        hidden = 4 * self.channels
        return min(math.prod(self.sequences), LARGEST // hidden), hidden


SHAPES = {
    "cuda": [
        Shape("ViT-S, 8 volumes of 64^3", (64, 4, 4), 384, 6, 8),
        Shape("ViT-S, 32 x 448^2", (32, 28, 28), 384, 6, 8),
        Shape("ViT-B, 32 x 448^2", (32, 28, 28), 768, 12, 8),
        Shape("ViT-L, 32 x 512^2", (32, 32, 32), 1024, 16, 8),
        Shape("ViT-H, 32 x 512^2", (32, 32, 32), 1280, 20, 8),
        Shape("ViT-7B, 32 x 512^2", (32, 32, 32), 4096, 32, 4),
    ],
    "cpu": [Shape("ViT-S, 16 x 256^2", (16, 16, 16), 384, 6, 1)],
}
TINY = Shape("tiny", (3, 4, 2), 32, 2, 2)  # of tests


Maker = Callable[[], Callable[..., Any]]  # makes a contender's function, or raises NotHereError


@dataclass(frozen=True)
class OpCell:
    """One operation on one shape, in one step."""

    op: str
    label: str
    step: str  # INFERENCE or TRAINING
    dtype: torch.dtype
    tensors: dict[str, tuple[int, ...]]  # random inputs, in the order in which contenders take them
    contenders: dict[str, Maker]  # `COMPILED`, torch.compile of the reference, is added to them
    moved: float = 0  # elements that no implementation avoids: each input read once, each output written once
    flops: float = 0  # of what arithmetic limits, not memory
    spread: dict[str, float] = field(default_factory=dict)  # standard deviations that are not 1

    @property
    def group(self) -> str:
        """Its name, the same in every run."""
        return f"{self.op}: {self.label}, {str(self.dtype).removeprefix('torch.')}, {self.step}"

    @property
    def names(self) -> list[str]:
        """All contenders, ours first."""
        return [*self.contenders, COMPILED]

    @property
    def bytes(self) -> int:
        """What no implementation avoids moving; 0 where arithmetic is what counts."""
        return int(self.moved * self.dtype.itemsize)

    @property
    def input_bytes(self) -> int:
        """Of one set of inputs."""
        return sum([math.prod(shape) for shape in self.tensors.values()]) * self.dtype.itemsize


def backend_of(device: str, op: str) -> str:
    """Our backend on a device by name, so that it never falls back. Raises ValueError where it is not usable."""
    return pick("triton" if device == "cuda" else "cpu", torch.device(device), op)


def fixed(function: Callable[..., Any]) -> Maker:
    """The maker of a function that is always there."""
    return lambda: function
