"""Whole models on a GPU: ours in each form, the authors' code eager and compiled, and the floor beneath them all.

``PLANECYCLE_REPO=... python -m benchmarks.gpu --only models`` writes ``benchmarks/results/<gpu>/models.md``;
``python -m benchmarks.gpu_models --model ViT-S --step training`` a part of it, without a limit of time. What is
compiled stands in groups of its own, ours beside it: compilation takes longest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from planecycle_fast.bench import cells as which
from planecycle_fast.bench.bars import BEST, Bar
from planecycle_fast.bench.cells import Cell
from planecycle_fast.bench.measure import Effort, Hosts
from planecycle_fast.bench.networks import network
from planecycle_fast.bench.steps import step_of

from .budget import Part
from .part_table import header, results_folder
from .whole_models import run as run_groups

STEPS = {"inference": "inference", "training": "finetune"}
EFFORT = Effort("models", rounds=7, warmups=0, seconds=12, counted=False, exact=False)

OURS, SLICES, PCM, GRAPH = ("PCg", which.FAST), ("slice2d", which.FAST), ("PCm", which.FAST), ("PCg", which.GRAPH)
EAGER, COMPILED = ("PCg", which.AUTHORS), ("PCg", which.AUTHORS_COMPILED)
REFERENCE, OURS_COMPILED, REDUCED = [("PCg", code) for code in (which.REFERENCE, which.COMPILED, which.REDUCED)]
FLOORS = [("PCg", code) for code in which.FLOORS if code != which.FLOOR]  # with each kernel of attention by name
INFERENCE = (OURS, SLICES, PCM, GRAPH, EAGER, REFERENCE, *FLOORS)
TRAINING = (OURS, SLICES, EAGER, REFERENCE, *FLOORS)
GRAPHED = (*TRAINING[:2], GRAPH, *TRAINING[2:])
COMPILES = (OURS, COMPILED)


class Turns(NamedTuple):
    """Cells that take turns."""

    cells: list[Cell]
    gigabytes: float  # of the GPU that those that compile need, about: so that not too much is compiled at once

    @property
    def compiled(self) -> list[Cell]:
        """What torch.compile makes."""
        return [cell for cell in self.cells if "compiled" in cell.code]


def _turns(model: str, dtype: str, volume: str, step: str, contenders: Sequence, gigabytes: float = 0) -> Turns:
    return Turns([Cell(model, dtype, volume, STEPS[step], *each) for each in contenders], gigabytes)


GROUPS = [  # what says most first; in training neither ViT-B at 8x32x512 nor ViT-L at 4x32x512 fit in 79 GiB, whoever's
    _turns("ViT-S", "bf16", "8x32x512", "inference", INFERENCE),
    _turns("ViT-S", "bf16", "8x32x512", "inference", (*COMPILES, OURS_COMPILED), 5),
    _turns("ViT-S", "bf16", "8x32x512", "training", TRAINING),
    _turns("ViT-S", "bf16", "8x32x512", "training", COMPILES, 30),
    _turns("ViT-B", "bf16", "8x32x512", "inference", INFERENCE),
    _turns("ViT-S", "bf16", "4x64x64", "inference", INFERENCE),
    _turns("ViT-S", "bf16", "4x64x64", "training", GRAPHED),
    _turns("ViT-L", "bf16", "4x32x512", "inference", INFERENCE),
    _turns("ViT-B", "bf16", "8x32x512", "inference", COMPILES, 9),
    _turns("ViT-S", "bf16", "1x32x256", "inference", INFERENCE),
    _turns("ViT-S", "bf16", "32x64x64", "training", GRAPHED),
    _turns("ViT-S", "fp32", "32x64x64", "training", GRAPHED),
    _turns("ViT-B", "bf16", "32x64x64", "inference", INFERENCE),
    _turns("ViT-B", "bf16", "32x64x64", "training", TRAINING),
    _turns("ViT-S", "bf16", "4x64x64", "inference", COMPILES, 2),
    _turns("ViT-S", "bf16", "4x64x64", "training", COMPILES, 2),
    _turns("ViT-S", "bf16", "1x32x256", "inference", COMPILES, 2),
    _turns("ViT-S", "bf16", "32x64x64", "training", COMPILES, 6),
    _turns("ViT-B", "bf16", "32x64x64", "inference", COMPILES, 3),
    _turns("ViT-L", "bf16", "4x32x512", "inference", COMPILES, 7),
    _turns("ViT-S", "bf16", "4x64x64", "inference", (OURS, GRAPH, REDUCED), 2),  # the ways to wait less for Python
    _turns("ViT-S", "bf16", "4x64x64", "training", (OURS, GRAPH, REDUCED), 2),
]

LARGE = {  # (model, volume): times of compiled and eager code over ours, in inference
    ("ViT-S", "8x32x512"): (1.35, 3.0), ("ViT-B", "8x32x512"): (1.28, 2.5), ("ViT-L", "4x32x512"): (None, 2.1),
}  # fmt: skip
TRAINED, SMALL = ("ViT-S", "bf16", "8x32x512", "finetune"), ("ViT-S", "bf16", "4x64x64")
BARS = [Bar(TRAINED, COMPILED, OURS, 1.15), Bar(TRAINED, EAGER, OURS, 2.2),
        Bar(TRAINED, EAGER, OURS, 2.0, "peak_bytes"),
        Bar((*SMALL, "inference"), EAGER, OURS, 1 / 0.6),
        Bar((*SMALL, "inference"), EAGER, GRAPH, 6.0), Bar((*SMALL, "finetune"), EAGER, GRAPH, 7.0),
        Bar(("ViT-S", "bf16", "32x64x64", "finetune"), EAGER, GRAPH, 2.4)]  # fmt: skip
for (_model, _volume), (_compiled, _eager) in LARGE.items():
    _where = (_model, "bf16", _volume, "inference")
    BARS += [Bar(_where, COMPILED, OURS, _compiled)] if _compiled else []
    BARS += [Bar(_where, EAGER, OURS, _eager), Bar(_where, SLICES, OURS, 1 / 1.03), Bar(_where, BEST, OURS, 1 / 1.2)]
# Eager code is never slower than the authors'.
BARS += [Bar(cells[0].group, EAGER, OURS, 1.0) for cells, _ in GROUPS if EAGER in [cell[4:] for cell in cells]]


def run(path: Path, about: str, part: Part, groups: Sequence[Turns] = GROUPS, device: str = "cuda") -> int:
    """Writes all that is measured. Returns 1 if one of ours failed or a contender was refused."""
    return run_groups([group.cells for group in groups], BARS, path, about, part, EFFORT, device)


def compile_only(group: Turns, device: str = "cuda") -> None:
    """One call of what torch.compile makes: its results stay on disk."""
    host = Hosts(torch.device(device)).of(group.cells[0])
    weight = host.patch_embed.proj.weight
    for cell in group.compiled:
        volume = torch.randn(which.parse_volume(cell.volume).shape, device=device).to(weight.dtype)
        step_of(cell.step, network(cell, host, volume))(volume)


def main() -> int:
    known = {"model": sorted({group.cells[0].model for group in GROUPS}), "step": list(STEPS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in known.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    given = vars(parser.parse_args())
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    steps = [STEPS[step] for step in given["step"]]
    groups = [each for each in GROUPS if each.cells[0].model in given["model"] and each.cells[0].step in steps]
    chosen = [one for name, every in known.items() if given[name] != every for one in given[name]]
    name, command = "-".join(["models", *chosen]).lower(), " ".join(["python -m benchmarks.gpu_models", *sys.argv[1:]])
    return run(results_folder() / f"{name}.md", header(command), Part("models", float("inf")), groups)


if __name__ == "__main__":
    sys.exit(main())
