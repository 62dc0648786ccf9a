"""How verbs declare their options, the options that several of them take, and what is made of their words."""

from __future__ import annotations

from typing import Annotated, Optional

from ..geometry.planes import parse_cycle
from ..optional import require

typer = require("typer", "scans")
Argument, Option, Context = typer.Argument, typer.Option, typer.Context


def _planes(cycle_order: str | None) -> tuple[str, ...] | None:
    return None if cycle_order is None else tuple(plane.name for plane in parse_cycle(cycle_order))


# Of a lift
Mode = Annotated[
    Optional[str],
    Option(
        help="planecycle, slice2d or flatten3d. Default, of this and the next four: what the model's folder records "
        "(LiftedModel.save_pretrained), else planecycle."
    ),
]
CycleOrder = Annotated[
    Optional[str], Option(help="Planes that layers take in turn. Default: HW,DW,DH,HW.", callback=_planes)
]
PoolMethod = Annotated[Optional[str], Option(help="How globals pass between planes: PCg or PCm. Default: PCg.")]
GlobalsAt = Annotated[Optional[str], Option(help="Where they rest between layers: depth or plane. Default: depth.")]
DepthPosition = Annotated[
    Optional[str], Option(help="A place along D for models without one: none, sincos or rope1d. Default: none.")
]
# Of reading a scan
FillNan = Annotated[Optional[float], Option(help="Takes the place of NaN voxels, which else are refused.")]
Index = Annotated[Optional[int], Option(help="Which volume of a file of several, from 0.")]
WhichSeries = Annotated[
    Optional[str],
    Option(help="Of DICOM folders with several: number, UID, its end, or description, as `series` lists them."),
]
# Of the pass
VOLUME = "Batch x slices x pixels: 1x32x256, or 1x32x256x192."
DEVICE = "cpu, cuda, cuda:1, mps; auto takes CUDA where there is one."
MODEL = "A timm or Hugging Face name, or a folder: docs/models.md."
ComputesIn = Annotated[str, Option(help="What the model computes in: fp32, bf16, fp16, fp64.")]
