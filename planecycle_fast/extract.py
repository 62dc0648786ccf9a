"""`planecycle-fast features`: features of scans, from file to file."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import feature_files
from .features import VolumeFeatures
from .inputs import wanted_layers
from .lift import lift
from .lifted import LiftedModel
from .models import load_model, normalisation
from .optional import require
from .orientation import check_axes
from .preprocess import FITS, ModelInput, Window, prepare
from .scan_files import load_scan, scan_name
from .version import __version__
from .viz import foreground, pca_colours, three_views

FORMATS = ("safetensors", "npz")
WINDOW = Window(0.5, 99.5, percent=True)
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)  # of one scan: the rest goes on


@dataclass(frozen=True)
class Settings:
    """What makes the features of a scan what they are."""

    model: str
    mode: str = "planecycle"
    cycle_order: tuple[str, ...] = ("HW", "DW", "DH", "HW")
    pool_method: str = "PCg"
    globals_at: str = "depth"
    layers: tuple[int, ...] | None = None  # None: the last one, under plain names
    pool: bool = False  # only one vector per volume
    window: Window = WINDOW
    axes: str | None = None  # None: SPR for scans that have an orientation
    spacing: tuple[float, float, float] | None = None
    fit: str = "pad"


@dataclass(frozen=True)
class Job:
    """One scan and the file that its features go to."""

    scan: Path
    out: Path

    @property
    def picture(self) -> Path:
        return self.out.with_suffix(".png")


def plan(scans: Sequence[Path], out: Path, format: str = "safetensors") -> list[Job]:
    """Where the features of each scan go: to `out` itself, if it names a file, or into the folder `out`.

    Raises ValueError for several scans and one file, scans of equal names, an `out` that would replace
    a scan, an unknown format, or a folder that cannot be written to.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if out.suffix.lower() in feature_files.SUFFIXES and not out.is_dir():
        if len(scans) > 1:
            raise ValueError(f"out must be a folder for {len(scans)} scans, got the file {out}")
        jobs, folder = [Job(scans[0], out)], out.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"out must be in an existing folder, got {out}")
    else:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder or end in {', '.join(feature_files.SUFFIXES)}, got the file {out}")
        jobs, folder = [Job(scan, out / f"{scan_name(scan)}.{format}") for scan in scans], out.absolute()
        first: dict[Path, Path] = {}
        for job in jobs:
            if job.out in first:
                raise ValueError(f"scans must have names of their own, got {first[job.out]} and {job.scan}")
            first[job.out] = job.scan
    for job in jobs:
        if job.out.exists() and job.scan.exists() and job.out.samefile(job.scan):
            raise ValueError(f"out must not replace a scan, got {job.out}")
    while not folder.exists():  # it is made for the first features, not before
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out must be in a folder that can be written to, got {out}")
    return jobs


def run_features(
    jobs: Sequence[Job],
    settings: Settings,
    device: str = "auto",
    picture: bool = False,
    overwrite: bool = False,
    random_weights: bool = False,
) -> list[str]:
    """Computes and writes the features of every scan; the complaints about those that could not be done.

    Features that are there already, of the same scan and settings, are left alone.

    Args:
        jobs: of `plan`.
        settings: of all scans.
        device: "auto" (CUDA where there is one), or torch's name for one.
        picture: write a picture of the last layer's patches beside each file.
        overwrite: replace files that hold something else; otherwise they are a complaint.
        random_weights: run a model whose weights could not be found, with random ones.

    Raises whatever is wrong with the settings, the model or the device: nothing was written then.
    """
    console = require("rich.console", "scans").Console(stderr=True, highlight=False, soft_wrap=True)
    if picture:  # before minutes of work, not after
        require("matplotlib", "scans")
    if any(job.out.suffix.lower() == ".safetensors" for job in jobs):
        require("safetensors", "scans")
    if settings.fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {settings.fit!r}")
    if settings.axes is not None:
        check_axes(settings.axes)
    lifted, identity = _model(settings, _device(device), random_weights)
    complaints = []
    with _progress(console, lifted, len(jobs)) as progress:
        for job in jobs:
            progress.start(job.scan.name)
            try:
                done = _one(job, lifted, settings, identity, picture, overwrite)
                print(f"{job.out}  {done}", flush=True)
            except EXPECTED as error:
                message = " ".join(str(error).split()) or type(error).__name__
                named = message.startswith(f"volume {job.scan} ")
                complaints.append(message if named else f"volume {job.scan}: {message}")
            progress.finish()
    return complaints


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be 'auto' or one that torch can use here, got {name!r}: {reason}") from error
    return device


def _model(settings: Settings, device: torch.device, random_weights: bool) -> tuple[LiftedModel, dict[str, Any]]:
    """The lifted model, and what the metadata says of it."""
    host, note = load_model(settings.model)
    if note.startswith("RANDOM") and not random_weights:
        raise ValueError(f"model {settings.model} must have weights, got {note}; --random-weights computes them anyway")
    names = ("mode", "cycle_order", "pool_method", "globals_at")
    lifted = lift(host.to(device), **{name: getattr(settings, name) for name in names})
    if settings.layers is not None:
        wanted_layers(settings.layers, len(lifted.blocks))
    mean, std = normalisation(host, settings.model)
    return lifted, {"model": settings.model, "weights": note, "mean": list(mean), "std": list(std)}


