"""`planecycle-fast export`: a model by name, exported, and what was checked of it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import torch

from ..export.exporting import check_path, export_model, parse_dynamic
from ..export.formats import FORMATS, check_tools
from ..inputs import dtype_of, parse_shape, usable_device, with_channels
from ..lifted import lift
from ..pretrained import settings_of
from ..weights.load import check_found, load_model
from ..weights.normalisation import normalisation_by_name
from . import options
from .options import Argument, Option


def run_export(
    model: Annotated[str, Argument(help=options.MODEL)],
    to: Annotated[str, Option(help="onnx, export (torch.export), aoti (AOTInductor) or jit (torch.jit.trace).")],
    volume: Annotated[str, Option(help=options.VOLUME)],
    out: Annotated[
        Optional[Path], Option(help=".onnx, .pt2 for export and aoti, .pt for jit. Default: the model's name.")
    ] = None,
    dynamic: Annotated[
        Optional[str],
        Option(help="Sizes that may be others: none, all, or names of B,D,H,W. Default: D; none for jit."),
    ] = None,
    mode: options.Mode = None,
    cycle_order: options.CycleOrder = None,
    pool_method: options.PoolMethod = None,
    globals_at: options.GlobalsAt = None,
    depth_position: options.DepthPosition = None,
    dtype: options.ComputesIn = "fp32",
    device: Annotated[str, Option(help="What it is exported for, and checked on: cpu, cuda, cuda:1.")] = "cpu",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that are there.")] = False,
    random_weights: Annotated[
        bool, Option("--random-weights", help="Export a model whose weights cannot be found, with random ones.")
    ] = False,
) -> None:
    """A lifted model in a file that runs without this package, checked against it: docs/export.md."""
    given = dict(mode=mode, cycle_order=cycle_order, pool_method=pool_method, globals_at=globals_at)
    axes, shape, number = parse_dynamic(dynamic, to), parse_shape(volume), dtype_of(dtype)
    check_tools(to)
    path = check_path(out or Path(f"{Path(os.path.abspath(model)).name}{FORMATS[to].suffix}"), to, overwrite)
    on = usable_device(device)
    host, note = load_model(model)
    check_found(model, note, random_weights)
    lifted = lift(host, **settings_of(model, **given, depth_position=depth_position)).to(on, number)
    mean, std = normalisation_by_name(host, model, lifted.adapter.in_channels)
    pixels = torch.zeros(with_channels(shape, host), dtype=number, device=on)
    about = {"model": model, "weights": note, "mean": list(mean), "std": list(std)}
    with _quiet():
        done = export_model(lifted, pixels, path, to, axes, about, overwrite)
    print(f"{model}, {note}\n{lifted.extra_repr()}, {dtype}, dynamic {','.join(axes) or 'none'}")
    print(f"checked on a volume {' x '.join(map(str, done.checked))}:")
    for name, size, error in done.outputs:
        print(f"{name:<10} {' x '.join(map(str, size)):<22} largest error {error:.1e}")
    print(f"written: {', '.join(map(str, done.files))}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
