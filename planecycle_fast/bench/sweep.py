"""The sweep over all groups: what was measured before is kept, the rest is measured and written down cell by cell."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..optional import MissingPackageError, require
from . import rows as files
from .cells import DTYPES, PEERS, Cell, groups
from .contenders import vit
from .costs import free_bytes, is_out_of_memory, release
from .environment import environment, stamp
from .estimate import Estimator, measured
from .measure import Effort, Group
from .timing import ceiling_bandwidth, ceiling_flops


def sweep(
    cells: Sequence[Cell],
    device: torch.device,
    folder: Path,
    effort: Effort,
    command: str,
    limit: float | None = None,
) -> list[files.Row]:
    """The rows of all cells, in their order.

    Groups that `folder`/rows.jsonl has whole, of the same code, versions and device, are kept. Other rows in there
    stay where they are. With a `limit` of seconds groups run in the
    order of their estimated time, and those that would probably end later are left out.
    """
    began = perf_counter()
    path, here = folder / "rows.jsonl", environment(device)
    files.mend(path)
    before = files.of_environment(files.load(path), here, effort.name)
    todo, found, note = [], {}, ""
    for group in groups(cells):
        rows = files.kept(before, group)
        if rows is None:
            todo.append(group)
        else:
            found |= {files.cell_of(row): row for row in rows}
    if found:
        note = f"kept {len(found)} cells of an earlier run in {path}, {sum(map(len, todo))} to measure"
    if not todo:
        print(note, file=sys.stderr, flush=True)
    else:
        ceilings = {dtype: _ceilings(device, dtype) for dtype in {group[0].dtype for group in todo}}
        described = stamp(command)
        hosts = _Hosts(device)
        opening = f"{sum(map(len, todo))} cells: counting operations, and how fast this machine is"
        print(opening, file=sys.stderr, flush=True)
        estimator = Estimator(device, measured(device, DTYPES[todo[0][0].dtype]), effort)
        estimates = [estimator.seconds(group, ceilings[group[0].dtype]["ceiling_flops"]) for group in todo]
        if limit is not None:
            order = sorted(range(len(todo)), key=estimates.__getitem__)
            todo, estimates = [todo[i] for i in order], [estimates[i] for i in order]
        estimates = [seconds + estimator.once(group) for seconds, group in zip(estimates, todo)]
        with _shown(todo, estimates, note) as finished:
            first, done = perf_counter(), 0.0
            for group, estimate in zip(todo, estimates):
                now = perf_counter()
                pace = max(1.0, (now - first) / done) if done else 1.0  # of a machine slower than was thought
                in_time = limit is None or now - began + pace * estimate <= limit
                done += estimate if in_time else 0.0
                results = _measured(group, device, hosts, effort) if in_time else _left_out(group)
                made = {"group": uuid.uuid4().hex[:12], "effort": effort.name, "environment": here, "stamp": described}
                for cell in group:
                    row = {"cell": cell._asdict(), **results[cell], **ceilings[cell.dtype], **made}
                    if in_time:
                        files.append(path, row)
                    found[cell] = row
                finished(group, results)
    return [found[cell] for cell in cells]


def _left_out(group: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    return {cell: {"status": files.LEFT_OUT, "reason": ""} for cell in group}


def _measured(group: Sequence[Cell], device: torch.device, hosts: _Hosts, effort: Effort) -> dict[Cell, dict[str, Any]]:
    """Results by cell; where not even the weights and volumes fit, they say so."""
    try:
        host = None if group[0].model in PEERS else hosts.of(group[0])
        with torch._dynamo.config.patch(recompile_limit=64):  # one per contender
            return Group(group, device, host).measure(effort)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {cell: {"status": files.OUT_OF_MEMORY, "reason": "of weights and volumes"} for cell in group}
    except MissingPackageError as error:
        return {cell: {"status": files.NOT_HERE, "reason": str(error)} for cell in group}
    finally:
        if any(["compiled" in cell.code for cell in group]):
            torch._dynamo.reset()
        release(device)


class _Hosts:
    """The model of the groups that are measured now: made once, gone before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.key, self.host = device, None, None

    def of(self, cell: Cell) -> nn.Module:
        key = cell.model, cell.dtype
        if key != self.key:
            self.key = self.host = None
            release(self.device)
            dtype = DTYPES[cell.dtype]
            needed = sum([p.numel() for p in vit(cell.model, "meta", dtype).parameters()]) * dtype.itemsize
            free = free_bytes(self.device)
            if free is not None and needed > free:
                raise MemoryError(f"weights of {needed} bytes, {free} free")
            self.host, self.key = vit(cell.model, self.device, dtype), key
        return self.host


def _ceilings(device: torch.device, dtype: str) -> dict[str, float]:
    return {
        "ceiling_flops": ceiling_flops(device, DTYPES[dtype]),
        "ceiling_bandwidth": ceiling_bandwidth(device),
    }


@contextmanager
def _shown(
    todo: Sequence[Sequence[Cell]], estimates: Sequence[float], note: str
) -> Iterator[Callable[[Sequence[Cell], dict], None]]:
    """A bar with the time left where stderr is a terminal and rich is there; a line for each group where not."""
    cells = sum(map(len, todo))
    opening = f"{cells} cells in {len(todo)} groups, about {_duration(sum(estimates))}"
    print(f"{note}\n{opening}" if note else opening, file=sys.stderr, flush=True)
    remaining, began = dict(zip([group[0].group for group in todo], estimates)), perf_counter()

    def left(group: Sequence[Cell]) -> str:
        """In words, once a group is finished, at the pace of those that are."""
        del remaining[group[0].group]
        pace = (perf_counter() - began) / (sum(estimates) - sum(remaining.values()))
        return f"about {_duration(pace * sum(remaining.values()))} left"

    try:
        progress = require("rich.progress", "bench") if sys.stderr is not None and sys.stderr.isatty() else None
    except MissingPackageError:
        progress = None
    if progress is None:

        def line(group: Sequence[Cell], results: dict) -> None:
            print(f"{_title(group)}: {_outcome(results)}; {left(group)}", file=sys.stderr, flush=True)

        yield line
        return
    console = require("rich.console", "bench").Console(stderr=True)
    bars = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[left]}"), console=console, transient=True,
    )  # fmt: skip
    with bars:
        begin = f"about {_duration(sum(estimates))} left"
        task = bars.add_task(_title(todo[0]), total=sum(estimates), left=begin)
        names = [_title(group) for group in todo[1:]]

        def advance(group: Sequence[Cell], results: dict) -> None:
            bars.advance(task, remaining[group[0].group])
            bars.update(task, description=names.pop(0) if names else "done", left=left(group))

        yield advance


def _title(group: Sequence[Cell]) -> str:
    model, dtype, volume, step = group[0].group
    return f"{model}, {volume}, {dtype}, {step}"


def _outcome(results: dict[Cell, dict[str, Any]]) -> str:
    by_status: dict[str, int] = {}
    for result in results.values():
        by_status[result["status"]] = by_status.get(result["status"], 0) + 1
    return ", ".join([f"{number} {status}" for status, number in by_status.items()])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
