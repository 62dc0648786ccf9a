"""The parts of ``make gpu``, each a process: ``python -m benchmarks.gpu --only PART`` starts them (`gpu.py`)."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import time

import torch

from . import (
    gpu_attention,
    gpu_kernels,
    gpu_models,
    gpu_rope_epilogue,
    gpu_sanitize,
    gpu_smoke,
    gpu_tests,
    gpu_warm,
    op_measure,
    op_report,
)
from .budget import Part
from .op_cells import DTYPES, SHAPES, OpCell
from .part_table import PartTable, header, results_folder

OPERATIONS = (
    "plane_switch", "add_norm", "rope", "attention", "swiglu", "gelu", "linear_gelu", "patchify", "self_attention",
)  # fmt: skip
QUICK_SHAPES = (0, 2, 3)  # of SHAPES: short sequences, ViT-B, ViT-L


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=RUN)
    parser.add_argument("--until", type=float, required=True, help="seconds since the epoch")
    given = parser.parse_args(arguments)
    part, run = Part(given.part, given.until - time()), RUN[given.part]
    ending = "txt" if run in (gpu_tests.run, gpu_sanitize.run) else "md"
    path = results_folder() / f"{part.name}.{ending}"
    status = run(path, header(f"python -m benchmarks.gpu --only {part.name}"), part)
    print(part.note(), end="", flush=True)
    return status


def warm(path: Path, about: str, part: Part) -> int:
    """Compiles what later parts run."""
    return gpu_warm.run(gpu_warm.jobs(), path, about, part)


def tiles(path: Path, about: str, part: Part) -> int:
    """Times other tiles than those shipped, which many processes compile before. Returns 0: nothing can fail."""
    gpu_warm.run(gpu_warm.tile_jobs(), path.with_name("tiles-warm.md"), about, Part(part.name, part.left() / 2))

    def text(rows: list, note: str) -> str:
        lines = [
            "Tiles of add_norm and linear_gelu that are faster than those shipped:\n",
            *[line for line in rows if line],
        ]
        return "\n".join([about, *lines, f"\n{len(rows)} kernels were looked at.", note])

    found = PartTable(part, {path: text})
    calls = gpu_kernels.tile_calls()
    for call in found.each((f"{kernel}, C = {shape.channels}", (shape, kernel)) for shape, kernel in calls):
        found.add(gpu_kernels.faster_tile(*call))
    return 0


def quick_cells() -> Iterator[OpCell]:
    """What the operations' benchmarks measure, on some of their shapes, one shape after another."""
    for index in QUICK_SHAPES:
        for op in OPERATIONS:
            bench = importlib.import_module(f"benchmarks.bench_{op}")
            yield from bench.cells([SHAPES["cuda"][index]], "cuda", DTYPES["cuda"])


def ops(path: Path, about: str, part: Part) -> int:
    """Measures operations against others and ceilings. Returns 1 if one of ours failed or something was refused."""

    def text(rows: list, note: str) -> str:
        how = "Medians of calls by turns on inputs that change; training is forward and backward."
        return f"{about}\n{how}\n\n{op_report.markdown(rows)}\n{note}"

    def stored(rows: list, note: str) -> str:
        records = {"about": about.strip(), "left_out": part.left_out, "rows": op_report.records(rows)}
        return json.dumps(records, indent=1) + "\n"

    table = PartTable(part, {path: text, path.with_suffix(".json"): stored})
    for cell in table.each((cell.group, cell) for cell in quick_cells()):
        table.add((cell.group, op_measure.measure(cell, "cuda")))
        torch.cuda.empty_cache()
    return int(any([result.refused is not None for _, of_group in table.rows for result in of_group.values()]))


def sweep(path: Path, about: str, part: Part) -> int:
    """`planecycle-fast bench`; its report names what did not fit. Returns 1 if a contender failed or was wrong."""
    from planecycle_fast.bench.command import run_suite

    command = "python -m benchmarks.gpu --only sweep"
    return run_suite(device="cuda", out=path.parent, seconds=part.left(), command=command)


RUN = {  # what writes a file, given its path, its first lines and the time
    "smoke": gpu_smoke.run, "warm": warm, "models": gpu_models.run, "tests": gpu_tests.run, "kernels": gpu_kernels.run,
    "attention": gpu_attention.run, "rope_epilogue": gpu_rope_epilogue.run,
    "ops": ops, "sweep": sweep, "tiles": tiles, **dict.fromkeys(("compile", "repeats", "huge"), gpu_tests.run),
    **dict.fromkeys(gpu_sanitize.TOOLS, gpu_sanitize.run),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
