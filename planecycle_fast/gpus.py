"""What GPUs can do at most, by their makers' data sheets: dense products without sparsity, accumulated in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """Ceilings of a device."""

    name: str
    flops: dict[torch.dtype, float]  # per second, of matrix products
    bandwidth: float  # bytes per second, of its memory
    memory: float  # bytes


def _gpu(name: str, bf16: float, fp32: float, bandwidth: float, memory: float) -> Machine:
    """TFLOP/s, TFLOP/s, TB/s and GB."""
    flops = {torch.bfloat16: bf16 * 1e12, torch.float16: bf16 * 1e12, torch.float32: fp32 * 1e12}
    return Machine(name, flops, bandwidth * 1e12, memory * 1e9)


GPUS = {
    "a10": _gpu("NVIDIA A10", 125, 31.2, 0.600, 24),
    "a100-40gb": _gpu("NVIDIA A100 40 GB", 312, 19.5, 1.555, 40),
    "a100": _gpu("NVIDIA A100 80 GB", 312, 19.5, 2.039, 80),
    "l40s": _gpu("NVIDIA L40S", 362, 91.6, 0.864, 48),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 71, 35.6, 0.936, 24),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165, 82.6, 1.008, 24),
    "h100": _gpu("NVIDIA H100 SXM", 989, 67, 3.35, 80),
    "h200": _gpu("NVIDIA H200", 989, 67, 4.8, 141),
    "b200": _gpu("NVIDIA B200", 2250, 75, 8.0, 180),
}


def gpu(name: str) -> Machine:
    """The GPU called `name`. Raises ValueError for one that is not listed."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]


def this_cpu(dtype: torch.dtype) -> Machine:
    """This machine's CPU: a large matrix product and a large copy, measured now, and its memory."""
    from .benchmark.timing import ceiling_bandwidth, ceiling_flops
    from .optional import require

    memory = require("psutil", "bench").virtual_memory().total
    cpu = torch.device("cpu")
    return Machine("this CPU", {dtype: ceiling_flops(cpu, dtype)}, ceiling_bandwidth(cpu), float(memory))
