"""``make bench-host``: what a pass costs where the GPU has nothing to do, in microseconds per block. Needs no GPU.

    PLANECYCLE_REPO=... python -m benchmarks.host [--baseline 8a2b271] [--rounds 15] [--top 20]

A lifted model, one of the authors' code accelerated, and their own code; eager, inference and forward + backward: whole
models of 12 blocks, divided by 12, and one block (12 blocks less 4, by 8). `host_times` says what is measured, and what
stands for a GPU. With a baseline the same script times that commit's package too. All take turns.

Where the time goes is sampled apart from that, by the innermost function:

checks              of arguments, and whether the host's blocks are still what they were
choice              which backend and attention, in which mode
dispatch            torch's dispatcher, torch.library, autograd functions, our registration
launch arguments    the Python around our kernels, triton's binder
torch's own calls   operations, modules, autograd's engine
rest                the engine's, a host's, the authors' own code
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from planecycle_fast.bench.environment import about

from .host_times import DEPTHS, MODELS, PARTS, STEPS
from .part_table import PROJECT, RESULTS, write

BASELINE = "8a2b271"  # before eager passes had a way of their own
NOW = "now"
FEW, MANY = DEPTHS
WHOLE, BLOCK = f"model of {MANY} blocks, / {MANY}", f"a block: {MANY} less {FEW} of them, / {MANY - FEW}"
OURS, AUTHORS = MODELS[:-1], MODELS[-1]
BASELINE_BAR, AUTHORS_BAR = 1 / 3, 2.0  # ours over the baseline's at most; the authors' over ours at least


class Row(NamedTuple):
    """What is timed: of which commit, a model, a step."""

    commit: str
    model: str
    step: str


class Times:
    """Microseconds of each round, of whole passes."""

    def __init__(self) -> None:
        self.of: dict[tuple[Row, int], list[float]] = {}
        self.missing: dict[Row, str] = {}

    def add(self, row: Row, depth: int, us: float) -> None:
        self.of.setdefault((row, depth), []).append(us)

    def per_block(self, row: Row, what: str) -> float | None:
        """By the fastest calls of all rounds, which others on the machine disturb least; None of what is missing."""
        if (row, MANY) not in self.of:
            return None
        many, few = min(self.of[row, MANY]), min(self.of[row, FEW])
        return many / MANY if what == WHOLE else (many - few) / (MANY - FEW)


class Worker:
    """A process that times one commit's package."""

    def __init__(self, tree: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("host_times.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        package = Path(self._answer()["package"])
        if package != (tree / "planecycle_fast").resolve():
            raise RuntimeError(f"the package of {tree} must be timed, got that of {package.parent}")

    def ask(self, **order: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that times ended with status {self._process.wait()}; see above")
        return json.loads(line)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the package of a commit, for as long as it is needed. Raises ValueError where there is none."""
    found = subprocess.run(
        ["git", "archive", "--format=zip", commit, "planecycle_fast"], cwd=PROJECT, capture_output=True
    )
    if found.returncode:
        raise ValueError(
            f"baseline must be a commit of this repository, got {commit!r}: {found.stderr.decode().strip()}"
        )
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder)
        yield Path(folder)


def time_all(workers: dict[str, Worker], rows: list[Row], rounds: int, calls: int) -> Times:
    """All rows by turns, in an order that turns round with every round."""
    times = Times()
    for step in STEPS:
        turns = [(row, depth) for row in rows if row.step == step for depth in DEPTHS]
        for i in range(rounds + 1):
            for row, depth in turns if i % 2 else turns[::-1]:
                if row in times.missing:
                    continue
                found = workers[row.commit].ask(do="time", row=[row.model, row.step, depth], calls=calls)
                if "missing" in found:
                    times.missing[row] = found["missing"]
                elif i:  # before, models are made
                    times.add(row, depth, found["us"])
        print(f"{step}: timed", flush=True)
    return times


def ratio(over: float | None, under: float | None, least: float | None = None, most: float | None = None) -> str:
    """A cell of the table, bold where it is past its bar."""
    if over is None or under is None:
        return "-"
    value = over / under
    past = (least is not None and value < least) or (most is not None and value > most)
    return f"**{value:.2f}**" if past else f"{value:.2f}"


def table(times: Times, baseline: str | None) -> str:
    """Ratios per model, step and what a block is."""

    def shown(us: float | None) -> str:
        return "-" if us is None else f"{us:.0f}"

    before = baseline or "baseline"
    lines = [f"| | step | | now, us | {before}, us | now / {before} | authors', us | authors' / now |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for model in OURS:
        for step in STEPS:
            for what in (WHOLE, BLOCK):
                now, theirs = (times.per_block(Row(NOW, each, step), what) for each in (model, AUTHORS))
                old = times.per_block(Row(baseline, model, step), what) if baseline else None
                lines.append(
                    f"| {model} | {step} | {what} | {shown(now)} | {shown(old)} | {ratio(now, old, most=BASELINE_BAR)} "
                    f"| {shown(theirs)} | {ratio(theirs, now, least=AUTHORS_BAR)} |"
                )
    lines += [f"\nNot measured: {' '.join(row)}: {reason}." for row, reason in times.missing.items()]
    return "\n".join(lines) + "\n"


def parts_table(parts: dict[Row, dict[str, Any]], times: Times) -> str:
    """Microseconds per block of whole models, by part."""
    lines = [f"| | | step | us | {' | '.join(PARTS)} |", f"| --- | --- | --- | ---: {'| ---: ' * len(PARTS)}|"]
    for row, found in parts.items():
        us = times.per_block(row, WHOLE)
        cells = [f"{us * found['parts'][part]:.0f}" for part in PARTS]
        lines.append(f"| {row.commit} | {row.model} | {row.step} | {us:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def places(parts: dict[Row, dict[str, Any]], times: Times, top: int) -> str:
    """Functions that take most, in microseconds per block: by themselves, and ours with all that they call."""
    text = ""
    for row, found in parts.items():
        us = times.per_block(row, WHOLE)
        text += f"\n{', '.join(row)}: by themselves\n"
        text += "".join([f"{us * share:8.1f} us  {part:18} {where}\n" for share, part, where in found["places"][:top]])
        if found["within"]:
            text += f"\n{', '.join(row)}: with all that they call\n"
            text += "".join([f"{us * share:8.1f} us  {where}\n" for share, where in found["within"][:top]])
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="?", const=BASELINE, metavar="COMMIT", help=f"{BASELINE} if none is named")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=8, help="of a round; then it is another's turn")
    parser.add_argument("--seconds", type=float, default=4, help="of samples for each row; 0 leaves them out")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="prints the N functions that take most")
    parser.add_argument("--out", type=Path, default=RESULTS / "host.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the processes that time
    with ExitStack() as stack:
        trees = {NOW: PROJECT}
        if given.baseline is not None:
            try:
                trees[given.baseline] = stack.enter_context(checkout(given.baseline))
            except ValueError as error:
                parser.error(str(error))
        workers = {}
        for commit, tree in trees.items():
            workers[commit] = Worker(tree)
            stack.callback(workers[commit].close)
        times, parts = measure(workers, given)
    text = report(times, parts, given.baseline)
    write(given.out, text)
    print(text)
    if given.top:
        print(places(parts, times, given.top))
    return 0


def measure(workers: dict[str, Worker], given: argparse.Namespace) -> tuple[Times, dict[Row, dict[str, Any]]]:
    """Times of all rows, and the parts of those that are there."""
    rows = [Row(commit, model, step) for step in STEPS for model in MODELS for commit in workers
            if commit == NOW or model != AUTHORS]  # fmt: skip
    times, parts = time_all(workers, rows, given.rounds, given.calls), {}
    for row in rows:
        if given.seconds > 0 and row not in times.missing:
            order = {"do": "parts", "row": [row.model, row.step, MANY], "seconds": given.seconds}
            parts[row] = workers[row.commit].ask(**order)
    return times, parts


def report(times: Times, parts: dict[Row, dict[str, Any]], baseline: str | None) -> str:
    """The page."""
    head = about(torch.device("cpu"), shlex.join(["python", "-m", "benchmarks.host", *sys.argv[1:]]))
    least, most = (
        f"authors' / now {AUTHORS_BAR:.2f} at least",
        f"now / {baseline or 'baseline'} {BASELINE_BAR:.2f} at most",
    )
    return (
        f"# Time of the host\n\n{head}\n"
        "Microseconds per block, nothing launched: the fastest of many calls, by turns. "
        f"Bars: {most}, {least}; **bold** is past its bar.\n\n{table(times, baseline)}\n"
        f"Whole models by part, sampled:\n\n{parts_table(parts, times)}"
    )


if __name__ == "__main__":
    sys.exit(main())
