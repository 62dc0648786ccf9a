"""``make bench-cpu``: PlaneCycle on a CPU, inference, against the authors' code, slice2d and a floor, in one run.

    PLANECYCLE_REPO=... python -m benchmarks.cpu [--rounds 5] [--dtype fp32] [--volume 1x32x256]

The floor is what no implementation avoids: the same linear layers and attention calls, nothing else. Also what Python
costs at small volumes: the time of a pass against that of the very operations it calls, called again one after another.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import planecycle_fast as pcf
from planecycle_fast.bench.bars import Bar
from planecycle_fast.bench.cells import AUTHORS, AUTHORS_COMPILED, DTYPES, FAST, FLOOR, REFERENCE, Cell
from planecycle_fast.bench.contenders import vit
from planecycle_fast.bench.environment import about
from planecycle_fast.bench.measure import Effort
from planecycle_fast.bench.timing import interleaved
from planecycle_fast.runtime.backends import pick

from .budget import Part
from .part_table import RESULTS
from .whole_models import run

CPU, MODEL, OURS, SLICES = torch.device("cpu"), "ViT-S", ("PCg", FAST), ("slice2d", FAST)
VOLUMES = ("1x32x256", "4x64x64", "1x32x448", "1x16x256", "1x28x448")
CUBIC = ("1x16x256", "1x28x448")  # as many tokens along each axis: all planes are alike
LEAST = {("PCg", FLOOR): 1 / 1.10, ("PCg", AUTHORS_COMPILED): 1.0, ("PCg", AUTHORS): 1.0,
         SLICES: 1 / 1.05}  # their time over ours; of slice2d: cubic volumes  # fmt: skip
MEMORY_BAR, PYTHON_BAR = 1 / 0.6, 0.05  # the authors' peak over ours at least; share of a pass at most
THREADS, MOST_ROUNDS = 2, 25
SECONDS = 4  # of one contender at least: the fewer a pass takes, the more rounds


def cells(dtype: str, volume: str, compiled: bool) -> list[Cell]:
    """What takes turns."""
    contenders = [each for each in (OURS, *LEAST, ("PCg", REFERENCE)) if compiled or each[1] != AUTHORS_COMPILED]
    return [Cell(MODEL, dtype, volume, "inference", *each) for each in contenders]


def bars(group: list[Cell]) -> list[Bar]:
    """What a group is held to."""
    where, there = group[0].group, [cell[4:] for cell in group]
    of_time = [Bar(where, other, OURS, least) for other, least in LEAST.items()
               if other in there and (other != SLICES or group[0].volume in CUBIC)]  # fmt: skip
    return [*of_time, Bar(where, ("PCg", AUTHORS), OURS, MEMORY_BAR, "peak_bytes")]


class _Calls(TorchDispatchMode):
    """All operations that run, with their arguments as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made.append((func, own(func, args), kwargs or {}))
        if func._schema.name.endswith("::blocks_"):  # takes its arguments, which others that were recorded need
            args = own(func, args)
        return func(*args, **(kwargs or {}))


def own(func: torch._ops.OpOverload, args: tuple) -> tuple:
    """Arguments with copies of those that are written to."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    return tuple([arg.clone() if write else arg for arg, write in zip(args, written)])


@torch.inference_mode()
def python_cost(dtype: str, rounds: int = 200) -> str:
    """The share of a pass at 1 x 16 x 64^2 in which none of the operations runs that it calls, as a line."""
    lifted = pcf.lift(vit(MODEL, CPU, DTYPES[dtype]), backend="cpu")
    volume = torch.randn(1, 3, 16, 64, 64).to(DTYPES[dtype])
    with _Calls() as calls:
        lifted(volume)
    prepared = [[(func, own(func, args), kwargs) for func, args, kwargs in calls.made] for _ in range(rounds + 1)]

    def again(_: Tensor) -> None:
        for func, args, kwargs in prepared.pop():
            func(*args, **kwargs)

    found = interleaved({"pass": lifted, "again": again}, [(volume,)], device=CPU, rounds=rounds, warmups=1)
    share = 1 - found["again"].median / found["pass"].median
    shown = f"**{share:.1%}**" if share > PYTHON_BAR else f"{share:.1%}"
    return f"- {dtype}: {shown} of {found['pass'].median * 1e3:.1f} ms (bar {PYTHON_BAR:.0%})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="at least; more where a pass is short")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--volume", nargs="+", choices=VOLUMES, default=list(VOLUMES))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.md")
    given = parser.parse_args()
    pick("cpu", CPU, "add_norm")  # else a contender that is not ours would run in its name
    torch.set_num_threads(THREADS)
    groups = [cells(dtype, volume, given.compile) for dtype in given.dtype for volume in given.volume]
    head = about(CPU, shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]]))
    costs = "\n".join([python_cost(dtype) for dtype in given.dtype])
    effort = Effort("cpu", max(MOST_ROUNDS, given.rounds), 1, SECONDS * len(groups[0]), given.rounds, False)
    status = run(
        groups, [bar for group in groups for bar in bars(group)], given.out,
        f"# PlaneCycle on a CPU: ViT-S/16, inference\n\n{head}\nWhat Python costs at 1x16x64:\n\n{costs}\n",
        Part("cpu", float("inf")), effort, CPU,
    )  # fmt: skip
    print(given.out.read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
