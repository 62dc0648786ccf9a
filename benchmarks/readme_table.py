"""The table of results in README.md, from the newest rows under benchmarks/results.

python -m benchmarks.readme_table    writes it, between its two marks; nothing else in README.md changes
"""

from __future__ import annotations

import sys
from pathlib import Path

from planecycle_fast.bench.cells import AUTHORS, FAST, REFERENCE, VITS
from planecycle_fast.bench.report import NOT_MEASURED, bold_below_one, milliseconds
from planecycle_fast.bench.rows import MEASURED, Row, load
from planecycle_fast.bench.table import markdown_table

from .part_table import PROJECT, RESULTS

README = PROJECT / "README.md"
BEGIN = "<!-- results: written by python -m benchmarks.readme_table -->"
END = "<!-- end of results -->"
VOLUMES = (
    "1x64x64", "4x64x64", "32x64x64", "1x16x256", "1x32x256", "1x32x448", "4x32x512", "8x32x512",
)  # fmt: skip
KINDS = {"cpu": "CPU", "cuda": "GPU"}
HEADINGS = ("device", "network", "dtype", "volume", "ms", "slice2d", "flatten3d", "plain PyTorch", "authors' code",
            "memory")  # fmt: skip
OTHERS = [("slice2d", FAST), ("flatten3d", FAST), ("PCg", REFERENCE), ("PCg", AUTHORS)]


def table(results: Path = RESULTS) -> str:
    """Markdown: inference of PlaneCycle (PCg) on every device that was measured."""
    about = (
        "Time of PlaneCycle (PCg) by this package, inference, and how many times as long the others took, in turns; "
        "**bold** where they are faster. Volumes: batch x slices x pixels; memory: our peak over the authors' code's."
    )
    found: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}
    sources = []
    for path in sorted(results.glob("*/rows.jsonl")):
        of_file = _of_device(load(path))
        shown = [row for row in of_file if (row["cell"]["mode"], row["cell"]["code"]) == ("PCg", FAST)]
        if shown:
            sources += _sources(path.parent.name, shown)
            found.setdefault(shown[0]["environment"]["kind"], []).extend(_lines(shown, of_file))
    lines = [line for kind, of_kind in found.items() for line in of_kind or [[KINDS.get(kind, kind), NOT_MEASURED]]]
    made = markdown_table(HEADINGS, lines, 4)
    return "\n\n".join([about, "\n".join(made), *sources]) + "\n"


def _sources(folder: str, shown: list[Row]) -> list[str]:
    """Of what the rows of a device are: a line for every report that they stand in."""
    lines = []
    for report in sorted({_report(row) for row in shown}):
        rows = [row for row in shown if _report(row) == report]
        newest = max(rows, key=lambda row: row["stamp"]["date"])
        here, commits = newest["environment"], sorted({row["stamp"]["commit"] for row in rows})
        threads = f", {here['threads']} threads" if here["kind"] == "cpu" else ""
        about = f"{here['device']}{threads}, torch {here['torch version']}, commit {', '.join(commits)}"
        lines.append(f"{about}, {newest['stamp']['date']}: [report](benchmarks/results/{folder}/{report}).")
    return lines


def _report(row: Row) -> str:
    """`planecycle-fast bench` writes one; what was measured otherwise names its own."""
    return row["stamp"].get("report", "report.md")


def _of_device(rows: list[Row]) -> list[Row]:
    """The newest row of each cell of inference."""
    newest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["stamp"]["date"]):
        if row["cell"]["step"] == "inference" and row["cell"]["volume"] in VOLUMES:
            newest[tuple(row["cell"].values())] = row
    return list(newest.values())


def _lines(ours: list[Row], rows: list[Row]) -> list[list[str]]:
    ours = sorted(ours, key=lambda row: (VITS.index(row["cell"]["model"]), VOLUMES.index(row["cell"]["volume"])))
    lines = []
    for row in ours:
        cell, others = row["cell"], []
        if row["status"] != MEASURED:
            time = row["status"]
        else:
            time = milliseconds(row["seconds"])
            found = [_in_turn(rows, row, mode, code) for mode, code in OTHERS]
            others = [NOT_MEASURED if one is None else bold_below_one(one["seconds"] / row["seconds"]) for one in found]
            theirs = found[-1]
            others.append(NOT_MEASURED if theirs is None else f"{row['peak_bytes'] / theirs['peak_bytes']:.2f}")
        kind = KINDS.get(row["environment"]["kind"], row["environment"]["kind"])
        name = f"{kind}, {row['environment']['device']}"
        lines.append([name, cell["model"], cell["dtype"], cell["volume"], time, *others])
    return lines


def _in_turn(rows: list[Row], ours: Row, mode: str, code: str) -> Row | None:
    """The row of another contender that was timed in turns with ours."""
    wanted = ours["cell"] | {"mode": mode, "code": code}
    return next(
        (row for row in rows if (row["cell"], row["group"], row["status"]) == (wanted, ours["group"], MEASURED)), None
    )


def with_table(readme: str, made: str) -> str:
    """The README with this table in its place. Raises ValueError where the marks are not there, once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN!r} and, after it, {END!r}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{made}{END}{rest.split(END)[1]}"


def main() -> int:
    README.write_text(with_table(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
