"""`export_model`: a lifted model in a file that runs without this package, checked."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.finite import check_features
from ..inputs import check_one_of
from ..lifted import LiftedModel
from ..optional import MissingPackageError, in_words
from ..runtime.backends import asked_for
from ..version import __version__
from ..weights.saving import DEFAULTS
from .formats import AXES, FORMATS, NamedTensors, Wanted, check_tools

# Largest errors, of features whose largest is 1 or of the largest: some hundred roundings.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
OWN = {"backend": ("auto", "reference"), "attention": ("auto", "sdpa", "reference")}  # torch's operations alone


class Output(NamedTuple):
    """One output of an exported model, as it was checked."""

    name: str
    shape: tuple[int, ...]  # on the volume of the check
    error: float  # the largest distance from eager


@dataclass(frozen=True)
class Exported:
    """What `export_model` returns."""

    files: tuple[Path, ...]  # the one that was asked for first; an .onnx may have its weights in a second one
    to: str
    dynamic: tuple[str, ...]
    checked: tuple[int, ...]  # shape of the volume that it was checked on
    outputs: tuple[Output, ...]


def export_model(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
    path: str | Path,
    to: str = "onnx",
    dynamic: str | Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a lifted model to a file that runs without this package, after it was checked against eager.

    Its input is called ``volume``, its outputs ``patches`` (B, D, H, W, C), ``cls`` (B, S, C) and ``registers``
    (B, S, r, C), as far as the model has them, and ``pooled`` (B, C), as in `VolumeFeatures`. The check runs the file
    on another random volume, larger along axes that are dynamic: every output must be within 1e-4 of what `lifted`
    gives (float32; 1e-9, 2e-2 and 1e-1 in float64, float16 and bfloat16), or within that of its largest value where
    that is above 1. docs/export.md says what each kind of file keeps, and how to run it.

    Args:
        lifted: in eval mode, on any device; backend "auto" or "reference".
        volume: an example, whose sizes are those that are not dynamic; its values do not matter.
        path: the file: .onnx, .pt2 for "export" and "aoti", .pt for "jit".
        to: "onnx"; "export", by torch.export; "aoti", compiled by AOTInductor; "jit", traced by torch.jit.trace.
        dynamic: sizes that may differ from those of volume: "none", "all", or names of B, D, H, W ("B,D", or a
            sequence). Default: "D", for "jit" "none", all it can. H and W remain multiples of the patch.
        metadata: JSON values, kept in the file beside what is known of the lift.
        overwrite: replace files that are there.

    Returns: files, and the error of each output.

    Raises:
        TypeError: lifted is no model of `lift`, volume no floating-point tensor.
        ValueError: any argument that cannot be, by its name; a model that cannot be exported so; "aoti" without a C++
            compiler; a file that does not give what eager gives. Nothing is written then.
        MissingPackageError: "onnx" without onnx, onnxscript or onnxruntime.
        OSError: the file cannot be written; nothing is left behind.
    """
    axes, path = parse_dynamic(dynamic, to), check_path(path, to, overwrite)
    _check_model(lifted)
    check_tools(to)
    with torch.no_grad():
        lifted(volume)  # raises what is wrong with it, before any work
        other = _other(lifted, volume, axes)
        module = NamedTensors(lifted).eval()
        try:
            expected = module(other)
        except ValueError as error:  # of a model for one size
            raise ValueError(f"dynamic {','.join(axes)} is not possible for this model: {error}") from error
    check_features(lifted, other, expected)
    metadata = described(lifted, volume, axes) | dict(metadata or {})
    wanted = Wanted(module, _example(volume, axes), axes, tuple(expected), json.dumps(metadata))
    which = f" with dynamic {','.join(axes)}" if axes else ""
    what = f"to {to!r} of this model in {str(volume.dtype).removeprefix('torch.')}{which} is not possible"
    with _whole(path) as temporary:
        with torch.no_grad(), in_words(what, OSError, MemoryError, MissingPackageError):
            FORMATS[to].write(wanted, temporary)
            got = FORMATS[to].load(temporary)(other)
        outputs = _compared(got if isinstance(got, Mapping) else dict(zip(expected, got)), expected)
    return Exported(tuple([file for file in _files(path) if file.exists()]), to, axes, tuple(other.shape), outputs)


