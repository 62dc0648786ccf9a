"""What was measured of operations as a table: every contender, how fast, how near the ceiling, or why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planecycle_fast.bench.report import NOT_MEASURED
from planecycle_fast.bench.table import markdown_table, with_unit

from .op_cells import OURS
from .op_measure import Result

HEADINGS = ("operation", "contender", "time", "p20 to p80", "rate", "of the ceiling", "time / ours")


def rows(results: Iterable[tuple[str, Mapping[str, Result]]]) -> list[tuple[str, ...]]:
    """Cells of the table, of (group, {contender: result})."""
    found = []
    for group, of_group in results:
        ours = of_group[OURS].times if OURS in of_group else None
        for name, result in of_group.items():
            if result.times is None:
                why = result.missing or f"REFUSED: {result.refused}"
                found.append((group, name, f"{NOT_MEASURED}: {why}", "", "", "", ""))
                continue
            ratio = NOT_MEASURED if ours is None else f"{result.times.median / ours.median:.2f}"
            median, p20, p80 = [with_unit(seconds, "s") for seconds in result.times[:3]]
            unit, info = "TFLOP/s" if "TFLOP/s" in result.info else "GB/s", result.info
            share = f"{info['share']:.0%}" + (f" ({info['note']})" if "note" in info else "")
            found.append((group, name, median, f"{p20} to {p80}", f"{info[unit]:.3g} {unit}", share, ratio))
    return found


def once(table: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with an operation's name in its first row only, to be read on a screen."""
    before, found = "", []
    for row in table:
        found.append(row if row[0] != before else ("", *row[1:]))
        before = row[0]
    return found


def markdown(results: Iterable[tuple[str, Mapping[str, Result]]]) -> str:
    """The table as Markdown, and what the ceilings are."""
    results = list(results)
    return "\n".join(markdown_table(HEADINGS, rows(results), 2)) + "\n\n" + ceilings(results)


def records(results: Iterable[tuple[str, Mapping[str, Result]]]) -> list[dict[str, Any]]:
    """One flat record for each contender: what was measured, or why it was not."""
    return [
        {"group": group, "contender": name, "missing": result.missing, "refused": result.refused} | result.info
        for group, of_group in results
        for name, result in of_group.items()
    ]


def ceilings(results: Iterable[tuple[str, Mapping[str, Result]]]) -> str:
    """The ceilings of these results, one a line."""
    infos = [result.info for _, of_group in results for result in of_group.values() if result.times is not None]
    found = {("a copy", "GB/s", i["ceiling"]) if "GB/s" in i else ("a matrix product", "TFLOP/s", i["ceiling"])
             for i in infos}  # fmt: skip
    return "".join([f"Ceiling: {what}, {value:.4g} {unit}, in the same run.\n" for what, unit, value in sorted(found)])
