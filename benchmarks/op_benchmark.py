"""The contenders of cells as tests of pytest-benchmark, one each, which it stores, groups and compares.

Contenders of a cell are timed together, in turns, when the first of its tests runs (`op_measure.measure`). Every test
then plays the times of its own to pytest-benchmark by a clock that shows them: on a GPU they are no clock's anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .op_cells import DTYPES, SHAPES, Cell, device_type
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


def benchmark_of(cells: Callable[..., Iterator[Cell]]) -> Callable[..., None]:
    """A test for pytest-benchmark of every contender of `cells(shapes, device, dtype)`, on the GPU if there is one."""
    device = device_type()
    found = {cell.group: cell for cell in cells(SHAPES[device], device, DTYPES[device])}

    @pytest.mark.benchmark(timer=CLOCK.read)
    @pytest.mark.parametrize("group, contender", [(cell.group, name) for cell in found.values() for name in cell.names])
    def test(benchmark, group, contender):
        benchmark.group = group
        if group not in MEASURED:
            MEASURED[group] = measure(found[group], device)
        play(benchmark, MEASURED[group][contender])

    return test


def play(benchmark, result: Result) -> None:
    """Hands what was measured to pytest-benchmark; skips what is missing, fails what was refused."""
    if result.missing is not None or result.refused is not None:
        benchmark.skipped = True  # else it warns that nothing was timed
    if result.missing is not None:
        pytest.skip(result.missing)
    if result.refused is not None:
        pytest.fail(f"not timed: {result.refused}", pytrace=False)
    benchmark.extra_info |= result.info
    benchmark.pedantic(CLOCK.play, (iter(result.seconds),), rounds=len(result.seconds))
