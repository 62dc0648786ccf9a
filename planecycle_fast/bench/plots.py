"""Pictures of a sweep: time and memory against the size of the volume, and how near to the ceiling operations are."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..optional import require
from .cells import AUTHORS, FAST, MODES, REFERENCE, parse_volume
from .rows import MEASURED, Row

COLOURS = {"slice2d": "#4c78a8", "PCg": "#d62728", "PCm": "#ff9da6", "flatten3d": "#54a24b"}
NAMES = {"slice2d": "slice2d (2D, slice by slice)", "PCg": "PlaneCycle (PCg)", "PCm": "PlaneCycle (PCm)",
         "flatten3d": "flatten3d (one 3D sequence)"}  # fmt: skip
MARKERS = {"slice2d": "o", "PCg": "s", "PCm": "D", "flatten3d": "^"}
OTHERS = {REFERENCE: ("PlaneCycle (PCg), plain PyTorch", "x"), AUTHORS: ("PlaneCycle (PCg), the authors' code", "+")}


class Picture(NamedTuple):
    """A file, and what it shows."""

    path: Path
    title: str
    caption: str


class Point(NamedTuple):
    """One measured cell in a plot."""

    depth: int  # slices
    patches: int
    row: Row


def draw(rows: Sequence[Row], folder: Path) -> list[Picture]:
    """Writes all PNGs that these rows are enough for. Raises MissingPackageError without matplotlib."""
    require("matplotlib", "bench").use("Agg")
    made = []
    kinds = {(row["cell"]["model"], row["cell"]["dtype"]): None for row in rows if row["cell"]["mode"]}
    for model, dtype in kinds:
        series = _series(rows, model, dtype)
        if len(series.get(("PCg", FAST), ())) >= 2:
            made.append(_cost(series, model, dtype, folder, "seconds"))
            made.append(_cost(series, model, dtype, folder, "peak_bytes"))
    shares = folder / "ops.json"
    if shares.exists():
        made += _shares(json.loads(shares.read_text(encoding="utf-8")), rows[0] if rows else None, folder)
    return made


def _series(rows: Sequence[Row], model: str, dtype: str) -> dict[tuple[str, str], list[Point]]:
    """Inference at batch 1, by mode and code, small to large: at D = H = W tokens if there are two such sizes."""
    points: list[Point] = []
    for row in rows:
        cell, size = row["cell"], parse_volume(row["cell"]["volume"])
        wanted = (cell["model"], cell["dtype"], cell["step"], size.batch) == (model, dtype, "inference", 1)
        if wanted and cell["mode"] and row["status"] == MEASURED:
            points.append(Point(size.depth, size.patches, row))
    cubic = [point for point in points if point.depth**3 == point.patches]
    points = cubic if len({point.patches for point in cubic}) >= 2 else points
    found: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.patches):
        found.setdefault((point.row["cell"]["mode"], point.row["cell"]["code"]), []).append(point)
    return {key: of_one for key, of_one in found.items() if len(of_one) >= 2}


def _cost(series: Mapping[tuple[str, str], list[Point]], model: str, dtype: str, folder: Path, what: str) -> Picture:
    """Time or memory of each mode, log-log, with the law."""
    plt = require("matplotlib.pyplot", "bench")
    timed = what == "seconds"
    figure, axes = plt.subplots(1, 2 if timed else 1, figsize=(11.5 if timed else 7, 5.4), squeeze=False)
    left = axes[0][0]
    unit = 1e-3 if timed else 2**20
    for mode in MODES:
        if (points := series.get((mode, FAST))) is None:
            continue
        x, y = [p.patches for p in points], [p.row[what] / unit for p in points]
        left.plot(x, y, color=COLOURS[mode], marker=MARKERS[mode], label=NAMES[mode], zorder=3)
        if timed:
            low, high = ([p.row[name] / unit for p in points] for name in ("p20", "p80"))
            left.fill_between(x, low, high, color=COLOURS[mode], alpha=0.15, linewidth=0)
        elif all(["planned_bytes" in p.row for p in points]):
            planned = [p.row["planned_bytes"] / unit for p in points]
            left.plot(x, planned, color=COLOURS[mode], linestyle="none", marker=MARKERS[mode], markersize=12,
                      fillstyle="none", label=f"{NAMES[mode].split(' (')[0]}, predicted")  # fmt: skip
    for code, (name, marker) in OTHERS.items():
        if (points := series.get(("PCg", code))) is not None:
            left.plot([p.patches for p in points], [p.row[what] / unit for p in points], color="0.35",
                      linestyle=":", marker=marker, label=name)  # fmt: skip
    cycle = series[("PCg", FAST)]
    sizes = [p.patches for p in cycle]
    if timed:
        left.plot(sizes, [_times_depth(p) / unit for p in cycle], color="0.2", linestyle="--", linewidth=1.2, zorder=2,
                  label="D-fold law: PlaneCycle's time\nif its attention cost D times as much")  # fmt: skip
        _attention(axes[0][1], series)
    else:
        law = [cycle[-1].row[what] / unit * n / sizes[-1] for n in sizes]
        left.plot(sizes, law, color="0.2", linestyle="--", linewidth=1.2, label="in proportion to the volume")
    left.set_ylabel("time for one volume (ms)" if timed else "peak memory above weights and volume (MiB)")
    _finish(left, cycle, "measured time" if timed else "", "upper left" if timed else "lower right")
    stem = "time" if timed else "memory"
    title = f"{stem.capitalize()} against the size of the volume: {model}, {dtype}, inference"
    figure.suptitle(title, fontsize=13)
    path = _save(figure, folder / f"{stem}-{model.lower()}-{dtype}.png", cycle[-1].row)
    return Picture(path, title, _TIME if timed else _MEMORY)


_TIME = (
    "Left: measured time of one volume; bands are the 20th to 80th percentile. Where PlaneCycle lies on slice2d, it "
    "costs what plain 2D costs. Attention of flatten3d costs D times as much, D being the number of slices: the dashed "
    "line is PlaneCycle's measured time with that added in proportion to FLOPs, so where flatten3d should be. Right: "
    "FLOPs of attention alone, without the linear layers that all modes share; dashed are PlaneCycle's times D."
)
_MEMORY = (
    "Filled: measured. Hollow shapes around them: predicted by `planecycle_fast.cost.planning.plan` before it ran. The "
    "dashed line is in proportion to the volume. The D-fold law is of time, not memory, as attention keeps no scores."
)


def _times_depth(point: Point) -> float:
    """Seconds of a cell if its attention had D times the FLOPs."""
    row = point.row
    return row["seconds"] * (row["flops"] + (point.depth - 1) * row["attention_flops"]) / row["flops"]


def _attention(axis: Any, series: Mapping[tuple[str, str], list[Point]]) -> None:
    """FLOPs of attention of each mode, and the law."""
    from .laws import fit_exponent

    for mode in MODES:
        if (points := series.get((mode, FAST))) is None or mode == "PCm":  # PCm's are PCg's
            continue
        x, y = [p.patches for p in points], [p.row["attention_flops"] / 1e9 for p in points]
        power = fit_exponent([p.depth for p in points], y) if all([p.depth**3 == p.patches for p in points]) else None
        name = NAMES[mode].split(" (")[0] + ("" if power is None else f": $D^{{{power:.2f}}}$")
        style = {"markersize": 10, "fillstyle": "none"} if mode == "slice2d" else {}  # PlaneCycle's lie upon them
        axis.plot(x, y, color=COLOURS[mode], marker=MARKERS[mode], label=name, **style)
    cycle = series[("PCg", FAST)]
    law = [p.depth * p.row["attention_flops"] / 1e9 for p in cycle]
    axis.plot([p.patches for p in cycle], law, color="0.2", linestyle="--", linewidth=1.2, label="D times PlaneCycle's")
    axis.set_ylabel("FLOPs of attention (GFLOP)")
    _finish(axis, cycle, "arithmetic of attention alone", "upper left")


def _finish(axis: Any, points: Sequence[Point], title: str, legend: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([p.patches for p in points], [f"{p.patches:,}\n({p.depth} slices)" for p in points])
    axis.minorticks_off()
    ticker = require("matplotlib.ticker", "bench")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("patches in the volume (16 x 16 pixels of one slice each)")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8.5, loc=legend)


def _shares(stored: Mapping[str, Any], row: Row | None, folder: Path) -> list[Picture]:
    """How much of the ceiling each operation reaches, ours beside the others'."""
    plt = require("matplotlib.pyplot", "bench")
    found = [entry for entry in stored["rows"] if "share" in entry]
    groups = list(dict.fromkeys([entry["group"] for entry in found]))
    if not groups:
        return []
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.34 * len(groups)))
    for i, group in enumerate(reversed(groups)):
        for entry in [entry for entry in found if entry["group"] == group]:
            ours = entry["contender"] == "planecycle_fast"
            axis.plot(100 * entry["share"], i, "o" if ours else "x", color="#d62728" if ours else "0.45",
                      markersize=8 if ours else 6, zorder=3 if ours else 2)  # fmt: skip
    axis.set_yticks(range(len(groups)), list(reversed(groups)), fontsize=8)
    axis.axvline(100, color="0.2", linestyle="--", linewidth=1)
    axis.plot([], [], "o", color="#d62728", label="planecycle_fast")
    axis.plot([], [], "x", color="0.45", label="reference, compiled, others")
    axis.set_xlim(left=0)
    axis.set_xlabel("share of the ceiling (%): a copy's bandwidth, or a large matrix product's FLOP/s")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=8.5)
    title = "Operations: how near to what this machine can do"
    figure.suptitle(title, fontsize=13)
    path = _save(figure, folder / "ops.png", row, stored.get("about", ""))
    caption = "Each operation on each shape; the dashed line is the ceiling measured in the same run. Right is better."
    return [Picture(path, title, caption)]


def _save(figure: Any, path: Path, row: Row | None, about: str = "") -> Path:
    """Writes the picture with what it is of, as text below and within the file."""
    text = about or origin(row)
    figure.tight_layout(rect=(0, 0.07, 1, 0.98))
    below = textwrap.fill(text, int(figure.get_figwidth() * 15), break_on_hyphens=False)
    figure.text(0.01, 0.012, below, fontsize=7, color="0.35", va="bottom")
    figure.savefig(path, dpi=110, metadata={"Description": text})
    require("matplotlib.pyplot", "bench").close(figure)
    return path


def origin(row: Row) -> str:
    """Device, versions, commit, command and date of a row in one line."""
    here, stamp = row["environment"], row["stamp"]
    threads = f", {here['threads']} threads" if here["kind"] == "cpu" else ""
    return (
        f"{here['device']}{threads}; planecycle-fast {here['planecycle-fast version']} ({stamp['commit']}), "
        f"torch {here['torch version']}, triton {here['triton version']}, Python {here['python version']}; "
        f"{stamp['date']}; {stamp['command']}"
    )
