"""What `planecycle-fast bench` runs: the sweep, then its report and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from ..inputs import check_folder, usable_device
from ..optional import MissingPackageError
from . import cells as which
from .measure import FULL, QUICK
from .plots import draw
from .report import report_of
from .rows import FAILED, REFUSED
from .sweep import run_sweep

QUICK_SECONDS = 150  # of the sweep: with imports, report and pictures under three minutes


def run_suite(
    full: bool = False,
    device: str = "auto",
    models: str | None = None,
    volumes: str | None = None,
    dtype: str | None = None,
    steps: str | None = None,
    out: Path = Path("bench"),
    command: str = "planecycle-fast bench",
    seconds: float | None = None,
) -> int:
    """Measures, and writes rows.jsonl, report.md and PNGs to `out`. Returns 1 where a contender failed or was wrong.

    Args:
        full: all combinations; otherwise a few that show each mode and implementation.
        device: "auto" (CUDA where there is one), or torch's name for one.
        models, volumes, dtype, steps: names separated by commas, of `cells.VITS` and `PEERS`, like "1x32x256", of
            `cells.DTYPES`, of `cells.STEPS`. None takes the sweep's own.
        out: a folder; rows of an earlier run in it are kept where nothing has changed.
        command: how this was asked for, to be written down.
        seconds: leave out groups of cells that would probably end later; default: no limit, or QUICK_SECONDS.

    Raises ValueError, naming the argument, before anything is measured.
    """
    chosen = {
        "models": which.choices(models, (*which.VITS, *which.PEERS), "models"),
        "volumes": None if volumes is None else [str(which.parse_volume(one.strip())) for one in volumes.split(",")],
        "dtypes": which.choices(dtype, tuple(which.DTYPES), "dtype"),
        "steps": which.choices(steps, which.STEPS, "steps"),
    }
    on = usable_device(device)
    out = Path(out)
    check_folder(out)
    cells = (which.full if full else which.quick)(on, **chosen)
    limit = QUICK_SECONDS if seconds is None and not full else seconds
    out.mkdir(parents=True, exist_ok=True)
    try:
        rows = run_sweep(cells, on, out, FULL if full else QUICK, command, limit)
    except KeyboardInterrupt:
        print(f"\nwhat was measured is in {out / 'rows.jsonl'}; the same command goes on from there", file=sys.stderr)
        raise
    try:
        pictures, missing = draw(rows, out), []
    except MissingPackageError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        pictures, missing = [], [f"No pictures: {error}."]
    (out / "report.md").write_text(report_of(rows, pictures, missing), encoding="utf-8")
    for path in (out / "report.md", *[picture.path for picture in pictures]):
        print(path)
    return int(any([row["status"] in (FAILED, REFUSED) for row in rows]))
