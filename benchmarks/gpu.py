"""``make gpu``: what a machine with an NVIDIA GPU has to show, in under nine minutes.

Needs torch, triton and pytest, nothing else. Writes ``benchmarks/results/<gpu>/``: `tests.txt`, the GPU tests; `ops.md`
and `ops.json`, every operation against its reference and what others offer, and the ceilings of this GPU (`bench_*.py`
with pytest-benchmark measure the same on all shapes); `kernels.md`, each kernel against a copy of as many bytes, and
what the host needs per block; `report.md`, `rows.jsonl` and pictures, a quick sweep over whole models. Each part has
its time: what it leaves over goes to the next, and what did not fit is named. Files say which GPU, versions, commit and
command they are of.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import gpu_kernels, op_measure, op_report
from .budget import Budget, Part
from .op_cells import DTYPES, SHAPES, Cell
from .time_limit import REASON

PROJECT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SECONDS = {"tests": 200, "ops": 140, "kernels": 80, "models": 90}  # 8.5 minutes; the rest is for starting up
OPERATIONS = ("plane_switch", "add_norm", "rope", "attention", "swiglu", "gelu")
QUICK_SHAPES = (0, 2, 3)  # of SHAPES: short sequences, ViT-B, ViT-L


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="no tests: their time goes to the other parts")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="these parts")
    parser.add_argument("--tiles", action="store_true", help="also other tiles of add_norm than the shipped ones")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    folder, budget, status = results_folder(), Budget(SECONDS), 0
    run = {"tests": tests, "ops": ops, "kernels": lambda *where: kernels(*where, tiles=given.tiles), "models": models}
    for name in SECONDS:
        if name in given.only and not (name == "tests" and given.skip_tests):
            part = budget.begin(name)
            print(f"{name}: {part.seconds:.0f} s at most", flush=True)
            status = max(status, run[name](folder, part))
            print(part.note(), end="", flush=True)
    return status


def results_folder() -> Path:
    """That of this GPU."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def header() -> str:
    """Where and of what a result is, as lines of text."""
    import triton

    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}), CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}, `{command}`\n"
    )


def tests(folder: Path, part: Part) -> int:
    """Runs the tests marked gpu; writes what they printed. Returns 1 if one failed or was cut off."""
    status, text = run_tests(gpu_test_files(), part)
    (folder / "tests.txt").write_text(f"{header()}\n{text[-20_000:]}\n{part.note()}")
    print("\n".join(text.splitlines()[-15:]))
    return status


def run_tests(files: list[Path], part: Part, grace: float = 60.0) -> tuple[int, str]:
    """Status and output of pytest. No test begins when the part is over; after `grace` more seconds all is killed."""
    limit = part.left()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--durations=5", "-p", "benchmarks.time_limit",
               "--time-limit", str(limit), *map(str, files)]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=limit + grace)  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        part.left_out.append("the rest of the tests, killed")
        return 1, (expired.stdout or b"").decode(errors="replace") + "\nkilled: a test did not end in time\n"
    skipped = sum([int(n) for n in re.findall(rf"SKIPPED \[(\d+)\][^\n]*{REASON}", done.stdout)])
    if skipped:
        part.left_out.append(f"{skipped} tests")
    return min(done.returncode, 1), done.stdout


def gpu_test_files() -> list[Path]:
    """Test files that need nothing but torch, triton and pytest, besides optional hosts; what matters most first."""
    order = ["test_gpu_ops.py", "test_gpu_models.py", "test_gpu_attention.py"]
    found = sorted((PROJECT / "tests").glob("test_gpu*.py"))
    return sorted(found, key=lambda path: order.index(path.name) if path.name in order else len(order))


def quick_cells() -> Iterator[Cell]:
    """What the operations' benchmarks measure, on some of their shapes, one shape after another."""
    for index in QUICK_SHAPES:
        for op in OPERATIONS:
            bench = importlib.import_module(f"benchmarks.bench_{op}")
            yield from bench.cells([SHAPES["cuda"][index]], "cuda", DTYPES["cuda"])


def ops(folder: Path, part: Part) -> int:
    """Measures operations against others and ceilings. Returns 1 if one of ours failed or something was refused."""
    results = {}
    for cell in part.within([(cell.group, cell) for cell in quick_cells()]):
        results[cell.group] = op_measure.measure(cell, "cuda")
        torch.cuda.empty_cache()
    write_ops(folder, results, part)
    print(f"{len(results)} groups of contenders measured: {folder / 'ops.md'}")
    return int(any([result.refused is not None for of_group in results.values() for result in of_group.values()]))


def write_ops(folder: Path, results: dict[str, dict[str, op_measure.Result]], part: Part) -> None:
    """`ops.md` for people, `ops.json` for programs."""
    text = "Medians of calls by turns on inputs that change; training is forward and backward.\n\n"
    (folder / "ops.md").write_text(f"{header()}\n{text}{op_report.markdown(results.items())}\n{part.note()}")
    stored = {"about": header().strip(), "left_out": part.left_out, "rows": op_report.records(results.items())}
    (folder / "ops.json").write_text(json.dumps(stored, indent=1) + "\n")


def kernels(folder: Path, part: Part, tiles: bool = False) -> int:
    """Times each kernel against a copy, and the host. Returns 0: bars are shown, they do not fail."""
    rows = [gpu_kernels.time_call(*make()) for make in part.within(gpu_kernels.calls())]
    text = f"{header()}\n{gpu_kernels.table(rows)}\n{gpu_kernels.host_time()}"
    if tiles:
        faster = list(gpu_kernels.faster_tiles(part))
        text += "\nTiles of add_norm that are faster than `configs.tile`:\n\n" + ("\n".join(faster) or "none") + "\n"
    (folder / "kernels.md").write_text(f"{text}\n{part.note()}")
    print(text)
    return 0


def models(folder: Path, part: Part) -> int:
    """`planecycle-fast bench`; its report names what did not fit. Returns 1 if a contender failed or was wrong."""
    from planecycle_fast.benchmark.command import run_bench

    return run_bench(device="cuda", out=folder, seconds=part.left(), command="make gpu")


if __name__ == "__main__":
    sys.exit(main())
