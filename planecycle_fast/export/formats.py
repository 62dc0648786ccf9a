"""Files that an exported model is written to, each without planecycle_fast in it, and how to run them.

`FORMATS` are what `exporting.export_model` takes as `to`. Every file holds one JSON text, under the name
``planecycle_fast``, that says what the model is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..lifted import LiftedModel
from ..optional import require
from ..runtime.compiling import compiler

KEY = "planecycle_fast"  # of the JSON text
AXES = {"B": 0, "D": 2, "H": 3, "W": 4}  # of the volume, that may be dynamic
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights beside the graph in one file: protobuf's limit is 2 GiB


class NamedTensors(nn.Module):
    """A lifted model that returns a dictionary of tensors: no type of this package is part of a file."""

    def __init__(self, lifted: LiftedModel) -> None:
        super().__init__()
        self.lifted = lifted

    def forward(
        self,
        volume: Tensor,  # (B, channels, D, height, width)
    ) -> dict[str, Tensor]:
        """patches (B, D, H, W, C), pooled (B, C); as far as there are any, cls (B, S, C), registers (B, S, r, C)."""
        features = self.lifted(volume)
        named = {"patches": features.patches, "cls": features.cls, "registers": features.registers}
        return {name: t for name, t in (named | {"pooled": features.pooled()}).items() if t is not None}


class Wanted(NamedTuple):
    """What is written."""

    module: NamedTensors
    volume: Tensor  # (B, channels, D, height, width), of which dynamic axes have 2 or more
    dynamic: tuple[str, ...]  # of AXES
    names: tuple[str, ...]  # of the outputs
    note: str  # the JSON text

    def program(self) -> torch.export.ExportedProgram:
        """By torch.export. Raises what that raises."""
        shapes = dict.fromkeys([AXES[name] for name in self.dynamic], torch.export.Dim.DYNAMIC)
        return torch.export.export(
            self.module, (self.volume,), dynamic_shapes={"volume": shapes} if shapes else None, strict=False
        )


class Format(NamedTuple):
    """One kind of file."""

    suffix: str
    dynamic: bool  # whether sizes may be
    packages: tuple[str, ...]  # that it needs, of the extra `export`
    write: Callable[[Wanted, Path], None]
    load: Callable[[Path], Callable[[Tensor], Mapping[str, Tensor] | list[Tensor]]]  # lists: in the order of names


def _write_onnx(wanted: Wanted, path: Path) -> None:
    axes = {axis: {3: "height", 4: "width"}.get(axis, name) for name, axis in AXES.items() if name in wanted.dynamic}
    made = torch.onnx.export(
        wanted.program(),
        (wanted.volume,),
        dynamo=True,
        verbose=False,
        input_names=["volume"],
        output_names=list(wanted.names),
        dynamic_shapes={"volume": axes} if axes else None,
    )
    made.model.metadata_props[KEY] = wanted.note
    weights = sum([math.prod(t.shape) * t.element_size() for t in wanted.module.state_dict().values()])
    made.save(path, external_data=weights > LARGEST_ONNX)


def _load_onnx(path: Path) -> Callable[[Tensor], list[Tensor]]:
    runtime, checker = require("onnxruntime", "export"), require("onnx", "export").checker
    checker.check_model(str(path))
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda volume: [torch.from_numpy(out) for out in session.run(None, {"volume": volume.cpu().numpy()})]


def _write_program(wanted: Wanted, path: Path) -> None:
    torch.export.save(wanted.program(), path, extra_files={KEY: wanted.note})


def _write_aoti(wanted: Wanted, path: Path) -> None:
    settings = {"aot_inductor.metadata": {KEY: wanted.note}}
    torch._inductor.aoti_compile_and_package(wanted.program(), package_path=str(path), inductor_configs=settings)


def _write_trace(wanted: Wanted, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes become constants: that is what a trace is
        trace = torch.jit.trace(wanted.module, wanted.volume, strict=False, check_trace=False)
    torch.jit.save(trace, str(path), _extra_files={KEY: wanted.note})


FORMATS = {
    "onnx": Format(".onnx", True, ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "export": Format(".pt2", True, (), _write_program, lambda path: torch.export.load(path).module()),
    "aoti": Format(".pt2", True, (), _write_aoti, lambda path: torch._inductor.aoti_load_package(str(path))),
    "jit": Format(".pt", False, (), _write_trace, lambda path: torch.jit.load(str(path))),
}


def check_tools(to: str) -> None:
    """Raises MissingPackageError, or ValueError without a compiler, where a format cannot be written or run here."""
    for package in FORMATS[to].packages:
        require(package, "export")
    if to == "aoti" and compiler() is None:
        raise ValueError("to 'aoti' needs a C++ compiler: c++, g++, or what CXX names")
