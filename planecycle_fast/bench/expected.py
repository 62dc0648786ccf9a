"""What the contenders of a group should return, and whether they do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cells import REFERENCE, Cell, parse_volume
from .costs import is_out_of_memory, release
from .networks import Network, network
from .steps import inference, step_of
from .timing import Agreement, compare

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}  # of the largest value, against the reference in float32
SMALL = "1x4x64"  # a volume to compare at where the reference does not fit


class Expected:
    """What contenders of a group should return: the reference's in float32, mode by mode.

    Where the reference does not fit into memory, contenders are compared at a small volume; where its float32 weights
    do not fit either, with the reference in the contenders' own dtype. With `in_float32` False it is in theirs at once.
    """

    def __init__(self, host: nn.Module, dtype: str, step: str, volume: Tensor, in_float32: bool = True) -> None:
        self.host, self.dtype, self.step, self.volume, self.in_float32 = host, dtype, step, volume, in_float32
        self.exact = host if dtype == "fp32" else None  # a copy in float32, made when it is needed
        self.known: dict[str, tuple[Any, Tensor, str]] = {}  # by mode: outputs, the volume, its name

    def check(self, cell: Cell, made: Network, step: Callable[[Tensor], Any]) -> tuple[Agreement, str]:
        """Whether a contender computes what it should, and at which volume that was seen."""
        if cell.mode not in self.known:
            self.known[cell.mode] = self._reference(cell)
        outputs, volume, name = self.known[cell.mode]
        if volume is not self.volume:
            made = network(cell, self.host, volume)
            step = step_of(cell.step, made)
        found = self._outputs(made, step, volume)
        return compare({cell.code: found}, outputs, TOLERANCE[self.dtype])[cell.code], name

    def _reference(self, cell: Cell) -> tuple[Any, Tensor, str]:
        small = torch.randn(parse_volume(SMALL).shape, device=self.volume.device).to(self.volume.dtype)
        reference, own = cell._replace(code=REFERENCE), f", with the reference in {self.dtype}"
        tries = [(self.volume, cell.volume, True), (small, SMALL, True), (small, SMALL + own, False)]
        if not self.in_float32:
            tries = [(self.volume, cell.volume + own, False), tries[-1]]
        for volume, name, in_float32 in tries:
            try:
                if in_float32 and self.exact is None:
                    self.exact = copy.deepcopy(self.host).float()
                host, data = (self.exact, volume.float()) if in_float32 else (self.host, volume)
                made = network(reference, host, data)
                return self._outputs(made, step_of(self.step, made), data), volume, name
            except Exception as error:
                if name == tries[-1][1] or not is_out_of_memory(error):
                    raise
                if self.exact is not self.host:
                    self.exact = None
            release(volume.device)
        raise AssertionError

    def _outputs(self, made: Network, step: Callable[[Tensor], Any], volume: Tensor) -> tuple[Any, ...]:
        """Features, and the gradient of a step that trains."""
        features = inference(made.run, volume)
        return features if self.step == "inference" else (features, step(volume))
