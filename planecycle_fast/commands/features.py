"""`planecycle-fast features`: what is asked for, for `scans.extraction` to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

from ..scans.checks import ScanOptions
from ..scans.sliding import parse_tile
from ..scans.windows import as_spacing, parse_window
from ..weights.load import DEMO_MODEL
from . import options
from .options import Argument, Option


def run_features(
    scans: Annotated[list[Path], Argument(help="NIfTI, NRRD, MetaImage, MGH, Analyze, .npy, .npz, DICOM folders.")],
    out: Annotated[Path, Option(help="A folder, or for one scan a file, .safetensors or .npz.")],
    model: Annotated[str, Option(help=options.MODEL)] = DEMO_MODEL,
    mode: options.Mode = None,
    cycle_order: options.CycleOrder = None,
    pool_method: options.PoolMethod = None,
    globals_at: options.GlobalsAt = None,
    depth_position: options.DepthPosition = None,
    layers: Annotated[
        Optional[str],
        Option(help="Indices of layers, 2,5,8,11 or -1 for the last, whose features get names of their own."),
    ] = None,
    pool: Annotated[bool, Option("--pool", help="Only one vector per scan (and layer).")] = False,
    window: Annotated[str, Option(help="Black and white: intensities (-160,240) or percentiles.")] = "0.5%,99.5%",
    axes: Annotated[
        Optional[str],
        Option(help="Where D, H, W of the features point: one letter each of R/L, A/P, S/I. Default: SPR."),
    ] = None,
    fill_nan: options.FillNan = None,
    index: options.Index = None,
    array: Annotated[Optional[str], Option(help="Which array of an .npz; all volumes, where it holds several.")] = None,
    series: options.WhichSeries = None,
    spacing: Annotated[
        Optional[str],
        Option(
            help="Resample to these mm along D, H, W, or to one for all, and to right angles and even slices. "
            "Default: the scan's own."
        ),
    ] = None,
    allow_shear: Annotated[
        bool,
        Option("--allow-shear", help="Keep axes that are not at right angles, as of a tilted gantry, as they are."),
    ] = False,
    fit: Annotated[str, Option(help="Make slices a multiple of the patch: pad or resize.")] = "pad",
    tile: Annotated[
        Optional[str],
        Option(help="The model sees windows of slices x pixels x pixels, 32x224x224, a quarter of each overlapping."),
    ] = None,
    picture: Annotated[bool, Option("--picture", help="Also draw the features, as a .png beside each file.")] = False,
    format: Annotated[str, Option(help="Of the files in a folder: safetensors or npz.")] = "safetensors",
    device: Annotated[str, Option(help=options.DEVICE)] = "auto",
    dtype: options.ComputesIn = "fp32",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that hold something else.")] = False,
    random_weights: Annotated[
        bool, Option("--random-weights", help="Run a model whose weights cannot be found, with random ones.")
    ] = False,
) -> int:
    """Features of scans, with the affine that places them. Run it again to finish what was interrupted."""
    from ..scans.extraction import ExtractionSettings, extract_files, jobs_for

    lifting = dict(mode=mode, cycle_order=cycle_order, pool_method=pool_method, globals_at=globals_at)
    settings = ExtractionSettings(
        model=model,
        **lifting,
        depth_position=depth_position,
        layers=None if layers is None else _indices(layers),
        pool=pool,
        window=parse_window(window),
        reading=ScanOptions(axes, fill_nan, index, array, series, allow_shear, regrid=spacing is not None),
        spacing=None if spacing is None else as_spacing(spacing),
        fit=fit,
        dtype=dtype,
        tile=None if tile is None else parse_tile(tile),
    )
    jobs = jobs_for(scans, out, format, series)
    complaints = extract_files(jobs, settings, device, picture, overwrite, random_weights)
    for complaint in complaints:
        print(f"planecycle-fast: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layers must be indices such as 2,5,8,11, got {text!r}") from None
