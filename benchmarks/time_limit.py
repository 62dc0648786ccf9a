"""A pytest plugin, ``-p benchmarks.time_limit``, for runs that may be stopped at any moment.

``--until 1764240000``: tests that would begin later than that, in seconds since the epoch, are skipped.
``--report FILE``: what fails is appended at once, how far it is after every `EVERY` tests, and the sums at the end.
``--share 3/12``: every twelfth test, from the fourth on.
Tests whose names say that they take long begin first. With pytest-xdist too: each process has the time, one the file.
"""

from collections import Counter
from pathlib import Path
from time import perf_counter, time

import pytest

REASON = "left out: the time limit was reached"
LONG = ("thousand_times", "inductor", "opcheck")  # in the names of tests that take long
EVERY = 50


def pytest_addoption(parser):
    parser.addoption("--until", type=float, default=float("inf"), help="seconds since the epoch; then no test begins")
    parser.addoption("--share", default="0/1", help="every n-th test from one on")
    parser.addoption("--report", type=Path, help="a file to append to")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not any([part in item.name for part in LONG]))
    first, number = map(int, config.getoption("--share").split("/"))
    items[:] = items[first::number]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time() > item.config.getoption("--until"):
        pytest.skip(REASON)


def pytest_configure(config):
    if config.getoption("--report") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config.getoption("--report")))


class Report:
    """Follows the tests of all processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.began, self.outcomes, self.reasons = path, perf_counter(), Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        self.outcomes[report.outcome] += 1
        if report.outcome == "failed":
            says = str(report.longrepr).strip().splitlines() or [""]
            errors = [line.removeprefix("E").strip() for line in says if line.startswith("E ")]
            self._write(f"FAILED {report.nodeid}: {' '.join((errors or says[-1:])[:2])[:400]}")
        elif report.outcome == "skipped":
            self.reasons[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
        if self.outcomes.total() % EVERY == 0:
            self._write(f"so far: {self._sums()}")

    def pytest_sessionfinish(self):
        for reason, number in self.reasons.most_common():
            self._write(f"skipped, {number}: {reason.removeprefix('Skipped: ')}")
        self._write(f"in all: {self._sums()}\n")

    def _sums(self) -> str:
        sums = ", ".join([f"{self.outcomes[name]} {name}" for name in ("passed", "failed", "skipped")])
        return f"{sums}, {perf_counter() - self.began:.0f} s"

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
