"""Compiles what later parts of ``make gpu`` run, in many processes: on slow cores one after another takes minutes.

Triton and Inductor keep what they compile on disk, so that a part finds it there. Each job is a process:
``python -m benchmarks.gpu_warm JOB``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import NamedTuple

from planecycle_fast.bench.table import markdown_table

from . import gpu_attention, gpu_kernels, gpu_models
from .budget import Part
from .part_table import PROJECT, PartTable

SPARED = 2  # cores for what runs beside
MEMORY = 76  # GiB of the GPU that all jobs of a moment may take
SHARES = 10  # jobs that the kernels are shared out to, and those of attention


class Job(NamedTuple):
    """What one process compiles."""

    name: str
    gigabytes: float


class EndedJob(NamedTuple):
    """A job that has ended."""

    job: Job
    status: int
    seconds: float


def jobs() -> list[Job]:
    """Compiled contenders of `gpu_models`, which take longest, all calls of `gpu_kernels`, and our own attention."""
    compiled = [Job(f"model {i}", group.gigabytes) for i, group in enumerate(gpu_models.GROUPS) if group.compiled]
    return compiled + [Job(f"{kind} {i}", 2) for kind in ("kernels", "attention") for i in range(SHARES)]


def tile_jobs() -> list[Job]:
    """All tiles of the kernels that have some to choose from."""
    return [Job(f"tiles {i}", 4) for i in range(len(gpu_kernels.tile_calls()))]


def run(todo: Sequence[Job], path: Path, about: str, part: Part) -> int:
    """Runs jobs, as many at once as cores and memory allow, until time is over. Returns 1 if one failed."""
    table = PartTable(part, {path: lambda rows, note: f"{about}\n{text(rows)}\n{note}"})
    waiting, running = list(todo), {}
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    places = max(1, len(os.sched_getaffinity(0)) - SPARED)
    try:
        while (waiting or running) and part.left() > 0:
            for job in list(waiting):
                taken = sum([other.gigabytes for other in running])
                if len(running) < places and (not running or taken + job.gigabytes <= MEMORY):
                    process = subprocess.Popen(command(job), cwd=PROJECT, env=environment)
                    running[job] = process, perf_counter()
                    waiting.remove(job)
            sleep(0.05)
            for job, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    table.add(EndedJob(job, process.returncode, perf_counter() - began))
    finally:
        for process, _ in running.values():
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    part.left_out += [job.name for job in (*running, *waiting)]
    table.close()
    return int(any([row.status != 0 for row in table.rows]))


def text(rows: Sequence[EndedJob]) -> str:
    """The table."""
    found = [(row.job.name, row.status, f"{row.seconds:.0f}") for row in rows]
    return "\n".join(markdown_table(("job", "status", "seconds"), found, 1)) + "\n"


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_warm", *job.name.split()]


def main(arguments: Sequence[str]) -> None:
    """Does one job."""
    kind, index = arguments[0], int(arguments[1])
    if kind == "model":
        gpu_models.compile_only(gpu_models.GROUPS[index])
    elif kind == "kernels":  # every tenth call, of one volume: a kernel is the same for any batch
        for _, make in list(gpu_kernels.calls(one_volume=True))[index::SHARES]:
            op, _, _, call = make()
            op.body(*call)
    elif kind == "attention":
        for cell in list(gpu_attention.cells())[index::SHARES]:
            gpu_attention.compile_only(cell)
    else:
        shape, kernel = gpu_kernels.tile_calls()[index]
        for _, call in gpu_kernels.with_tiles(shape._replace(batch=1), kernel):
            call()


if __name__ == "__main__":
    main(sys.argv[1:])
