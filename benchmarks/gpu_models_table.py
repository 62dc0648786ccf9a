"""What `gpu_models.py` found as a table, and the bars that it is held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from planecycle_fast.bench.timing import Times

from .gpu_floor import FLOORS, PRODUCTS
from .gpu_groups import COMPILED, EAGER, GRAPH, GROUPS, OURS, SLICES, Group


class Row(NamedTuple):
    """One contender of a group: times and memory, or why there are none."""

    group: Group
    name: str
    times: Times | None = None
    peak: int = 0  # bytes above what lies there before
    error: float | None = None  # against the reference, of the largest value; floors compute nothing of use
    why: str = ""


class Bar(NamedTuple):
    """A ratio of two contenders of one group."""

    model: str
    dtype: str
    volume: str
    step: str
    other: str  # what it needs, divided by what
    ours: str  # needs,
    least: float  # must be so much
    of: str = "time"  # or "peak"


BEST = "products and best attention"  # the fastest of those floors
LARGE = {  # (model, volume): times of compiled and eager code over ours, in inference
    ("ViT-S", "8x32x512"): (1.35, 3.0), ("ViT-B", "8x32x512"): (1.28, 2.5), ("ViT-L", "4x32x512"): (None, 2.1),
}  # fmt: skip
TRAINED, SMALL = ("ViT-S", "bf16", "8x32x512", "training"), ("ViT-S", "bf16", "4x64x64")
BARS = [Bar(*TRAINED, COMPILED, OURS, 1.15), Bar(*TRAINED, EAGER, OURS, 2.2), Bar(*TRAINED, EAGER, OURS, 2.0, "peak"),
        Bar(*SMALL, "inference", EAGER, GRAPH, 6.0), Bar(*SMALL, "training", EAGER, GRAPH, 7.0)]  # fmt: skip
for (_model, _volume), (_compiled, _eager) in LARGE.items():
    _where = (_model, "bf16", _volume, "inference")
    BARS += [Bar(*_where, COMPILED, OURS, _compiled)] if _compiled else []
    BARS += [Bar(*_where, EAGER, OURS, _eager), Bar(*_where, SLICES, OURS, 1 / 1.03), Bar(*_where, BEST, OURS, 1 / 1.2)]
# Eager code is never slower than the authors'.
BARS += [Bar(*group[:4], EAGER, OURS, 1.0) for group in GROUPS if EAGER in group.names]


HEADINGS = ("model", "dtype", "volume", "step", "contender", "ms", "p20 to p80", "peak MiB", "error", "time / ours")


def text(rows: Sequence[Row]) -> str:
    """Every row, with its time against ours of the same group; then the bars."""
    ours = {row.group: row.times for row in rows if row.name == OURS}
    lines = [
        "Medians by turns, each call on another volume, caches flushed; peak: above weights and volume; error: of the",
        "largest value, against the reference (in float32; in training in the same dtype). Floors: `gpu_floor.py`.\n",
        f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- | --- | --- " + "| ---: " * 5 + "|",
    ]  # fmt: skip
    for row in rows:
        where = f"| {' | '.join(row.group[:4])} | {row.name} "
        if row.times is None:
            lines.append(f"{where}| not measured: {row.why} | | | | |")
            continue
        times, ratio = row.times, "not measured"
        if ours.get(row.group) is not None:
            ratio = f"{times.median / ours[row.group].median:.2f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        peak = "" if row.name in FLOORS else f"{row.peak / 2**20:,.0f}"
        spread = f"{times.p20 * 1e3:.2f} to {times.p80 * 1e3:.2f}"
        lines.append(f"{where}| {times.median * 1e3:.2f} | {spread} | {peak} | {error} | {ratio} |")
    return "\n".join([*lines, "", "Bars:", "", *bars(rows)]) + "\n"


def bars(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each bar: met, missed or not measured."""
    for bar in BARS:
        found = _ratio(bar, rows)
        shown = "not measured" if found is None else f"{found:.2f}, {'met' if found >= bar.least else '**missed**'}"
        where = ", ".join(bar[:4])
        yield f"- {where}: {bar.of} of {bar.other} / {bar.ours}: {shown} (bar {bar.least:.2f})"


def _ratio(bar: Bar, rows: Sequence[Row]) -> float | None:
    """Of the first group that has both; None without one."""
    for group in dict.fromkeys([row.group for row in rows if row.group[:4] == bar[:4]]):
        found = {row.name: _of(row, bar.of) for row in rows if row.group == group and row.times is not None}
        floors = [value for name, value in found.items() if name in FLOORS and name != PRODUCTS]
        found |= {BEST: min(floors)} if floors else {}
        if bar.other in found and bar.ours in found:
            return found[bar.other] / found[bar.ours]
    return None


def _of(row: Row, what: str) -> float:
    return row.times.median if what == "time" else row.peak
