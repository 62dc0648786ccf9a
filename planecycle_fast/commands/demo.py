"""`planecycle-fast demo`: a 2D vision transformer on a real volume, slice by slice and by PlaneCycle."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import torch
from torch import Tensor

from ..engine.finite import check_features
from ..lifted import LiftedModel, lift
from ..optional import MissingPackageError, require
from ..runtime.backends import pick
from ..scans.checks import warnings_printed
from ..scans.files import load_scan
from ..scans.progress import following
from ..scans.scan import model_input
from ..scans.viz import adjacent_cosine, foreground, pca_colours, three_views
from ..scans.windows import PERCENTILES
from ..weights.load import DEMO_MODEL, load_model
from ..weights.normalisation import normalisation_by_name
from .options import MODEL, FillNan, Index, Option, WhichSeries

MODES = ("slice2d", "planecycle")
CUT_AT = (0.5, 0.5, 0.43)  # of D, H, W; a little beside the midline, where a brain shows more


@dataclass(frozen=True)
class ModeRun:
    """One line of the demo's table."""

    mode: str
    seconds: float
    peak_memory: int  # bytes above what was in use before, during the forward pass
    cosine: float  # between adjacent slices


def mni152() -> Path:
    """The MNI152 T1 template, 197 x 233 x 189 voxels of 1 mm, in the nilearn package."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            "package 'nilearn' is not installed; it comes with: pip install 'planecycle-fast[demo]'"
        )
    name = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    return Path(spec.origin).parent / "datasets" / "data" / name


def run_demo(
    model: Annotated[str, Option(help=f"{MODEL} Random weights without a hub.")] = DEMO_MODEL,
    volume: Annotated[Optional[Path], Option(help="A scan, as for features. Default: MNI152.")] = None,
    out: Annotated[Path, Option(help="The picture.")] = Path("demo.png"),
    size: Annotated[int, Option(help="Pixels of the longest side of a slice.")] = 448,
    fill_nan: FillNan = None,
    index: Index = None,
    array: Annotated[Optional[str], Option(help="Which array of an .npz.")] = None,
    series: WhichSeries = None,
) -> list[ModeRun]:
    """Features of a volume, slice by slice and by PlaneCycle: a table and a picture."""
    console = require("rich.console", "demo").Console()
    for package in ("matplotlib", "psutil"):  # before minutes of work, not after
        require(package, "demo")
    out = Path(out)
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise ValueError(f"out must be a .png file in an existing folder, got {out}")

    host, note = load_model(model)
    host.float()  # whatever its checkpoint's dtype
    lifted = {mode: lift(host, mode=mode) for mode in MODES}
    mean, std = normalisation_by_name(host, model, lifted["slice2d"].adapter.in_channels)
    volume_path = volume or mni152()
    with warnings_printed(volume_path):
        reading = dict(fill_nan=fill_nan, index=index, array=array, series=series)
        scan = load_scan(volume_path, **reading, regrid=True)  # all scans are resampled here
        image = PERCENTILES.apply(scan.voxels)
    patch = lifted["slice2d"].adapter.patch_size
    pixels = model_input(image, scan.spacing, patch, size, mean, std)
    grid = (pixels.shape[2], pixels.shape[3] // patch[0], pixels.shape[4] // patch[1])
    console.print(f"model   {note}", highlight=False)
    console.print(
        f"volume  {volume or 'MNI152 T1 (nilearn)'}: {_by(image.shape)} voxels, {_by(pixels.shape[2:])} pixels, "
        f"{_by(grid)} tokens",
        highlight=False,
        soft_wrap=True,
    )
    mask = foreground(image, grid)

    pick("auto", pixels.device, "add_norm")  # where the backend has to be built first, that is no part of the times
    rows, features = [], {}
    for mode in MODES:
        with _progress(console, lifted[mode], mode):
            features[mode], seconds, peak = _measure(lifted[mode], pixels)
        check_features(lifted[mode], pixels, {f"the patches of {mode}": features[mode]})
        rows.append(ModeRun(mode, seconds, peak, adjacent_cosine(features[mode], mask)))
    console.print(_table(rows))
    title = f"Patch features as colours: three principal components, one scale for both modes\n{note}"
    three_views(image, pca_colours(features, mask), out, title, CUT_AT)
    console.print(f"picture {out}", highlight=False, soft_wrap=True)
    return rows


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _measure(model: LiftedModel, pixels: Tensor) -> tuple[Tensor, float, int]:
    """Patches (D, H, W, C) of one volume (1, channels, D, height, width), seconds, and bytes at the peak."""
    with torch.inference_mode(), _watched_memory() as memory:
        start = time.perf_counter()
        patches = model(pixels).patches[0]
        seconds = time.perf_counter() - start
    return patches.clone(), seconds, max(memory)


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """Resident memory of this process above its start, sampled every 5 ms into the list that it gives."""
    process, stop = require("psutil", "demo").Process(), threading.Event()
    start, found = process.memory_info().rss, [0]

    def watch() -> None:
        while not stop.wait(0.005):
            found.append(process.memory_info().rss - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@contextmanager
def _progress(console, model: LiftedModel, mode: str) -> Iterator[None]:
    """A bar that moves with the layers."""
    progress = require("rich.progress", "demo").Progress(console=console, transient=True)
    task = progress.add_task(f"{mode}, layers", total=len(model.blocks) + 1)  # and the last norm
    with following(model, partial(progress.advance, task)), progress:
        yield


def _table(rows: list[ModeRun]):
    table = require("rich.table", "demo").Table("mode", title="one volume, one run")
    for heading in ("seconds", "volumes/s", "peak memory", "cosine between adjacent slices"):
        table.add_column(heading, justify="right")
    for row in rows:
        rate, peak = f"{1 / row.seconds:.3f}", f"{row.peak_memory / 2**20:.0f} MiB"
        table.add_row(row.mode, f"{row.seconds:.1f}", rate, peak, f"{row.cosine:.4f}")
    return table