def _one(
    job: Job, lifted: LiftedModel, settings: Settings, identity: dict[str, Any], picture: bool, overwrite: bool
) -> str:
    """Computes and writes one scan's features; says in a few words what was done."""
    wanted = identity | {"settings": _described(settings), "scan": job.scan.name}
    if job.out.exists() and not overwrite:
        if not _holds(job.out, wanted | {"scan_sha256": fingerprint(job.scan)}):
            raise ValueError(
                f"out must be new, or hold the same features already, got {job.out}; --overwrite replaces it"
            )
        if not picture or job.picture.exists():
            return "was there already"
    scan = load_scan(job.scan, axes=settings.axes)
    patch, (mean, std) = lifted.adapter.patch_size, (identity["mean"], identity["std"])
    given = prepare(scan, patch, settings.window, settings.spacing, settings.fit, mean, std)
    features, tensors = compute(lifted, given.pixels, settings.layers, settings.pool)
    affine = given.feature_affine(patch)
    metadata = wanted | {
        "scan_sha256": fingerprint(job.scan),
        "affine": affine.tolist(),
        "axes": scan.axes or "unknown",
        "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
        "size": list(features[-1].patches.shape[1:4]),
        "padding": list(given.padding),
        "scan_size": list(scan.voxels.shape),
        "scan_spacing": list(scan.spacing),
        "planecycle_fast": __version__,
    }
    job.out.parent.mkdir(exist_ok=True, parents=True)
    feature_files.save_features(job.out, tensors, metadata)
    if picture:
        _draw(job, given, features[-1].patches[0].cpu(), metadata)
    return " x ".join(map(str, metadata["size"])) + " patches"


def compute(
    model: LiftedModel,
    pixels: Tensor,  # (1, 3, D, height, width)
    layers: Sequence[int] | None = None,
    pool: bool = False,
) -> tuple[list[VolumeFeatures], dict[str, Tensor]]:
    """Features of one volume, and the tensors of its file: float32, without the batch, under their names.

    Those are `patches` (D, H, W, C), `cls` (S, C), `registers` (S, r, C) as far as the model has them, and
    `pooled` (C,); with `pool` the last one alone; with `layers` each after ``layer<i>.``, i from 0.
    """
    count = len(model.blocks)
    wanted = [count - 1] if layers is None else sorted(wanted_layers(layers, count))
    with torch.inference_mode():
        features = model.intermediate(pixels.to(next(model.parameters()).device), wanted)
        tensors = {}
        for i, each in zip(wanted, features):
            prefix = "" if layers is None else f"layer{i}."
            parts = {} if pool else {"patches": each.patches, "cls": each.cls, "registers": each.registers}
            for name, tensor in (parts | {"pooled": each.pooled()}).items():
                if tensor is not None:
                    tensors[prefix + name] = tensor[0].float().cpu()
    return features, tensors


def fingerprint(scan: Path) -> str:
    """SHA-256 of a scan's file, or of the names and contents of a folder's files.

    Raises ValueError for a path that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if not scan.exists():
            raise FileNotFoundError(2, "No such file or directory")
        for file in sorted(f for f in scan.iterdir() if f.is_file()) if scan.is_dir() else [scan]:
            digest.update(file.name.encode(errors="surrogateescape") + b"\0" if scan.is_dir() else b"")
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise ValueError(f"volume {scan} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _described(settings: Settings) -> dict[str, Any]:
    """Settings as JSON values."""
    described = asdict(settings) | {"window": str(settings.window)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}


def _holds(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a file holds features with this metadata, among others."""
    try:
        metadata = feature_files.load_metadata(path)
    except ValueError:
        return False
    return all(name in metadata and metadata[name] == value for name, value in wanted.items())


def _draw(job: Job, given: ModelInput, patches: Tensor, metadata: dict[str, Any]) -> None:
    colours = pca_colours({"features": patches.float()}, foreground(given.image, patches.shape[:3]))
    title = f"{job.scan.name}\nthree principal components of the patch features as colours\n{metadata['weights']}"
    axes = metadata["axes"] if len(metadata["axes"]) == 3 else None
    three_views(given.image, colours, job.picture, title, spacing=tuple(metadata["spacing"]), axes=axes)


class _Progress:
    """Two bars, scans and layers, where stderr is a terminal; nothing where it is not."""

    def __init__(self, bars: Any, scans: int, layers: int) -> None:
        self.bars, self.layers = bars, layers
        self.scan_task = bars.add_task("scans", total=scans)
        self.layer_task = bars.add_task("", total=layers)

    def start(self, name: str) -> None:
        self.bars.reset(self.layer_task, total=self.layers, description=name)

    def advance(self) -> None:
        self.bars.advance(self.layer_task)

    def finish(self) -> None:
        self.bars.advance(self.scan_task)


@contextmanager
def _progress(console: Any, model: LiftedModel, scans: int) -> Iterator[_Progress]:
    columns = require("rich.progress", "scans")
    terminal = sys.stdout.isatty()  # what goes into a file or a pipe must not pass through the bars' console
    bars = columns.Progress(console=console, transient=True, disable=not console.is_terminal, redirect_stdout=terminal)
    progress = _Progress(bars, scans, len(model.blocks))

    def advance(module: nn.Module, args: object, output: object) -> None:
        progress.advance()

    hooks = [block.register_forward_hook(advance) for block in model.blocks]
    try:
        with bars:
            yield progress
    finally:
        for hook in hooks:
            hook.remove()
