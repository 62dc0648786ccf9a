"""`LiftedModel.report`: what of each block runs by operations, by which backend, what does not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..hosts.parts import WHOLE, Plan
from ..runtime.backends import choose

PARTS = {  # of a block: the operation, and the parts that it replaces
    "plane_switch": ("scale2", "norm1"),
    "attention": ("attention",),
    "add_norm": ("scale1", "norm2"),
    "mlp": ("mlp",),
}


class Row(NamedTuple):
    """One part of one or more blocks."""

    blocks: str
    part: str
    runs: str  # by what
    why: str  # not otherwise; empty where all of it is replaced


def rows(plans: Sequence[Plan], backend: str, attention: str, strict: bool, device: torch.device) -> list[Row]:
    """The report of a model's blocks, neighbours alike in one row."""
    per_block = [_rows(plan, backend, attention, strict, device) for plan in plans]
    found, start = [], 0
    for i, described in enumerate(per_block):
        if i + 1 < len(per_block) and per_block[i + 1] == described:
            continue
        blocks = str(start) if start == i else f"{start}-{i}"
        found += [Row(blocks, *row) for row in described]
        start = i + 1
    return found


def _rows(plan: Plan, backend: str, attention: str, strict: bool, device: torch.device) -> list[tuple[str, str, str]]:
    def chosen(op: str) -> str:
        return choose(backend, device, op, strict)

    if plan.block is not None:
        why = plan.block if plan.block == WHOLE else f"block: {plan.block}"
        return [("planes", chosen("plane_switch"), ""), ("block", "the model's own", why)]
    reasons, described = plan.reasons(), []
    for op, names in PARTS.items():
        kept = [name for name in names if name in reasons]
        why = "; ".join([f"{name}: {reasons[name]}" for name in kept])
        if op == "attention":
            runs = "sdpa" if attention == "auto" else attention
            runs = f"rope: {chosen('rope')}, attention: {runs}"
        else:
            runs = chosen("gelu" if op == "mlp" else op)
        whole = len(kept) == len(names) and op != "plane_switch"
        described.append((op, "the model's own" if whole else runs, why))
    return described


def describe(plans: Sequence[Plan], backend: str, attention: str, strict: bool, device: torch.device) -> str:
    """The report as a table in plain text."""
    table = rows(plans, backend, attention, strict, device)
    lines = [Row("blocks", "part", "runs by", "left to the model, and why"), *table]
    widths = [max([len(line[i]) for line in lines]) for i in range(3)]
    return "\n".join(
        ["  ".join([*[cell.ljust(width) for cell, width in zip(line, widths)], line[3]]).rstrip() for line in lines]
    )
