"""What a device can do at most, and what the host beside a GPU needs before the GPU has something to do.

Ceilings of GPUs are their makers': dense products without sparsity, accumulated in float32. How much of them is
reached, and the times of a host, are of one machine: benchmarks/results/nvidia-h100-80gb-hbm3/first-run.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of the ceilings at worst: matrix products, then bandwidth, with a wait for each launch, while the host is as slow as
# it was at times. Between this and all at once, as fast as any was measured, lies the time.
PRODUCTS, BANDWIDTH, HOST = 0.33, 0.6, 0.6
USABLE = 0.92  # of a device's memory: the rest is the driver's, and lost between allocations
PASSES = {"inference": 1, "probe": 1, "finetune": 3}  # of the host through a block: its backward takes it twice as long
KNOWN_DTYPES = ("fp32", "bf16", "fp16")  # of `inputs.DTYPES`: what ceilings are known for


class Host(NamedTuple):
    """The CPU beside a GPU, busy with eager PyTorch: where that takes longer than the GPU's work, the GPU waits."""

    launch: float  # seconds of one launch, by torch
    block: float  # seconds of Python around the launches of one block, forward

    def seconds(self, launches: int, blocks: int) -> float:
        """Of one step, as `planning.Planned` counts launches and blocks."""
        return launches * self.launch + blocks * self.block


# The host of the only GPU that was measured, and a slow one: a property of that machine, not of its GPU. The authors'
# code made 585 launches in 17.5 ms; the 113 of a lifted ViT-S, with 12 blocks, took 18.7 to 28.9 ms.
MEASURED_HOST = Host(launch=30e-6, block=1.25e-3)


class Machine(NamedTuple):
    """Ceilings of a device."""

    name: str
    flops: dict[torch.dtype, float]  # per second, of matrix products
    bandwidth: float  # bytes per second, of its memory
    memory: float  # bytes
    reached: tuple[float, float] = (1.0, 1.0)  # of flops by a large product, of bandwidth by a large copy
    launch: tuple[float, float] = (0.0, 10e-6)  # seconds of one that has little to do, at best and at worst
    host: Host | None = None  # None: nobody waits for one, as in a CUDA graph


LAUNCH = (8e-6, 25e-6)  # on the H100, graphs of small volumes: 112 launches in 2.5 ms, 113 in 2.8, 469 in 6.5


def _gpu(
    name: str, bf16: float, fp32: float, bandwidth: float, memory: float, reached: tuple[float, float] = (1.0, 1.0)
) -> Machine:
    """TFLOP/s, TFLOP/s, TB/s and GB; launches as on the H100, and its host."""
    flops = {torch.bfloat16: bf16 * 1e12, torch.float16: bf16 * 1e12, torch.float32: fp32 * 1e12}
    return Machine(name, flops, bandwidth * 1e12, memory * 1e9, reached, LAUNCH, MEASURED_HOST)


GPUS = {
    "a10": _gpu("NVIDIA A10", 125, 31.2, 0.600, 24),
    "a100-40gb": _gpu("NVIDIA A100 40 GB", 312, 19.5, 1.555, 40),
    "a100": _gpu("NVIDIA A100 80 GB", 312, 19.5, 2.039, 80),
    "l40s": _gpu("NVIDIA L40S", 362, 91.6, 0.864, 48),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 71, 35.6, 0.936, 24),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165, 82.6, 1.008, 24),
    "h100": _gpu("NVIDIA H100 SXM", 989, 67, 3.35, 80, (0.76, 0.89)),  # 753 TFLOP/s in bf16, 2.99 TB/s
    "h200": _gpu("NVIDIA H200", 989, 67, 4.8, 141),
    "b200": _gpu("NVIDIA B200", 2250, 75, 8.0, 180),
}


def gpu(name: str) -> Machine:
    """The GPU called `name`. Raises ValueError for one that is not listed."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]
