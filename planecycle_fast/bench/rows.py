"""Results as rows of JSON, one a line, appended as they are made: an interrupted run loses what it was at, no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import Cell

MEASURED, OUT_OF_MEMORY, SKIPPED = "measured", "out of memory", "skipped: would not fit in memory"
REFUSED, FAILED, NOT_HERE = "refused: outputs differ", "failed", "not here"
LEFT_OUT = "left out: no time"
Row = dict[str, Any]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Writes one row at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()


def load(path: Path) -> list[Row]:
    """All rows of a file, none where there is no file; a last line that was cut off is left out.

    Raises ValueError for a file of something else.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            Cell(*[row["cell"][field] for field in Cell._fields])
        except (ValueError, KeyError, TypeError):
            if i == len(lines) - 1:  # without its end: the run was killed while it wrote
                break
            raise ValueError(
                f"{path} must hold rows of planecycle-fast bench, got in line {i + 1}: {line[:60]}"
            ) from None
        rows.append(row)
    return rows


def mend(path: Path) -> None:
    """Takes away a last line that was cut off, so that rows can be appended."""
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(**row["cell"])


def kept(rows: Sequence[Row], group: Sequence[Cell]) -> list[Row] | None:
    """The rows of a group that was measured before as a whole, in turns; None if it was not. The newest, if several."""
    together: dict[str, dict[Cell, Row]] = {}
    for row in rows:
        together.setdefault(row["group"], {})[cell_of(row)] = row
    for found in reversed(list(together.values())):
        if all([cell in found for cell in group]):
            return [found[cell] for cell in group]
    return None
