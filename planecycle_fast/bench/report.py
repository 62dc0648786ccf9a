"""The rows of a sweep as Markdown that can be read without knowing the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .cells import CODE_NAMES, CODES, FAST, GLOBALS, PEER, parse_volume
from .laws import CUBES, DEPTHS, FIXED, fit_exponent, fit_laws
from .plots import Picture, origin
from .rows import MEASURED, Row
from .table import markdown_table

NOT_MEASURED = "not measured"
WHERE = ("network", "dtype", "volume", "step")
STEP_NAMES = {"inference": "inference", "probe": "linear probe", "finetune": "fine-tuning"}

EXPLAINED = """\
A 2D vision transformer (DINOv3, patches of 16 x 16 pixels, random weights) runs on volumes in three ways, with the same
weights:

- **slice2d**: every slice by itself, as 2D networks do. Slices know nothing of each other.
- **PlaneCycle**: layer after layer looks along another plane (axial, coronal, sagittal, axial, ...). PCg and PCm are
  its two ways of passing class and register tokens from plane to plane.
- **flatten3d**: all patches of the volume in one long sequence. Attention costs D times as much (D slices).

Each is run by **planecycle_fast** (this package), by **plain PyTorch** (its reference) and, where it was there, by the
**authors' code**. A volume "1x14x224" is a batch of 1 with 14 slices of 224 x 224 pixels. *Inference* gives patch
features; a *linear probe* step also trains a linear head on them; *fine-tuning* is forward and backward of the whole
network. There is no optimiser in either.

Outputs (and gradients) of all implementations were compared with the reference's in float32 before anything was timed.
Times are medians of calls that took turns, synchronised, on volumes that change from call to call. Memory is the peak
above weights and volume.
"""


def report_of(rows: Sequence[Row], pictures: Sequence[Picture], notes: Sequence[str] = ()) -> str:
    """All of it: what was measured, where we win and lose, pictures, every cell."""
    newest = max(rows, key=lambda row: row["stamp"]["date"])
    lines = [f"# PlaneCycle, measured: {newest['environment']['device']}", "", *_header(rows), "", EXPLAINED]
    lines += [note + "\n" for note in notes]
    lines += ["## planecycle_fast against the other implementations", "", *_against_codes(rows), ""]
    lines += ["## PlaneCycle against 2D, 3D and other networks", "", *_against_modes(rows), ""]
    for picture in pictures:
        lines += [f"![{picture.title}]({picture.path.name})", "", f"*{picture.caption}*", ""]
    lines += ["## How cost grows", "", *_growth(rows), ""]
    lines += ["## Predicted and counted", "", *_predicted(rows), ""]
    lines += ["## Every cell", "", *_every(rows), ""]
    lines += _left_out(rows)
    return "\n".join(lines).rstrip() + "\n"


def _header(rows: Sequence[Row]) -> list[str]:
    """Where and of what: one line for every run that rows are of."""
    runs = {origin(row): row for row in rows}
    lines = [f"- {text.replace('; ' + row['stamp']['command'], '')}; `{row['stamp']['command']}`"
             for text, row in runs.items()]  # fmt: skip
    ceilings = {(row["cell"]["dtype"], row["ceiling_flops"], row["ceiling_bandwidth"]) for row in rows}
    for dtype, product, copy in sorted(ceilings):
        lines.append(f"- ceilings in {dtype}, measured in the same run: a large matrix product {product / 1e9:,.0f} "
                     f"GFLOP/s, a copy {copy / 1e9:,.1f} GB/s")  # fmt: skip
    return lines


def _key(row: Row) -> tuple:
    """Cell and run: only what was timed in turns is divided."""
    cell = row["cell"]
    return row["group"], cell["mode"], cell["code"]


def _times(rows: Sequence[Row]) -> dict[tuple, float]:
    return {_key(row): row["seconds"] for row in rows if row["status"] == MEASURED}


def _against_codes(rows: Sequence[Row]) -> list[str]:
    """Per mode and volume: our time, and how many times longer the others took."""
    times = _times(rows)
    codes = [code for code in CODES if code != FAST and any([row["cell"]["code"] == code for row in rows])]
    found = []
    for row in rows:
        cell = row["cell"]
        others = [times.get((row["group"], cell["mode"], code)) for code in codes]
        if cell["code"] == FAST and any(others):
            ours = times.get(_key(row))
            found.append([*_where(row), cell["mode"], milliseconds(ours), *_ratios(ours, others)])
    return [
        "Time of planecycle_fast, then how many times as long the others took for the same. **Bold**: they are faster.",
        "",
        *markdown_table([*WHERE, "mode", "ms", *[CODE_NAMES[code] for code in codes]], found, 5),
    ]


def _against_modes(rows: Sequence[Row]) -> list[str]:
    """Per volume: PlaneCycle's time, and that of slice2d and flatten3d by the same code; then other networks."""
    times = _times(rows)
    ours = [row for row in rows if (row["cell"]["mode"], row["cell"]["code"]) == ("PCg", FAST)]
    found = []
    for row in ours:
        others = [times.get((row["group"], mode, FAST)) for mode in ("slice2d", "flatten3d")]
        found.append([*_where(row), milliseconds(times.get(_key(row))), *_ratios(times.get(_key(row)), others)])
    lines = [
        "Time of PlaneCycle (PCg) by planecycle_fast, then how many times as long the others took. **Bold**: they are "
        "faster.",
        "",
        *markdown_table([*WHERE, "ms", "slice2d", "flatten3d"], found, 4),
    ]
    peers = [row for row in rows if row["cell"]["code"] == PEER and row["status"] == MEASURED]
    vits = list(dict.fromkeys([row["cell"]["model"] for row in ours]))
    if not peers or not vits:
        return lines
    found = []
    for row in peers:
        same = {name: row["cell"][name] for name in ("dtype", "volume", "step")}
        of_vits = [[one for one in ours if one["cell"] == one["cell"] | same | {"model": vit}] for vit in vits]
        ratios = [_ratios(times.get(_key(one[0])), [row["seconds"]])[0] if one else NOT_MEASURED for one in of_vits]
        found.append([*_where(row), milliseconds(row["seconds"]), *ratios])
    return [
        *lines,
        "",
        "Other networks on the same volumes, in the same run. They compute something else; they are what one might "
        "use instead. Their time, then how many times as long they took as PlaneCycle (PCg).",
        "",
        *markdown_table([*WHERE, "ms", *[f"/ {vit}" for vit in vits]], found, 4),
    ]


