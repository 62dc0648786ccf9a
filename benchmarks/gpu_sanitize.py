"""The kernels under NVIDIA's compute-sanitizer, which comes with CUDA: ``make gpu-sanitize TOOL=racecheck``.

Under it everything is many times slower, on the host above all: the tests are shared out to as many processes as the
cores allow, each of them under a sanitizer of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep, time
from typing import NamedTuple

from .budget import Part
from .gpu_tests import NO_TESTS, SPARED
from .part_table import PROJECT, PartTable, write
from .time_limit import REASON

TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = "vit_shapes or test_layouts or in_place"  # of tests/gpu/test_gpu_ops.py: every kernel, all layouts
SHOWN = 30  # lines of errors of one process
SUMS = re.compile(r"ERROR SUMMARY|\d (passed|failed|skipped|deselected)")


class EndedProcess(NamedTuple):
    """One process that has ended."""

    number: int
    status: int
    output: str


def run(path: Path, about: str, part: Part, processes: int | None = None) -> int:
    """Runs the tool that the part is named by. Returns 1 if it found an error, a test failed, or not all have run."""
    number = processes or max(1, len(os.sched_getaffinity(0)) - SPARED)
    table = PartTable(part, {path: lambda rows, note: f"{about}\n{text(rows, number)}\n{note}"})
    if shutil.which(command(part.name, 0, 0, 1)[0]) is None:
        write(path, f"{about}\nnot run: compute-sanitizer, which comes with CUDA, was not found\n")
        return 1
    environment, until = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, time() + part.left()
    outputs = [path.with_suffix(f".{i}.log") for i in range(number)]
    running = {}
    for i, output in enumerate(outputs):
        with output.open("w") as file:
            running[i] = subprocess.Popen(
                command(part.name, until, i, number), cwd=PROJECT, env=environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
    while running:
        sleep(0.1)
        for i, process in list(running.items()):
            if process.poll() is not None:
                del running[i]
                table.add(EndedProcess(i, process.returncode, outputs[i].read_text()))
                outputs[i].unlink()
                print(text(table.rows[-1:], number), flush=True)
    return int(any([row.status not in (0, NO_TESTS) or REASON in row.output for row in table.rows]))


def command(tool: str, until: float, index: int, number: int) -> list[str]:
    """Every `number`-th test, from `index` on, under a tool."""
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
        sys.executable, "-m", "pytest", "-m", "gpu", "-k", TESTS, "-rfs", "tests/gpu/test_gpu_ops.py",
        "-p", "benchmarks.time_limit", "--until", str(until), "--share", f"{index}/{number}",
    ]  # fmt: skip


def text(rows: Sequence[EndedProcess], number: int) -> str:
    """The sums of each process, and of one that failed the first errors."""
    lines = [f"{len(rows)} of {number} processes have ended."]
    for row in rows:
        said = row.output.splitlines()
        sums = [line.strip("= ") for line in said if SUMS.search(line)]
        lines.append(f"process {row.number}: status {row.status}; {'; '.join(sums)}")
        errors = [line for line in said if line.startswith(("========= ", "FAILED", "E "))]
        lines += [f"    {line}" for line in errors[: SHOWN if row.status else 0]]
        lines += [f"    {line}" for line in said if REASON in line]
    return "\n".join(lines) + "\n"
