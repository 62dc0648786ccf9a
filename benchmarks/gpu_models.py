"""Whole models on a GPU: ours in each form, the authors' code eager and compiled, and the floor beneath them all.

``PLANECYCLE_REPO=... python -m benchmarks.gpu --only models`` writes ``benchmarks/results/<gpu>/models.md``;
``python -m benchmarks.gpu_models --model ViT-S --step training`` a part of it, without a limit of time. Contenders of a
group have the same weights, are compared with the reference before they are timed, and take turns on volumes that
change. What is compiled stands in groups of its own, ours beside it: compilation takes longest.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from planecycle_fast.bench import cells as codes
from planecycle_fast.bench.cells import DTYPES, Cell, parse_volume
from planecycle_fast.bench.contenders import NotHereError, vit
from planecycle_fast.bench.costs import is_out_of_memory, peak_bytes, release
from planecycle_fast.bench.expected import TOLERANCE
from planecycle_fast.bench.networks import Network, network
from planecycle_fast.bench.steps import inference, step_of
from planecycle_fast.bench.timing import Times, compare, interleaved, summary
from planecycle_fast.optional import MissingPackageError

from .budget import Part
from .gpu_floor import FLOORS, Floor
from .gpu_groups import CODES, COMPILED, EAGER, GRAPH, GROUPS, Group
from .gpu_models_table import Row, text
from .op_cells import Missing
from .part_table import PartTable

STEPS = {"inference": "inference", "training": "finetune"}  # of `steps.step_of`
ROUNDS, LEAST_ROUNDS, SECONDS = 7, 3, 12.0  # of a group's timed calls
VOLUMES = 3  # different ones, in turn
NOT_HERE, REFUSED = "not here", "refused"
Made = TypeVar("Made")


class _Refused(Exception):
    """It computes something else."""


class _Ready(NamedTuple):
    step: Callable[[Tensor], Any]
    peak: int
    error: float | None


def run(groups: Sequence[Group], path: Path, about: str, part: Part, device: str = "cuda") -> int:
    """Writes all that is measured. Returns 1 if one of ours failed or a contender was refused."""
    table = PartTable(part, {path: lambda rows, note: f"{about}\n{text(rows)}\n{note}"})
    for group in table.each((str(group), group) for group in groups):
        for row in measure(group, device):
            table.add(row)
            print(f"  {row.name}: {f'{row.times.median * 1e3:.2f} ms' if row.times else row.why}", flush=True)
    return int(any([_is_failure(row) for row in table.rows]))


def _is_failure(row: Row) -> bool:
    ours = row.name not in (EAGER, COMPILED, *FLOORS)
    return row.why.startswith(REFUSED) or bool(row.why and ours and not row.why.startswith(NOT_HERE))


def measure(group: Group, device: str = "cuda") -> list[Row]:
    """Every contender of a group; those that raise, or do not fit into memory, say so."""
    try:
        return _measure(group, torch.device(device))
    finally:  # where nothing holds the contenders any more
        torch._dynamo.reset()
        release(torch.device(device))


def _measure(group: Group, device: torch.device) -> list[Row]:
    ready, failed = {}, {}
    contenders = _attempt(partial(_Contenders, group, device), device)
    if isinstance(contenders, str):  # not even weights and volumes
        return [Row(group, name, why=contenders) for name in group.names]
    for name in group.names:
        made = _attempt(partial(contenders.make, name), device)
        (failed if isinstance(made, str) else ready)[name] = made
    times = _by_turns(ready, failed, contenders.volumes) if ready else {}
    return [
        Row(group, name, why=failed[name]) if name in failed
        else Row(group, name, times[name], ready[name].peak, ready[name].error)
        for name in group.names
    ]  # fmt: skip


def compile_only(group: Group, device: str = "cuda") -> None:
    """One call of what torch.compile makes: its results stay on disk."""
    contenders = _Contenders(group, torch.device(device))
    for name in group.compiled:
        contenders.step(name)[1](contenders.volumes[0])


def _attempt(make: Callable[[], Made], device: torch.device) -> Made | str:
    """What is made, or why it is not."""
    try:
        return make()
    except (NotHereError, Missing, MissingPackageError) as reason:
        return f"{NOT_HERE}: {reason}"
    except _Refused as error:
        return f"{REFUSED}: {error}"
    except Exception as error:  # the code of others raises anything
        words = f"raised {type(error).__name__}: {(str(error) or 'without a message').splitlines()[0][:200]}"
        found = "out of memory" if is_out_of_memory(error) else words
    release(device)
    return found


def _by_turns(
    ready: dict[str, _Ready], failed: dict[str, str], volumes: Sequence[Tensor]
) -> dict[str, Times]:  # ready, failed: what raises moves from one to the other
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    began = perf_counter()
    for i in range(ROUNDS):
        if i >= LEAST_ROUNDS and perf_counter() - began > SECONDS:
            break
        for name in list(ready):
            inputs, device = [(volumes[i % len(volumes)],)], volumes[0].device
            timed = _attempt(
                partial(interleaved, {name: ready[name].step}, inputs, device=device, rounds=1, warmups=0), device
            )
            if isinstance(timed, str):
                failed[name] = timed
                del ready[name]
            else:
                seconds[name].append(timed[name].median)
    return {name: summary(seconds[name]) for name in ready}


class _Contenders:
    """Makes contenders of a group, with the same weights."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.size, dtype = group, parse_volume(group.volume), DTYPES[group.dtype]
        self.host = vit(group.model, device, dtype)
        torch.manual_seed(1)
        self.volumes = [torch.randn(self.size.shape, device=device).to(dtype) for _ in range(VOLUMES)]
        self.floor = Floor(self.host, self.size, group.step == "training")
        self.known: dict[str, Any] = {}  # by mode: what the reference returns

    def step(self, name: str) -> tuple[Network, Callable[[Tensor], Any]]:
        mode, code = CODES[name]
        cell = Cell(self.group.model, self.group.dtype, self.group.volume, STEPS[self.group.step], mode, code)
        if code == codes.GRAPH and cell.step != "inference":
            made = network(cell._replace(code=codes.FAST), self.host, self.volumes[0])
            sample = torch.randn_like(self.volumes[0])
            torch.cuda.make_graphed_callables(made.run, (sample,), allow_unused_input=True)  # in place
        else:
            made = network(cell, self.host, self.volumes[0])
        return made, step_of(cell.step, made)

    def make(self, name: str) -> _Ready:
        """A contender that computes what the reference does. Raises whatever making and running it raises."""
        volume, error, cuda = self.volumes[0], None, self.volumes[0].device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if name in FLOORS:
            step = self.floor.make(name)
            step(volume)
        else:
            made, step = self.step(name)
        held = torch.cuda.memory_allocated() - before if cuda and name == GRAPH else 0  # a captured graph keeps it
        if name not in FLOORS:
            mode = CODES[name][0]
            if mode not in self.known:
                self.known[mode] = self._expected(mode)
            found = self._outputs(made, step, volume)
            agreement = compare({name: found}, self.known[mode], TOLERANCE[self.group.dtype])[name]
            if agreement.reason is not None:
                raise _Refused(agreement.reason)
            error = agreement.error
        return _Ready(step, held + peak_bytes(step, volume), error)

    def _expected(self, mode: str) -> Any:
        """Of the reference: in float32 in inference, in the contenders' own dtype in training, for its memory."""
        host, volume, step = self.host, self.volumes[0], STEPS[self.group.step]
        if step == "inference":
            host, volume = copy.deepcopy(host).float(), volume.float()
        cell = Cell(self.group.model, self.group.dtype, self.group.volume, step, mode, codes.REFERENCE)
        made = network(cell, host, volume)
        found = self._outputs(made, step_of(step, made), volume)
        del made, host
        gc.collect()
        return found

    def _outputs(self, made: Network, step: Callable[[Tensor], Any], volume: Tensor) -> Any:
        """Features; in training the gradient that has passed through everything as well."""
        features = inference(made.run, volume)
        return features if self.group.step == "inference" else (*features, step(volume))


def main() -> int:
    from .gpu_parts import header, results_folder

    known = {"model": sorted({group.model for group in GROUPS}), "step": list(STEPS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in known.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    given = vars(parser.parse_args())
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    groups = [group for group in GROUPS if group.model in given["model"] and group.step in given["step"]]
    chosen = [one for name, every in known.items() if given[name] != every for one in given[name]]
    name, command = "-".join(["models", *chosen]).lower(), " ".join(["python -m benchmarks.gpu_models", *sys.argv[1:]])
    return run(groups, results_folder() / f"{name}.md", header(command), Part("models", float("inf")))


if __name__ == "__main__":
    sys.exit(main())
