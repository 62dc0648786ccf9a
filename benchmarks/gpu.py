"""``make gpu``: what a machine with an NVIDIA GPU has to show, in eight minutes.

Needs torch, triton and pytest; pytest-xdist, timm and PLANECYCLE_REPO where they are there. Each part is a process of
its own (`gpu_parts.py`), which writes its file in ``benchmarks/results/<gpu>/`` after every row. One that crashes, or
hangs and is killed, loses the row that it was at, and the next begins. ``--only PART ...`` runs some of them:

smoke    smoke.md: everything once, compared; 60 s say whether anything is broken (``make gpu-smoke``)
warm     warm.md: compiles, in many processes beside `smoke`, what later parts run
models   models.md: ViT-S, B, L against the authors' code, eager and compiled, and their products and attention alone
tests    tests.txt: the GPU tests, in many processes; those marked `alone` last and by themselves
attention  attention.md, attention.jsonl: what `attention="auto"` chooses from, and where another choice is faster
kernels  kernels.md: each kernel against a copy of as many bytes; what the host needs per block
ops      ops.md, ops.json: every operation against its reference and what others offer
sweep    report.md, rows.jsonl, pictures: `planecycle-fast bench --quick`

and, only when they are asked for: `tiles` (other tiles of kernels than the shipped ones), `rope_epilogue` (a candidate
for where keys turn, against what the engine does); of the tests alone `compile` (torch.compile), `repeats` (1,000 times
the same bits), `huge` (past 2^31 elements); `memcheck`, `racecheck`, `initcheck`, the tools of NVIDIA's
compute-sanitizer (``make gpu-sanitize``).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter, sleep, time

import torch

from planecycle_fast.bench.table import markdown_table

from .budget import Budget
from .part_table import PROJECT, header, results_folder, write

STAGES = {  # parts that run side by side: seconds of all of them
    ("smoke", "warm"): 50, ("models",): 155, ("tests",): 145, ("attention",): 40, ("kernels",): 30, ("ops",): 25,
    ("sweep",): 25,
}  # fmt: skip
ASKED = {  # by --only alone
    ("tiles",): 120, ("rope_epilogue",): 60, ("compile",): 150, ("repeats",): 150, ("huge",): 100,
    ("memcheck",): 240, ("racecheck",): 240, ("initcheck",): 240,
}  # fmt: skip
PARTS = [name for stage in (*STAGES, *ASKED) for name in stage]
GRACE, POLL = 10, 0.1  # seconds: after its time, until a part is killed; between looks at what runs
DONE, FAILED = "done", "failed"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that parts do not outlive this
    rows: list[tuple[str, str, float, float]] = []
    budget, began = Budget(stages(given.only)), perf_counter()
    for stage in budget.shares:
        allowed = budget.begin(stage).seconds
        print(f"{' and '.join(stage)}: {allowed:.0f} s at most", flush=True)
        for name, (status, seconds) in run_stage(stage, allowed).items():
            rows.append((name, status, seconds, allowed))
            print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        if given.only is None:
            write(results_folder() / "run.md", f"{header('make gpu')}\n{table(rows, perf_counter() - began)}")
    print(table(rows, perf_counter() - began))
    return int(any([status != DONE for _, status, _, _ in rows]))


def stages(only: Sequence[str] | None) -> dict[tuple[str, ...], float]:
    """Seconds of each stage that runs, in order."""
    if only is None:
        return dict(STAGES)
    chosen = {tuple([name for name in stage if name in only]): s for stage, s in (STAGES | ASKED).items()}
    return {stage: s for stage, s in chosen.items() if stage}


def command(name: str, until: float) -> list[str]:
    """What runs a part that should end at a time in seconds since the epoch."""
    return [sys.executable, "-u", "-m", "benchmarks.gpu_parts", name, "--until", f"{until:.1f}"]


def run_stage(stage: Sequence[str], seconds: float) -> dict[str, tuple[str, float]]:
    """What became of each part, and the seconds it took. Returns when all have ended; what they leave running ends."""
    began, until = perf_counter(), time() + seconds
    parts, found = {}, {}
    try:
        for name in stage:  # each the leader of a group of processes, with whatever it starts
            parts[name] = subprocess.Popen(command(name, until), cwd=PROJECT, start_new_session=True)
        while len(found) < len(parts):
            sleep(POLL)
            for name, process in parts.items():
                taken, code = perf_counter() - began, process.poll()
                if name not in found and code is not None:
                    found[name] = _status(code), taken
                elif name not in found and taken > seconds + GRACE:
                    found[name] = f"killed after {taken:.0f} s", taken
    finally:
        for process in parts.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return found


def _status(code: int) -> str:
    if code in (0, 1):
        return FAILED if code else DONE
    return f"crashed: {signal.Signals(-code).name}" if code < 0 else f"crashed: status {code}"


def table(rows: Sequence[tuple[str, str, float, float]], seconds: float) -> str:
    """What became of the parts, as Markdown."""
    found = [(name, status, f"{taken:.0f}", f"{allowed:.0f}") for name, status, taken, allowed in rows]
    lines = markdown_table(("part", "", "seconds", "at most"), found, 2)
    return "\n".join([*lines, "", f"In all: {seconds:.0f} s.", ""])


if __name__ == "__main__":
    sys.exit(main())
