"""Features of scans, from file to file: what `planecycle-fast features` does."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.finite import check_features
from ..features import VolumeFeatures
from ..inputs import check_folder, check_one_of, dtype_of, usable_device, wanted_layers
from ..lifted import LiftedModel, lift
from ..optional import require
from ..pretrained import DEFAULTS, settings_of
from ..version import __version__
from ..weights.load import check_found, load_model
from ..weights.loaded_keys import check_finite
from ..weights.normalisation import normalisation_by_name
from . import feature_files
from .checks import PLAIN, ScanOptions, named, warnings_printed
from .files import digest_of_scan, load_scan, other_file, scan_name
from .formats.arrays import holds_volumes
from .preprocess import FITS, ModelInput, prepare
from .progress import Progress, progress_of
from .scan import Scan
from .sliding import in_patches, sliding_window
from .viz import foreground, pca_colours, three_views
from .volume_sets import features_of, read_set
from .windows import PERCENTILES, Window

FORMATS = ("safetensors", "npz")
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)  # of one scan: the rest goes on


@dataclass(frozen=True)
class ExtractionSettings:
    """What makes the features of a scan what they are."""

    model: str
    mode: str | None = None  # these six: None, what the model's folder records, or else the default of `lift`
    cycle_order: tuple[str, ...] | None = None
    pool_method: str | None = None
    globals_at: str | None = None
    depth_position: str | None = None
    gelu: str | None = None
    layers: tuple[int, ...] | None = None  # None: the last one, under plain names
    pool: bool = False  # only one vector per volume
    window: Window = PERCENTILES
    reading: ScanOptions = PLAIN
    spacing: tuple[float, float, float] | None = None
    fit: str = "pad"
    dtype: str = "fp32"  # of the pass; files hold float32
    tile: tuple[int, int, int] | None = None  # pixels of a sliding window along D, H, W; None: the volume at once


@dataclass(frozen=True)
class Job:
    """One scan and the file that its features go to."""

    scan: Path
    out: Path

    @property
    def picture(self) -> Path:
        return self.out.with_name(f"{self.out.name}.png")


def jobs_for(scans: Sequence[Path], out: Path, format: str = "safetensors", series: str | None = None) -> list[Job]:
    """Where the features of each scan go: to `out` itself, if it names a file, or into the folder `out`.

    There a file is called after its scan, and after the series that is picked.

    Raises ValueError for several scans and one file, scans of equal names, an `out` that would replace
    a scan, an unknown format, or a folder that cannot be written to.
    """
    check_one_of(format, FORMATS, "format")
    if out.suffix.lower() in feature_files.SUFFIXES and not out.is_dir():
        if len(scans) > 1:
            raise ValueError(f"out must be a folder for {len(scans)} scans, got the file {out}")
        jobs, folder = [Job(scans[0], out)], out.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"out must be in an existing folder, got {out}")
    else:
        check_folder(out, feature_files.SUFFIXES)
        picked = "" if series is None else "_" + re.sub(r"[^\w.-]+", "_", series.strip())
        jobs, folder = [Job(scan, out / f"{scan_name(scan)}{picked}.{format}") for scan in scans], out.absolute()
        first: dict[Path, Path] = {}
        for job in jobs:
            if job.out in first:
                raise ValueError(f"scans must have names of their own, got {first[job.out]} and {job.scan}")
            first[job.out] = job.scan
    for job in jobs:
        read = [file for file in (job.scan, other_file(job.scan)) if file is not None and file.exists()]
        for made in (job.out, job.picture):
            if made.exists() and any(made.samefile(file) for file in read):
                raise ValueError(f"out must not replace a scan, got {made}")
        if job.scan.is_dir() and job.scan.resolve() in job.out.resolve().parents:
            raise ValueError(f"out must not be in the folder of a scan, got {job.out}")
    while not folder.exists():  # it is made for the first features, not before
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out must be in a folder that can be written to, got {out}")
    return jobs


def extract_files(
    jobs: Sequence[Job],
    settings: ExtractionSettings,
    device: str = "auto",
    picture: bool = False,
    overwrite: bool = False,
    random_weights: bool = False,
) -> list[str]:
    """Computes and writes the features of every scan; the complaints about those that could not be done.

    Features that are there already, of the same scan and settings, are left alone.

    Args:
        jobs: of `jobs_for`.
        settings: of all scans.
        device: "auto" (CUDA where there is one), or torch's name for one.
        picture: write a picture of the last layer's patches beside each file.
        overwrite: replace files that hold something else; otherwise they are a complaint.
        random_weights: run a model whose weights could not be found, with random ones.

    Raises whatever is wrong with the settings, the model or the device: nothing was written then.
    """
    require("rich", "scans")
    if picture:  # before minutes of work, not after
        require("matplotlib", "scans")
    if any(job.out.suffix.lower() == ".safetensors" for job in jobs):
        require("safetensors", "scans")
    check_one_of(settings.fit, FITS, "fit")
    settings, lifted, identity = _model(settings, usable_device(device), random_weights)
    complaints = []
    with progress_of(lifted, len(jobs), settings.tile is not None) as progress:
        for job in jobs:
            progress.start(job.scan.name)
            line = None
            try:
                with warnings_printed(job.scan):
                    line = f"{job.out}  {_one(job, lifted, settings, identity, picture, overwrite, progress)}"
            except EXPECTED as error:
                complaints.append(named(job.scan, str(error).strip() or type(error).__name__))
            progress.advance_scan()
            if line is not None and sys.stdout is not None:
                print(line, flush=True)
    return complaints


def _model(
    settings: ExtractionSettings, device: torch.device, random_weights: bool
) -> tuple[ExtractionSettings, LiftedModel, dict[str, Any]]:
    """Settings in one of the ways they can be written, the lifted model, and what the metadata says of it."""
    dtype = dtype_of(settings.dtype)
    host, note = load_model(settings.model)
    check_found(settings.model, note, random_weights)
    how = settings_of(settings.model, **{name: getattr(settings, name) for name in DEFAULTS})
    settings, lifted = replace(settings, **how), lift(host, **how, graphs=True)  # on CUDA, where volumes repeat
    if settings.tile is not None:
        in_patches(settings.tile, (1, *lifted.adapter.patch_size), "tile")
    if settings.layers is not None:
        layers = wanted_layers(settings.layers, len(lifted.blocks), "layers")
        settings = replace(settings, layers=tuple(sorted(layers)))
    mean, std = normalisation_by_name(host, settings.model, lifted.adapter.in_channels)
    identity = {"model": settings.model, "mean": list(mean), "std": list(std), "weights_sha256": digest_of_model(host)}
    if any([p.is_floating_point() and p.dtype != dtype for p in host.parameters()]):
        lifted.to(dtype)
        check_finite(f"{settings.model} in {settings.dtype}", host)
    lifted.to(device)
    return settings, lifted, identity | {"weights": note}


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of the names and values of a CPU model's state_dict: by it a later run knows the features of this one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _one(
    job: Job,
    lifted: LiftedModel,
    settings: ExtractionSettings,
    identity: dict[str, Any],
    picture: bool,
    overwrite: bool,
    progress: Progress,
) -> str:
    """Computes and writes one scan's features; says in a few words what was done."""
    wanted = identity | {"settings": _described(settings), "scan": job.scan.absolute().name}
    if job.out.exists() and not overwrite:
        if not _holds(job.out, wanted | {"scan_sha256": digest_of_scan(job.scan, settings.reading.series)}):
            raise ValueError(
                f"out must be new, or hold the same features already, got {job.out}; --overwrite replaces it"
            )
        if not picture or job.picture.exists():
            return "was there already"
    elif picture and job.picture.exists() and not overwrite:
        raise ValueError(f"out must leave its picture a new file, got {job.picture}; --overwrite replaces it")
    patch, (mean, std) = lifted.adapter.patch_size, (identity["mean"], identity["std"])

    def prepared(scan: Scan) -> ModelInput:
        return prepare(scan, patch, settings.window, settings.spacing, settings.fit, mean, std)

    def computed(pixels: Tensor) -> tuple[list[VolumeFeatures], dict[str, Tensor]]:  # (B, channels, D, height, width)
        return compute(lifted, pixels, settings.layers, settings.pool, settings.tile, progress.windows)

    if holds_volumes(job.scan, settings.reading):
        if picture:
            raise ValueError("picture must be of one volume; index (--index) picks one")
        volumes = read_set(job.scan, settings.reading)
        progress.expect(len(volumes))
        tensors, given = features_of(volumes, prepared, lambda pixels: computed(pixels)[1], progress.advance_scan)
        scan, several = volumes[0], {"volumes": len(volumes), "split": volumes.split}
    else:
        scan, several = load_scan(job.scan, **vars(settings.reading)), {}
        given = prepared(scan)
        features, tensors = computed(given.pixels)
        tensors = {name: tensor[0] for name, tensor in tensors.items()}
    affine = given.feature_affine(patch)
    metadata = wanted | {
        "scan_sha256": digest_of_scan(job.scan, settings.reading.series),
        "affine": affine.tolist(),
        "axes": scan.axes or "unknown",
        "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
        "size": [given.pixels.shape[2], *(n // p for n, p in zip(given.pixels.shape[3:], patch))],
        "padding": list(given.padding),
        "scan_size": list(scan.voxels.shape),
        "scan_spacing": list(scan.spacing),
        "planecycle_fast": __version__,
        **several,
    }
    job.out.parent.mkdir(exist_ok=True, parents=True)
    if job.out.exists():
        job.picture.unlink(missing_ok=True)  # of the features that are replaced
    try:
        if picture:
            _draw(job, given, features[-1].patches[0].cpu(), metadata)
        feature_files.save_features(job.out, tensors, metadata)
    except BaseException:
        job.picture.unlink(missing_ok=True)
        raise
    size = " x ".join(map(str, metadata["size"])) + " patches"
    return f"{len(volumes)} volumes of {size}" if several else size


def compute(
    model: LiftedModel,
    pixels: Tensor,  # (B, channels, D, height, width), any dtype
    layers: Sequence[int] | None = None,
    pool: bool = False,
    tile: tuple[int, int, int] | None = None,
    windows: Callable[[int, int], Any] | None = None,
) -> tuple[list[VolumeFeatures], dict[str, Tensor]]:
    """Features of volumes, and the tensors of their file: float32, on the CPU, under their names.

    Those are `patches` (B, D, H, W, C), `cls` (B, S, C), `registers` (B, S, r, C) as far as the model has them, and
    `pooled` (B, C); with `pool` the last one alone; with `layers` each after ``layer<i>.``, i from 0. With `tile`,
    pixels along D, H, W, the model sees windows of this size (`sliding_window`, whose `progress` is `windows`).

    Raises ValueError for features that are not finite.
    """
    count = len(model.blocks)
    wanted = [count - 1] if layers is None else sorted(wanted_layers(layers, count))
    like = next(p for p in model.parameters() if p.is_floating_point())
    pixels = pixels.to(like) if tile is None else pixels.to(like.dtype)  # windows alone go to the device

    def run() -> list[VolumeFeatures]:
        if tile is None:
            return model.intermediate(pixels, wanted)
        return sliding_window(model, pixels, tile, layers=wanted, progress=windows)

    with torch.inference_mode():
        features = run()
        tensors = {}
        for i, each in zip(wanted, features):
            prefix = "" if layers is None else f"layer{i}."
            parts = {} if pool else {"patches": each.patches, "cls": each.cls, "registers": each.registers}
            for name, tensor in (parts | {"pooled": each.pooled()}).items():
                if tensor is not None:
                    tensors[prefix + name] = tensor.float().cpu()
    check_features(model, pixels, tensors, run)
    return features, tensors


def _described(settings: ExtractionSettings) -> dict[str, Any]:
    """Settings as JSON values."""
    described = asdict(settings) | {"window": str(settings.window)}
    described |= described.pop("reading")
    if described["gelu"] in (None, DEFAULTS["gelu"]):  # files of older versions do not say it
        del described["gelu"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}


def _holds(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a file holds features with this metadata, among others."""
    try:
        metadata = feature_files.load_metadata(path)
    except ValueError:
        return False
    same = wanted.keys() - {"weights"}  # where they came from is not what they are
    return all(name in metadata and metadata[name] == wanted[name] for name in same)


def _draw(job: Job, given: ModelInput, patches: Tensor, metadata: dict[str, Any]) -> None:
    colours = pca_colours({"features": patches.float()}, foreground(given.image, patches.shape[:3]))
    title = f"{job.scan.name}\nthree principal components of the patch features as colours\n{metadata['weights']}"
    axes = metadata["axes"] if len(metadata["axes"]) == 3 else None
    three_views(given.image, colours, job.picture, title, spacing=tuple(metadata["spacing"]), axes=axes)
