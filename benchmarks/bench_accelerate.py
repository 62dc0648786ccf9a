"""The authors' code as it is and accelerated, and the same network lifted: ViT-S/16, random weights, in turns.

PLANECYCLE_REPO=... make bench
"""

from planecycle_fast.bench.cells import ACCELERATED, AUTHORS, FAST, Cell

from .bench_models import benchmark_of

test_accelerated = benchmark_of([
    Cell("ViT-S", dtype, volume, "inference", "PCg", code)
    for dtype in ("fp32", "bf16") for volume in ("1x32x256", "4x64x64") for code in (AUTHORS, ACCELERATED, FAST)
])  # fmt: skip
