"""Tables in Markdown, and numbers with units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]], words: int) -> list[str]:
    """Lines of a table: the first `words` columns to the left, numbers to the right; short rows end in empty cells."""
    lines = [_line(headings), _line(["---"] * words + ["---:"] * (len(headings) - words))]
    return lines + [_line([*row, *[""] * (len(headings) - len(row))]) for row in rows]


def _line(cells: Iterable[object]) -> str:
    return "|" + "".join([f" {cell} |" if cell != "" else " |" for cell in cells])


def with_unit(value: float, unit: str = "") -> str:
    """Three significant digits, with a prefix of the SI."""
    power = max(-2, min(5, math.floor(math.log10(value) / 3))) if value > 0 else 0
    return f"{value / 1000**power:.3g} {['u', 'm', '', 'k', 'M', 'G', 'T', 'P'][power + 2]}{unit}".strip()
