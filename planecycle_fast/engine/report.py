"""`LiftedModel.report`: what of each block runs by operations, by which backend, what does not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from textwrap import shorten
from typing import NamedTuple

import torch

from ..hosts.description import BlockDescription
from ..hosts.parts import WHOLE
from ..ops.activations.gelu import TANH_ERROR
from ..ops.activations.linear_gelu import DTYPES, row_for
from ..ops.activations.linear_gelu_table import LEAST_ROWS
from ..ops.choice import Choice
from ..runtime.attention_table import TABLE, told_range
from ..runtime.attentions import AttentionCall
from .branches import plain_weights

PARTS = {  # of a block: the operation, and the parts that it replaces
    "plane_switch": ("scale2", "norm1"),
    "attention": ("attention",),
    "add_norm": ("scale1", "norm2"),
    "mlp": ("mlp",),
}
SHOWN = 90  # characters of a reason


class ReportRow(NamedTuple):
    """One part of one or more blocks."""

    blocks: str
    part: str
    runs: str  # by what
    why: str  # not otherwise; empty where all of it is replaced


def rows(
    blocks: Sequence[BlockDescription], choice: Choice, training: bool = False, tokens: int | None = None
) -> list[ReportRow]:
    """The report of a model's blocks, neighbours alike in one row; of so many tokens, or of many."""
    per_block = [_rows(block, choice, training, tokens) for block in blocks]
    found = []
    for described, alike in groupby(range(len(blocks)), lambda i: per_block[i]):
        first, *rest = alike
        numbers = f"{first}-{rest[-1]}" if rest else str(first)
        found += [ReportRow(numbers, *row) for row in described]
    return found


def _rows(block: BlockDescription, choice: Choice, training: bool, tokens: int | None) -> list[tuple[str, str, str]]:
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
            runs = choice.swiglu if left else _mlp(block, choice, training, tokens)
        else:
            runs = getattr(choice, op)
        whole = len(left) == len(names) and op != "plane_switch"
        described.append((op, "the model's own" if whole else runs, why))
    return described


def _mlp(block: BlockDescription, choice: Choice, training: bool, tokens: int | None) -> str:
    """By what an MLP runs, and what the table of fc1 with GELU says; `branches` decides by the same."""
    if block.mlp.activation != "gelu" or choice.gelu == "exact":
        return choice.swiglu
    weights, why_not = plain_weights(block), None
    if training or choice.autocast is not None:
        why_not = "in training" if training else "under autocast"
    elif weights is None:
        why_not = "fc1 is more than a weight and a bias"
    if choice.gelu == "tanh_epilogue":
        where = "fc1 + gelu" if why_not is None else "gelu"
        return f"{where}: tanh_epilogue, off by up to {TANH_ERROR} from the exact one"
    if weights is not None and why_not is None:
        weight, _ = weights
        row = row_for(choice.device, *weight.shape[::-1])
        if weight.dtype not in DTYPES:
            why_not = f"of {str(weight.dtype).removeprefix('torch.')}"
        elif tokens is not None and tokens < LEAST_ROWS:
            why_not = f"fewer than {LEAST_ROWS:,} rows"
        elif row.wins:
            return f"fc1 + gelu: triton, from {LEAST_ROWS:,} rows on, {row.why}"
        else:
            why_not = row.why
    return f"fc1, then gelu: torch's, {why_not}"


def table_of(
    blocks: Sequence[BlockDescription],
    choice: Choice,
    dtype: torch.dtype | None = None,
    training: bool = False,
    planes: Mapping[str, tuple[int, int]] | None = None,
) -> str:
    """The report as a table in plain text; below it, where attention is chosen by sizes, what is chosen and why.

    Args:
        dtype: of the model's parameters; None: it has none.
        planes: sequences and rows along each plane, of a volume; None: any number of rows.
    """
    tokens = None if planes is None else max([sequences * rows for sequences, rows in planes.values()])
    table = _table(rows(blocks, choice, training, tokens))
    dtype = dtype if choice.autocast is None else choice.autocast
    shapes = {shape for block in blocks if (shape := _heads(block)) is not None}
    if choice.attention != "auto" or dtype is None or len(shapes) != 1:
        return table
    [(heads, head_dim)] = shapes
    step = "training" if training else "inference"
    title = f"attention, {str(dtype).removeprefix('torch.')}, head dimension {head_dim}, {step}:"
    call = AttentionCall(dtype, None, None, heads, head_dim, training)
    lines = [f"  {where}: {what}" for where, what in _attentions(choice, call, planes)]
    return "\n".join([table, title, *lines, "  (all of the table, with times: docs/attention-table.md)"])


def _heads(block: BlockDescription) -> tuple[int, int] | None:
    """Heads and their dimension, where attention runs by operations."""
    if block.why_not_attention is not None:
        return None
    channels, heads = getattr(block.attention.qkv[0], "in_features", None), block.attention.heads
    return None if channels is None else (heads, channels // heads)


def _attentions(
    choice: Choice, call: AttentionCall, planes: Mapping[str, tuple[int, int]] | None
) -> Iterator[tuple[str, str]]:
    """Rows of sequences, or a plane, and what is chosen for them; neighbours alike in one."""
    if planes is not None:
        same: dict[tuple[int, str], list[str]] = {}
        for name, (sequences, rows) in planes.items():
            what = _chosen(choice, call._replace(sequences=sequences, rows=rows))
            same.setdefault((rows, what), []).append(name)
        yield from [(f"{', '.join(names)}, {rows} rows", what) for (rows, what), names in same.items()]
        return
    ends = {limit for row in TABLE for limit in (row.rows[0] - 1, row.rows[1]) if limit is not None}
    starts = [1, *[end + 1 for end in sorted(ends) if end > 0]]
    found = [_chosen(choice, call._replace(rows=start)) for start in starts]
    for what, alike in groupby(range(len(starts)), lambda i: found[i]):
        first, *_, last = [*alike] * 2
        after = starts[last + 1] - 1 if last + 1 < len(starts) else None
        yield f"rows: {told_range((starts[first], after))}", what


def _chosen(choice: Choice, call: AttentionCall) -> str:
    """What is chosen, why, and what else where sizes repeat."""
    first, again = [replace(choice, repeats=repeats).attention_for(call, plain=True) for repeats in (False, True)]
    more = "" if again == first else f"; once sizes repeat {again.attention} ({_short(again.why)})"
    return f"{first.attention} ({_short(first.why)}){more}"


def _short(why: str) -> str:
    return shorten(why, SHOWN, placeholder=" ...")


def _table(found: Sequence[ReportRow]) -> str:
    lines = [ReportRow("blocks", "part", "runs by", "left to the model, and why"), *found]
    widths = [max([len(line[i]) for line in lines]) for i in range(3)]
    return "\n".join(
        ["  ".join([*[cell.ljust(width) for cell, width in zip(line, widths)], line[3]]).rstrip() for line in lines]
    )
