"""README's table of results is what the newest results give."""

import json

import pytest

from benchmarks import readme_table
from planecycle_fast.bench.cells import AUTHORS, FAST

from .small_bench import STAMP, cell, row


def test_the_readme_is_up_to_date():
    readme = readme_table.README.read_text(encoding="utf-8")
    assert readme == readme_table.with_table(readme, readme_table.table()), "python -m benchmarks.readme_table"


def write(folder, rows):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join([json.dumps(each) + "\n" for each in rows]))


def test_without_results_it_says_so(tmp_path):
    text = readme_table.table(tmp_path)
    assert "| CPU | not measured |" in text and "| GPU | not measured |" in text


def test_the_newest_rows_of_every_device(tmp_path):
    volume, newer = "1x64x64", {"stamp": STAMP | {"date": "2026-12-01 00:00 UTC", "commit": "fff"}}
    write(
        tmp_path / "a-cpu",
        [
            row(cell("PCg", FAST, volume), 0.2, "new", **newer),
            row(cell("slice2d", FAST, volume), 0.1, "new", **newer),
            row(cell("flatten3d", FAST, volume), 0.9, "old"),  # was not timed in turns with the newest
            row(cell("PCg", AUTHORS, volume), 0.3, "new", **newer, peak_bytes=2**29),
            row(cell("PCg", FAST, volume), 5.0, "old"),
            row(cell("PCg", FAST, volume, step="finetune"), 9.0, "other"),
        ],
    )
    text = readme_table.table(tmp_path)
    found = "| CPU, A CPU | ViT-S | fp32 | 1x64x64 | 200 | **0.50** | not measured | not measured | 1.50 | 0.20 |"
    assert found in text and text.count("| CPU") == 1 and "| GPU | not measured |" in text
    assert "commit fff, 2026-12-01 00:00 UTC: [report](benchmarks/results/a-cpu/report.md)" in text


def test_what_ran_out_of_memory_says_so(tmp_path):
    write(tmp_path / "gpu", [row(cell("PCg", FAST, "1x64x64"), status="out of memory")])
    assert "| 1x64x64 | out of memory |" in readme_table.table(tmp_path)


def test_every_report_that_rows_stand_in_is_named(tmp_path):
    """Of a run that was not `planecycle-fast bench`, the one that its rows name."""
    other = {"stamp": STAMP | {"report": "first-run.md", "date": "2026-11-01", "commit": "old"}}
    write(
        tmp_path / "gpu",
        [row(cell("PCg", FAST, "1x64x64"), 0.2, "a", **other), row(cell("PCg", FAST, "4x64x64"), 0.3, "b")],
    )
    text = readme_table.table(tmp_path)
    assert "commit old, 2026-11-01: [report](benchmarks/results/gpu/first-run.md)" in text
    assert f"commit {STAMP['commit']}, {STAMP['date']}: [report](benchmarks/results/gpu/report.md)" in text


def test_the_marks_must_be_there():
    for readme in (
        "",
        readme_table.BEGIN,
        readme_table.END + readme_table.BEGIN,
        2 * (readme_table.BEGIN + readme_table.END),
    ):
        with pytest.raises(ValueError, match="README.md must hold"):
            readme_table.with_table(readme, "")
    before = f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb\n"
    assert readme_table.with_table(before, "new\n") == before.replace("old", "new")
