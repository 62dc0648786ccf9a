"""The contenders of cells as tests of pytest-benchmark, one each, which it stores, groups and compares.

Contenders of a cell are timed together, in turns, when the first of its tests runs (`op_measure.measure`). Every test
then plays the times of its own to pytest-benchmark by a clock that shows them: on a GPU they are no clock's anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from planecycle_fast.inputs import usable_device

from .op_cells import DTYPES, SHAPES, OpCell
from .op_measure import Result, measure


class Clock:
    """Stands still, but for what it is told."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def play(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


CLOCK = Clock()
MEASURED: dict[str, dict[str, Result]] = {}  # of this process, by group


def benchmark_of(cells: Callable[..., Iterator[OpCell]]) -> Callable[..., None]:
    """A test for pytest-benchmark of every contender of `cells(shapes, device, dtype)`, on the GPU if there is one."""
    device = usable_device("auto").type
    found = {cell.group: cell for cell in cells(SHAPES[device], device, DTYPES[device])}

    @pytest.mark.benchmark(timer=CLOCK.read)
    @pytest.mark.parametrize("group, contender", [(cell.group, name) for cell in found.values() for name in cell.names])
    def test(benchmark, group, contender):
        benchmark.group = group
        if group not in MEASURED:
            MEASURED[group] = measure(found[group], device)
        result = MEASURED[group][contender]
        play(benchmark, result.seconds, result.info, result.missing, result.refused)

    return test


def play(benchmark, seconds: Sequence[float], info: dict[str, Any], missing: str | None, refused: str | None) -> None:
    """Hands what was measured to pytest-benchmark; skips what is missing, fails what was refused."""
    if missing is not None or refused is not None:
        benchmark.skipped = True  # else it warns that nothing was timed
    if missing is not None:
        pytest.skip(missing)
    if refused is not None:
        pytest.fail(f"not timed: {refused}", pytrace=False)
    benchmark.extra_info |= info
    benchmark.pedantic(CLOCK.play, (iter(seconds),), rounds=len(seconds))
