"""Whole models by `planecycle_fast.bench`, group after group, into a table with bars: `cpu.py` and `gpu_models.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from planecycle_fast.bench.bars import Bar, bar_lines
from planecycle_fast.bench.cells import OURS, REFERENCE, Cell
from planecycle_fast.bench.measure import Effort, Hosts, measure_group
from planecycle_fast.bench.report import contender_name, milliseconds, times_table
from planecycle_fast.bench.rows import FAILED, MEASURED, OUT_OF_MEMORY, REFUSED, Row

from .budget import Part
from .part_table import PartTable


def run(
    groups: Sequence[Sequence[Cell]],
    bars: Sequence[Bar],
    path: Path,
    about: str,
    part: Part,
    effort: Effort,
    device: torch.device | str,
) -> int:
    """Writes all that is measured. Returns 1 if one of ours failed or a contender was refused; bars do not fail."""

    def text(rows: list[Row], note: str) -> str:
        return "\n".join([about, *times_table(rows), "\n## Bars\n", *bar_lines(bars, rows), "", note]).rstrip() + "\n"

    table, hosts = PartTable(part, {path: text}), Hosts(torch.device(device))
    for group in table.each((title(group), group) for group in groups):
        for row in measure_group(group, hosts, effort):
            table.add(row)
            found = f"{milliseconds(row['seconds'])} ms" if row["status"] == MEASURED else row["status"]
            print(f"  {contender_name(row['cell']['mode'], row['cell']['code'])}: {found}", flush=True)
    return int(any([_is_failure(row) for row in table.rows]))


def title(group: Sequence[Cell]) -> str:
    """Of a group, in words."""
    return ", ".join([*group[0].group, *(["compiled"] if any(["compiled" in cell.code for cell in group]) else [])])


def _is_failure(row: Row) -> bool:
    ours = row["cell"]["code"] in (*OURS, REFERENCE)
    return row["status"] == REFUSED or (ours and row["status"] in (FAILED, OUT_OF_MEMORY))
