"""`planecycle-fast bench`: the suite of `planecycle_fast.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

from .options import DEVICE, Context, Option


def run_bench(
    context: Context,
    full: Annotated[bool, Option("--full/--quick", help="Every combination, or a few: minutes on a laptop.")] = False,
    device: Annotated[str, Option(help=DEVICE)] = "auto",
    models: Annotated[Optional[str], Option(help="ViT-S, ViT-B, ViT-L, ViT-7B, and peers: docs/benchmarks.md.")] = None,
    volumes: Annotated[Optional[str], Option(help="Batch x slices x pixels: 1x32x256,4x64x64.")] = None,
    dtype: Annotated[Optional[str], Option(help="fp32, bf16, fp16. Default: bf16 on CUDA, fp32 elsewhere.")] = None,
    steps: Annotated[Optional[str], Option(help="inference, probe, finetune. Default: all.")] = None,
    out: Annotated[Path, Option(help="A folder: rows.jsonl, report.md and pictures.")] = Path("bench"),
) -> int:
    """2D, 3D and PlaneCycle side by side on this machine: a table and plots. Run it again to finish one."""
    from ..bench.command import run_suite

    return run_suite(full, device, models, volumes, dtype, steps, out, context.obj)
