"""Whole models: the cells of `planecycle-fast bench --quick`, by pytest-benchmark.

make bench                      one volume per call, different ones in turn; synchronised before the clock is read
PLANECYCLE_REPO=... make bench  with the authors' code

Outputs (and gradients) are compared with the reference's before anything is timed; what differs fails.
"""

from functools import cache
from itertools import count

import pytest
import torch

from planecycle_fast.bench import cells as which
from planecycle_fast.bench.contenders import NotHereError, vit
from planecycle_fast.bench.expected import Expected
from planecycle_fast.bench.networks import network
from planecycle_fast.bench.steps import step_of
from planecycle_fast.bench.timing import synchronise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CELLS = which.quick(DEVICE)
VOLUMES = 3


@cache
def host(model: str, dtype: str):
    return vit(model, DEVICE, which.DTYPES[dtype])


@cache
def expected(model: str, dtype: str, volume: str, step: str) -> tuple[list[torch.Tensor], Expected | None]:
    """Volumes of a group, and what the first one should give; nothing to compare peers with."""
    torch.manual_seed(1)
    shape = which.parse_volume(volume).shape
    volumes = [torch.randn(shape, device=DEVICE).to(which.DTYPES[dtype]) for _ in range(VOLUMES)]
    return volumes, None if model in which.PEERS else Expected(host(model, dtype), dtype, step, volumes[0])


@pytest.mark.parametrize("cell", CELLS, ids=[" ".join([part for part in cell if part]) for cell in CELLS])
def test_step(benchmark, cell):
    volumes, outputs = expected(*cell.group)
    try:
        made = network(cell, None if outputs is None else host(cell.model, cell.dtype), volumes[0])
    except NotHereError as error:
        benchmark.skipped = True
        pytest.skip(str(error))
    step, number = step_of(cell.step, made), count()
    if outputs is not None:
        agreement, _ = outputs.check(cell, made, step)
        if agreement.reason is not None:
            benchmark.skipped = True
            pytest.fail(f"not timed: {agreement.reason}", pytrace=False)

    def timed(volume):
        step(volume)
        synchronise(DEVICE)

    def next_volume():
        synchronise(DEVICE)
        return (volumes[next(number) % VOLUMES],), {}

    benchmark.group = ", ".join([part for part in cell[:-1] if part])
    benchmark.extra_info |= {"contender": cell.code, "ours": cell.code in which.OURS}
    benchmark.pedantic(timed, setup=next_volume, rounds=5, warmup_rounds=1)