def _ratios(ours: float | None, others: Sequence[float | None]) -> list[str]:
    """How many times as long others took; in bold where they are faster."""
    return [NOT_MEASURED if None in (ours, other) else bold_below_one(other / ours) for other in others]


def bold_below_one(ratio: float) -> str:
    """Two digits, in bold where they are less than 1.00."""
    return f"{ratio:.2f}" if ratio >= 0.995 else f"**{ratio:.2f}**"


def _growth(rows: Sequence[Row]) -> list[str]:
    models = list(dict.fromkeys([row["cell"]["model"] for row in rows if row["cell"]["mode"]]))
    if not models:
        return [f"{NOT_MEASURED}: no vision transformer was asked for."]
    found = {law.mode: law for law in fit_laws(models[0], ("slice2d", "PCg", "flatten3d"))}
    lines = [
        f"Exponents p of cost ~ D^p, least squares of logarithms. FLOPs are counted by torch.utils.flop_counter for "
        f"{models[0]}: at D = H = W = {CUBES[0]} to {CUBES[-1]} tokens, and at H = W = {FIXED} tokens for D = "
        f"{DEPTHS[0]} to {DEPTHS[-1]}. Times are those measured above, at D = H = W.",
        "",
    ]
    lines += markdown_table(
        ["mode", "attention's FLOPs, D = H = W", "attention's FLOPs, H and W fixed", "time, D = H = W"],
        [[mode, f"{law.cubes:.2f}", f"{law.depths:.2f}", _time_exponent(rows, models[0], mode)]
         for mode, law in found.items()], 1,
    )  # fmt: skip
    ratios = [b / a for a, b in zip(found["PCg"].attention, found["flatten3d"].attention)]
    each = ", ".join([f"{ratio:.1f} at D = {n}" for n, ratio in zip(CUBES, ratios)])
    lines += [
        "",
        f"Attention of flatten3d over PlaneCycle's: {each}: **D-fold**, ratio ~ D^{fit_exponent(CUBES, ratios):.2f}. "
        "(Class and register tokens, 5 to a slice, make it a little less.)",
    ]
    return lines


def _time_exponent(rows: Sequence[Row], model: str, mode: str) -> str:
    points = []
    for row in rows:
        cell, size = row["cell"], parse_volume(row["cell"]["volume"])
        same = (cell["model"], cell["mode"], cell["code"], cell["step"]) == (model, mode, FAST, "inference")
        if same and size.batch == 1 and size.depth**3 == size.patches and row["status"] == MEASURED:
            points.append((size.depth, row["seconds"]))
    if len({depth for depth, _ in points}) < 2:
        return NOT_MEASURED
    return f"{fit_exponent(*zip(*points)):.2f}"


def _predicted(rows: Sequence[Row]) -> list[str]:
    """How well `plan` foresaw memory and FLOPs."""
    both = [row for row in rows if row["status"] == MEASURED and "planned_bytes" in row]
    if not both:
        return [f"{NOT_MEASURED}."]
    worst = max(both, key=lambda row: abs(row["planned_bytes"] / row["peak_bytes"] - 1))
    off = abs(worst["planned_bytes"] / worst["peak_bytes"] - 1)
    lines = [
        f"`planning.plan` foresaw the peak memory of {len(both)} cells before they ran; it is furthest off in "
        f"{', '.join(_where(worst))}, {worst['cell']['mode']}, {CODE_NAMES[worst['cell']['code']]}: "
        f"{worst['planned_bytes'] / 2**20:.1f} MiB predicted, {worst['peak_bytes'] / 2**20:.1f} measured, {off:.1%}."
    ]
    for step in STEP_NAMES:
        errors = [abs(row["planned_flops"] / row["flops"] - 1) for row in both if row["cell"]["step"] == step]
        if errors:
            lines.append(f"Its FLOPs of {STEP_NAMES[step]} differ from torch.utils.flop_counter's by {max(errors):.2%} "
                         "at most.")  # fmt: skip
    return lines