def parse_dynamic(dynamic: str | Sequence[str] | None, to: str) -> tuple[str, ...]:
    """Names of AXES, in their order. Raises ValueError for others, and for any where a format takes none."""
    check_one_of(to, FORMATS, "to")
    if dynamic is None:
        return ("D",) if FORMATS[to].dynamic else ()
    names = {"all": tuple(AXES), "none": ()}.get(dynamic) if isinstance(dynamic, str) else tuple(dynamic)
    names = tuple([name.strip() for name in dynamic.split(",")]) if names is None else names
    if not set(names) <= set(AXES) or len(set(names)) < len(names):
        raise ValueError(f"dynamic must be none, all, or names of {', '.join(AXES)} such as B,D, got {dynamic!r}")
    if names and not FORMATS[to].dynamic:
        able = ", ".join([name for name, kind in FORMATS.items() if kind.dynamic])
        raise ValueError(f"dynamic must be none for to {to!r}, which holds one shape, got {dynamic!r}; {able} can more")
    return tuple([name for name in AXES if name in names])


def check_path(path: str | Path, to: str, overwrite: bool) -> Path:
    """Raises ValueError unless it names a file of the format that can be made, and is new or may be replaced."""
    path, suffix = Path(path), FORMATS[to].suffix
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"out must be a file ending in {suffix} for to {to!r}, got {path}")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out must be in an existing folder that can be written to, got {path}")
    for file in _files(path):
        if file.exists() and not overwrite:
            raise ValueError(f"out must be new, got {file}; --overwrite (overwrite=True) replaces it")
    return path


def _files(path: Path) -> tuple[Path, Path]:
    """The file, and where ONNX has weights beyond 2 GiB."""
    return path, path.with_name(f"{path.name}.data")


def _check_model(lifted: LiftedModel) -> None:
    if not isinstance(lifted, LiftedModel):
        raise TypeError(f"lifted must be a model made by lift(), got {type(lifted).__name__}")
    if lifted.training:
        raise ValueError("lifted must be in eval mode to be exported; call lifted.eval() before")
    for name, given in (("backend", asked_for(lifted.backend)), ("attention", lifted.attention)):
        if given not in OWN[name] and lifted.strict:
            raise ValueError(
                f"{name} must be one of {', '.join(OWN[name])} to be exported, got {given!r}: files hold torch's own "
                "operations, and 'auto' takes those while exporting"
            )


def _example(
    volume: Tensor,  # (B, channels, D, height, width)
    axes: tuple[str, ...],
) -> Tensor:  # the same, but for dynamic axes of 1, which are 2: torch takes a size of 1 for a constant
    least = [2 if name in axes and volume.shape[axis] == 1 else 1 for name, axis in AXES.items()]
    return volume.detach().repeat(least[0], 1, *least[1:])


def _other(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
    axes: tuple[str, ...],
) -> Tensor:  # random, larger along dynamic axes
    shape, steps = list(volume.shape), dict(zip("HW", lifted.adapter.patch_size))
    for name in axes:
        shape[AXES[name]] += steps.get(name, 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(volume)


def described(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
    axes: tuple[str, ...],
) -> dict[str, Any]:
    """What every file says of its model: JSON values."""
    return {
        **{name: getattr(lifted, name) for name in DEFAULTS},
        "patch_size": list(lifted.adapter.patch_size),
        "volume": "B,C,D,height,width",
        "patches": "B,D,H,W,C",
        "shape": list(volume.shape),
        "dynamic": list(axes),
        "dtype": str(volume.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "planecycle_fast": __version__,
    }


def _compared(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[Output, ...]:
    """Raises ValueError where an output is missing, of another shape or dtype, or off."""
    outputs = []
    for name, right in expected.items():
        tensor = got.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (right.shape, right.dtype):
            what = "nothing" if tensor is None else f"{tuple(tensor.shape)}, {tensor.dtype}"
            raise ValueError(f"{name} of the exported model must be {tuple(right.shape)}, {right.dtype}, got {what}")
        error = (tensor.to(right.device).double() - right.double()).abs().max().item()
        outputs.append(Output(name, tuple(right.shape), math.inf if math.isnan(error) else error))
        allowed = TOLERANCES[right.dtype] * max(1.0, right.abs().max().item())
        if not error <= allowed:
            raise ValueError(
                f"{name} of the exported model must be within {allowed:.1e} of the model's, got {error:.1e}"
            )
    return tuple(outputs)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Another path to write to, whose file, and those beside it, take their places when all went well."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder / path.name
        made = [file for file in _files(folder / path.name) if file.exists()]
        for file in reversed(made):  # the one that names the other last
            os.replace(file, path.with_name(file.name))
        for old in _files(path)[len(made) :]:  # weights of the file that was replaced
            old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
