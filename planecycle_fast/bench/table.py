"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]], words: int) -> list[str]:
    """Lines of a table: the first `words` columns to the left, numbers to the right; short rows end in empty cells."""
    lines = [_line(headings), _line(["---"] * words + ["---:"] * (len(headings) - words))]
    return lines + [_line([*row, *[""] * (len(headings) - len(row))]) for row in rows]


def _line(cells: Iterable[object]) -> str:
    return "|" + "".join([f" {cell} |" if cell != "" else " |" for cell in cells])
