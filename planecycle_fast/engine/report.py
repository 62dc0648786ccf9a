"""`LiftedModel.report`: what of each block runs by operations, by which backend, what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ..hosts.description import BlockDescription
from ..hosts.parts import WHOLE
from ..ops.activations.gelu import TANH_ERROR
from ..ops.activations.linear_gelu import row_for
from ..ops.choice import Choice
from .branches import plain_weights

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
    per_block = [_rows(block, choice) for block in blocks]
    found = []
    for described, alike in groupby(range(len(blocks)), lambda i: per_block[i]):
        first, *rest = alike
        numbers = f"{first}-{rest[-1]}" if rest else str(first)
        found += [ReportRow(numbers, *row) for row in described]
    return found


def _rows(block: BlockDescription, choice: Choice) -> list[tuple[str, str, str]]:
    kept: Mapping[str, str] = block.kept
    if (reason := kept.get("block")) is not None:
        why = reason if reason == WHOLE else f"block: {reason}"
        return [("planes", choice.plane_switch, ""), ("block", "the model's own", why)]
    described = []
    for op, names in PARTS.items():
        left = [name for name in names if name in kept]
        why = "; ".join([f"{name}: {kept[name]}" for name in left])
        if op == "attention":
            runs = f"rope: {choice.rope}, attention: {choice.attention}"
        elif op == "mlp":
            runs = choice.swiglu if left else _mlp(block, choice)
        else:
            runs = getattr(choice, op)
        whole = len(left) == len(names) and op != "plane_switch"
        described.append((op, "the model's own" if whole else runs, why))
    return described


def _mlp(block: BlockDescription, choice: Choice) -> str:
    """By what an MLP runs, and what the table of fc1 with GELU says."""
    if block.mlp.activation != "gelu" or choice.gelu == "exact":
        return choice.swiglu
    found = plain_weights(block)
    if choice.gelu == "tanh_epilogue":
        where = "fc1 + gelu" if found is not None else "gelu"
        return f"{where}: tanh_epilogue, off by up to {TANH_ERROR} from the exact one"
    if found is None:
        return "fc1, then gelu: torch's, static: fc1 is more than a weight and a bias"
    row = row_for(choice.device, *found[0].shape[::-1])
    return f"fc1 + gelu: triton, {row.why}" if row.wins else f"fc1, then gelu: torch's, {row.why}"


def table_of(blocks: Sequence[BlockDescription], choice: Choice) -> str:
    """The report as a table in plain text."""
    lines = [ReportRow("blocks", "part", "runs by", "left to the model, and why"), *rows(blocks, choice)]
    widths = [max([len(line[i]) for line in lines]) for i in range(3)]
    return "\n".join(
        ["  ".join([*[cell.ljust(width) for cell, width in zip(line, widths)], line[3]]).rstrip() for line in lines]
    )