def _every(rows: Sequence[Row]) -> list[str]:
    return [
        "Rows are patches and the class and register tokens of every slice. GFLOP/s are what has to be computed, over "
        "the time; the share is of the large matrix product. Launches are kernels and copies handed to a GPU; on a CPU "
        "operations that torch was asked for. Moved: what these read and write, weights too, as often as they do: on a "
        "CPU planecycle_fast runs groups of sequences one after another, which takes more operations and less memory.",
        "",
        *cells_table(rows, EVERYTHING),
    ]


def cells_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> list[str]:
    """Every cell: what it is, and what `columns` say of those that were measured; of others why they were not."""
    found = []
    for row in rows:
        values = [value(row) for value in columns.values()] if row["status"] == MEASURED else [row["status"]]
        found.append([*_where(row), row["cell"]["mode"], _code_name(row["cell"]["code"]), *values])
    return markdown_table([*WHERE, "mode", "implementation", *columns], found, len(WHERE) + 2)


def _rows_per_second(row: Row) -> str:
    size = parse_volume(row["cell"]["volume"])
    rows = size.batch * (size.patches + GLOBALS * size.depth)
    return f"{rows / row['seconds']:,.0f}" if row["cell"]["mode"] else ""


def _figure(name: str, unit: float, form: str, otherwise: str = NOT_MEASURED) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / unit:{form}}" if name in row else otherwise


TIME = {
    "ms (p20 to p80)": lambda row: (
        f"{milliseconds(row['seconds'])} ({milliseconds(row['p20'])} to {milliseconds(row['p80'])})"
    )
}
EVERYTHING = TIME | {
    "volumes/s": lambda row: f"{parse_volume(row['cell']['volume']).batch / row['seconds']:.3g}",
    "rows/s": _rows_per_second,
    "GFLOP/s": lambda row: f"{row['flops'] / row['seconds'] / 1e9:,.0f}",
    "share": lambda row: f"{row['flops'] / row['seconds'] / row['ceiling_flops']:.0%}",
    "peak MiB": _figure("peak_bytes", 2**20, ".1f"),
    "predicted": _figure("planned_bytes", 2**20, ".1f", ""),
    "launches": _figure("launches", 1, ",.0f"),
    "moved GB": _figure("moved_bytes", 1e9, ".2f"),
}


def times_table(rows: Sequence[Row]) -> list[str]:
    """Every cell by time and memory alone, against PlaneCycle (PCg) by planecycle_fast in the same turns."""
    ours = {group: seconds for (group, mode, code), seconds in _times(rows).items() if (mode, code) == ("PCg", FAST)}
    return [
        "Medians by turns, each call on another volume, on a GPU with caches flushed; peak: above weights and volume;",
        "error: of the largest value, against the reference. Floors: `planecycle_fast/bench/floor.py`.",
        "",
        *cells_table(rows, TIME | {
            "peak MiB": _figure("peak_bytes", 2**20, ",.0f", ""), "error": _figure("error", 1, ".1e", ""),
            "time / ours": lambda row: f"{row['seconds'] / ours[row['group']]:.2f}" if row["group"] in ours else "",
        }),
        "",
        *_left_out(rows),
    ]  # fmt: skip


def _left_out(rows: Sequence[Row]) -> list[str]:
    """Why what is not measured is not."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            reasons.setdefault((row["status"], row["reason"]), []).append(row)
    if not reasons:
        return []
    lines = ["## Not measured", ""]
    for (status, reason), those in reasons.items():
        which = "; ".join([", ".join([*[v for v in row["cell"].values() if v]]) for row in those[:4]])
        more = f" and {len(those) - 4} more" if len(those) > 4 else ""
        lines.append(f"- **{status}**{': ' + reason if reason else ''} ({which}{more})")
    return lines


def _where(row: Row) -> list[str]:
    cell = row["cell"]
    return [cell["model"], cell["dtype"], cell["volume"], STEP_NAMES[cell["step"]]]


def contender_name(mode: str, code: str) -> str:
    """In words; the mode where it is not PlaneCycle's own."""
    return _code_name(code) if mode == "PCg" else f"{_code_name(code)}, {mode}"


def _code_name(code: str) -> str:
    return CODE_NAMES.get(code, code)


def milliseconds(seconds: float | None) -> str:
    """Three digits; "not measured" for None."""
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
