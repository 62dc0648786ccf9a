"""Whole models: the cells of `planecycle-fast bench --quick`, by pytest-benchmark.

make bench                      one volume per call, different ones in turn; synchronised before the clock is read
PLANECYCLE_REPO=... make bench  with the authors' code

Outputs (and gradients) are compared with the reference's before anything is timed; what differs fails.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pytest

from planecycle_fast.bench.cells import ACCELERATED, OURS, Cell, quick
from planecycle_fast.bench.measure import Effort, Group, Hosts
from planecycle_fast.bench.rows import MEASURED, NOT_HERE
from planecycle_fast.inputs import usable_device

from .op_benchmark import CLOCK, play

HOSTS = Hosts(usable_device("auto"))
EFFORT = Effort("models", rounds=5, warmups=1, seconds=float("inf"), counted=False)


def benchmark_of(cells: Sequence[Cell]) -> Callable[..., None]:
    """A test for pytest-benchmark of every cell; those of a group are measured when the first of its tests runs."""

    @cache
    def measured(key: tuple) -> Group:
        group = Group([cell for cell in cells if cell.group == key], HOSTS.device, HOSTS.of(Cell(*key, "", "")))
        group.measure(EFFORT)
        group.steps.clear()
        return group

    @pytest.mark.benchmark(timer=CLOCK.read)
    @pytest.mark.parametrize("cell", cells, ids=[" ".join([part for part in cell if part]) for cell in cells])
    def test(benchmark, cell):
        group = measured(cell.group)
        result = group.results[cell]
        benchmark.group = ", ".join([part for part in cell[:-1] if part])
        play(
            benchmark, group.seconds.get(cell, ()),
            {"contender": cell.code, "ours": cell.code in (*OURS, ACCELERATED)},
            missing=result["reason"] if result["status"] == NOT_HERE else None,
            refused=None if result["status"] in (MEASURED, NOT_HERE) else f"{result['status']} {result['reason']}",
        )  # fmt: skip

    return test


test_step = benchmark_of(quick(HOSTS.device))
