"""`LiftedModel.report`: what of each block runs by operations, by which backend, what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ..hosts.description import BlockDescription
from ..hosts.parts import WHOLE
from ..ops.choice import Choice

PARTS = {  # of a block: the operation, and the parts that it replaces
    "plane_switch": ("scale2", "norm1"),
    "attention": ("attention",),
    "add_norm": ("scale1", "norm2"),
    "mlp": ("mlp",),
}


class ReportRow(NamedTuple):
    """One part of one or more blocks."""

    blocks: str
    part: str
    runs: str  # by what
    why: str  # not otherwise; empty where all of it is replaced


def rows(blocks: Sequence[BlockDescription], choice: Choice) -> list[ReportRow]:
    """The report of a model's blocks, neighbours alike in one row."""
    per_block = [_rows(block.kept, choice) for block in blocks]
    found = []
    for described, alike in groupby(range(len(blocks)), lambda i: per_block[i]):
        first, *rest = alike
        numbers = f"{first}-{rest[-1]}" if rest else str(first)
        found += [ReportRow(numbers, *row) for row in described]
    return found


def _rows(kept: Mapping[str, str], choice: Choice) -> list[tuple[str, str, str]]:
    if (reason := kept.get("block")) is not None:
        why = reason if reason == WHOLE else f"block: {reason}"
        return [("planes", choice.plane_switch, ""), ("block", "the model's own", why)]
    described = []
    for op, names in PARTS.items():
        left = [name for name in names if name in kept]
        why = "; ".join([f"{name}: {kept[name]}" for name in left])
        if op == "attention":
            runs = f"rope: {choice.rope}, attention: {choice.attention}"
        else:
            runs = choice.swiglu if op == "mlp" else getattr(choice, op)
        whole = len(left) == len(names) and op != "plane_switch"
        described.append((op, "the model's own" if whole else runs, why))
    return described


def table_of(blocks: Sequence[BlockDescription], choice: Choice) -> str:
    """The report as a table in plain text."""
    lines = [ReportRow("blocks", "part", "runs by", "left to the model, and why"), *rows(blocks, choice)]
    widths = [max([len(line[i]) for line in lines]) for i in range(3)]
    return "\n".join(
        ["  ".join([*[cell.ljust(width) for cell, width in zip(line, widths)], line[3]]).rstrip() for line in lines]
    )
