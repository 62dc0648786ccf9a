"""Bars: what the times, or the memory, of two cells that took turns have to be in proportion to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .cells import FLOORS, PRODUCTS
from .report import NOT_MEASURED, STEP_NAMES, contender_name
from .rows import MEASURED, Row

WORDS = {"seconds": "time", "peak_bytes": "peak"}
BEST = ("PCg", "products and best attention")  # the fastest of a group's floors that attend


class Bar(NamedTuple):
    """A ratio of two cells of one group, and the least that it must be."""

    where: tuple[str, str, str, str]  # of `Cell.group`: model, dtype, volume, step
    other: tuple[str, str]  # mode and code of what takes so much,
    ours: tuple[str, str]  # divided by what this takes
    least: float
    of: str = "seconds"  # or "peak_bytes"


def bar_lines(bars: Sequence[Bar], rows: Sequence[Row]) -> Iterator[str]:
    """A line for each bar: met, missed or not measured."""
    for bar in bars:
        found = _ratio(bar, rows)
        shown = NOT_MEASURED if found is None else f"{found:.2f}, {'met' if found >= bar.least else '**missed**'}"
        where = ", ".join([*bar.where[:3], STEP_NAMES[bar.where[3]]])
        names = f"{contender_name(*bar.other)} / {contender_name(*bar.ours)}"
        yield f"- {where}: {WORDS[bar.of]} of {names}: {shown} (bar {bar.least:.2f})"


def _ratio(bar: Bar, rows: Sequence[Row]) -> float | None:
    """Of the first cells that were measured in turns and are both there; None without them."""
    turns: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        model, dtype, volume, step, *contender = row["cell"].values()
        if (model, dtype, volume, step) == bar.where and row["status"] == MEASURED and bar.of in row:
            turns.setdefault(row["group"], {})[tuple(contender)] = row[bar.of]
    for found in turns.values():
        floors = [value for (_, code), value in found.items() if code in FLOORS and code != PRODUCTS]
        found |= {BEST: min(floors)} if floors else {}
        if bar.other in found and bar.ours in found:
            return found[bar.other] / found[bar.ours]
    return None
