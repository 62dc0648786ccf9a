"""The GPU tests, in as many processes as the cores allow, for kernels compile on the host.

Tests marked `alone` need all of the memory, or a GPU that does nothing else: they run last, one after another. Without
pytest-xdist all do. Those past 2^31 elements, which would take the time of all others, run when they are asked for
(`huge`). What fails is in the file at once (`time_limit.py`).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import time

from .budget import Part
from .part_table import PROJECT
from .time_limit import REASON

SPARED = 4  # cores that run no tests
HUGE = "past_2_31 or 2_to_the_31"
RUNS = {  # of each part: marks and parts of names, as pytest takes them, and whether in parallel
    "tests": [("gpu and not alone", "", True), ("gpu and alone", f"not ({HUGE})", False)],
    "compile": [("gpu", "inductor", True)],
    "repeats": [("gpu", "thousand_times", False)],
    "huge": [("gpu", HUGE, False)],
}
RESERVED = 25  # seconds, for those that come after others
NO_TESTS = 5  # pytest's status


def run(path: Path, about: str, part: Part, files: Sequence[Path] = ()) -> int:
    """Writes what failed, and the sums. Returns 1 if a test failed, none ran, or one was left out for its time."""
    path.write_text(about)
    statuses, until = [], time() + part.left()
    for i, (marks, names, parallel) in enumerate(RUNS[part.name], 1):
        processes, ends = workers() if parallel else 0, until - RESERVED * (len(RUNS[part.name]) - i)
        with path.open("a") as file:
            file.write(f"\n{' and '.join(filter(None, [marks, names]))}, {max(processes, 1)} at a time\n")
        command = [
            sys.executable, "-m", "pytest", "-m", marks, "-k", names, "--durations=5",
            "-p", "benchmarks.time_limit", "--until", str(ends), "--report", str(path),
            *(["-n", str(processes), "--dist", "load", "--maxschedchunk", "1"] if processes else []),
            *map(str, files or gpu_test_files()),
        ]  # fmt: skip
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a pool in each process would be too many
        statuses.append(subprocess.run(command, cwd=PROJECT, env=environment).returncode)
    ran = [status for status in statuses if status != NO_TESTS]
    return int(not ran or any(ran) or REASON in path.read_text())


def workers() -> int:
    """Processes beside each other; 0 without pytest-xdist."""
    there = importlib.util.find_spec("xdist") is not None
    return max(1, len(os.sched_getaffinity(0)) - SPARED) if there else 0


def gpu_test_files() -> list[Path]:
    """All that has tests marked gpu."""
    return sorted((PROJECT / "tests" / "gpu").glob("test_*.py"))
