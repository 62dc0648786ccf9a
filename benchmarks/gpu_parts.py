"""The parts of ``make gpu``, each a process: ``python -m benchmarks.gpu --only PART`` starts them (`gpu.py`)."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import time

import torch

from planecycle_fast.bench.environment import folder_name

from . import gpu_groups, gpu_kernels, gpu_models, gpu_sanitize, gpu_smoke, gpu_tests, gpu_warm, op_measure, op_report
from .budget import Part
from .op_cells import DTYPES, SHAPES, Cell
from .part_table import PartTable

RESULTS = Path(__file__).parent / "results"
OPERATIONS = ("plane_switch", "add_norm", "rope", "attention", "swiglu", "gelu")
QUICK_SHAPES = (0, 2, 3)  # of SHAPES: short sequences, ViT-B, ViT-L


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=RUN)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    given = parser.parse_args(arguments)
    part = Part(given.part, given.until - time())
    status = RUN[given.part](results_folder(), part)
    print(part.note(), end="", flush=True)
    return status


def results_folder() -> Path:
    """That of this GPU."""
    folder = RESULTS / folder_name(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def header(command: str) -> str:
    """Where and of what a result is, as lines of text."""
    import triton

    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}), CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}, `{command}`\n"
    )


def head(part: Part) -> str:
    """The header of a part's file."""
    return header(f"python -m benchmarks.gpu --only {part.name}")


def smoke(folder: Path, part: Part) -> int:
    return gpu_smoke.run(folder / "smoke.md", head(part), part)


def warm(folder: Path, part: Part) -> int:
    return gpu_warm.run(gpu_warm.jobs(), folder / "warm.md", head(part), part)


def models(folder: Path, part: Part) -> int:
    return gpu_models.run(gpu_groups.GROUPS, folder / "models.md", head(part), part)


def tests(folder: Path, part: Part) -> int:
    return gpu_tests.run(folder / f"{part.name}.txt", head(part), part)


def sanitize(folder: Path, part: Part) -> int:
    return gpu_sanitize.run(folder / f"{part.name}.txt", head(part), part)


def kernels(folder: Path, part: Part) -> int:
    return gpu_kernels.run(folder / "kernels.md", head(part), part)


def tiles(folder: Path, part: Part) -> int:
    return gpu_kernels.run_tiles(folder / "tiles.md", head(part), part)


def quick_cells() -> Iterator[Cell]:
    """What the operations' benchmarks measure, on some of their shapes, one shape after another."""
    for index in QUICK_SHAPES:
        for op in OPERATIONS:
            bench = importlib.import_module(f"benchmarks.bench_{op}")
            yield from bench.cells([SHAPES["cuda"][index]], "cuda", DTYPES["cuda"])


def ops(folder: Path, part: Part) -> int:
    """Measures operations against others and ceilings. Returns 1 if one of ours failed or something was refused."""
    about = head(part)

    def text(rows: list, note: str) -> str:
        how = "Medians of calls by turns on inputs that change; training is forward and backward."
        return f"{about}\n{how}\n\n{op_report.markdown(rows)}\n{note}"

    def stored(rows: list, note: str) -> str:
        records = {"about": about.strip(), "left_out": part.left_out, "rows": op_report.records(rows)}
        return json.dumps(records, indent=1) + "\n"

    table = PartTable(part, {folder / "ops.md": text, folder / "ops.json": stored})
    for cell in table.each((cell.group, cell) for cell in quick_cells()):
        table.add((cell.group, op_measure.measure(cell, "cuda")))
        torch.cuda.empty_cache()
    return int(any([result.refused is not None for _, of_group in table.rows for result in of_group.values()]))


def sweep(folder: Path, part: Part) -> int:
    """`planecycle-fast bench`; its report names what did not fit. Returns 1 if a contender failed or was wrong."""
    from planecycle_fast.bench.command import run_suite

    return run_suite(device="cuda", out=folder, seconds=part.left(), command="python -m benchmarks.gpu --only sweep")


RUN = {
    "smoke": smoke, "warm": warm, "models": models, "tests": tests, "kernels": kernels, "ops": ops, "sweep": sweep,
    "tiles": tiles, "compile": tests, "repeats": tests, "huge": tests, **dict.fromkeys(gpu_sanitize.TOOLS, sanitize),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
