"""The sweep over all groups: what was measured before is kept, the rest is measured and written down cell by cell."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

from ..optional import MissingPackageError, require
from . import rows as files
from .cells import DTYPES, Cell, groups
from .environment import environment_of, stamp
from .estimate import Estimator, measured
from .measure import Effort, Hosts, measure_group
from .timing import ceiling_bandwidth, ceiling_flops


def run_sweep(
    cells: Sequence[Cell],
    device: torch.device,
    folder: Path,
    effort: Effort,
    command: str,
    limit: float | None = None,
) -> list[files.Row]:
    """The rows of all cells, in their order.

    Groups that `folder`/rows.jsonl has whole, of the same code, versions and device, are kept. Other rows in there
    stay where they are. With a `limit` of seconds groups run in the order of their estimated time, and those that
    would probably end later are left out.
    """
    began = perf_counter()
    path, here = folder / "rows.jsonl", environment_of(device)
    files.mend(path)
    before = [row for row in files.load(path) if (row["environment"], row["effort"]) == (here, effort.name)]
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
        hosts = Hosts(device)
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
                rows = measure_group(group, hosts, effort) if in_time else _left_out(group)
                for row in rows:
                    row |= ceilings[group[0].dtype] | {"environment": here, "stamp": described}
                    if in_time:
                        files.append(path, row)
                    found[files.cell_of(row)] = row
                finished(group, rows)
    return [found[cell] for cell in cells]


def _left_out(group: Sequence[Cell]) -> list[files.Row]:
    return [{"cell": cell._asdict(), "status": files.LEFT_OUT, "reason": "", "group": ""} for cell in group]


def _ceilings(device: torch.device, dtype: str) -> dict[str, float]:
    return {"ceiling_flops": ceiling_flops(device, DTYPES[dtype]), "ceiling_bandwidth": ceiling_bandwidth(device)}


@contextmanager
def _shown(
    todo: Sequence[Sequence[Cell]], estimates: Sequence[float], note: str
) -> Iterator[Callable[[Sequence[Cell], Sequence[files.Row]], None]]:
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

        def line(group: Sequence[Cell], rows: Sequence[files.Row]) -> None:
            print(f"{_title(group)}: {_outcome(rows)}; {left(group)}", file=sys.stderr, flush=True)

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

        def advance(group: Sequence[Cell], rows: Sequence[files.Row]) -> None:
            bars.advance(task, remaining[group[0].group])
            bars.update(task, description=names.pop(0) if names else "done", left=left(group))

        yield advance


def _title(group: Sequence[Cell]) -> str:
    model, dtype, volume, step = group[0].group
    return f"{model}, {volume}, {dtype}, {step}"


def _outcome(rows: Sequence[files.Row]) -> str:
    return ", ".join([f"{number} {status}" for status, number in Counter([row["status"] for row in rows]).items()])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
