"""What `gpu_models.py` measures: contenders by name, and the groups of them that take turns."""

from __future__ import annotations

from typing import NamedTuple

from planecycle_fast.bench import cells as codes

from .gpu_floor import FLOORS

OURS, SLICES, PCM, GRAPH = "PlaneCycle, PCg", "slice2d", "PlaneCycle, PCm", "PlaneCycle, PCg, CUDA graph"
EAGER, COMPILED = "authors' code", "authors' code, compiled"
REFERENCE, OURS_COMPILED = "reference", "PlaneCycle, PCg, compiled"
CODES = {  # contender: mode, code
    OURS: ("PCg", codes.FAST), SLICES: ("slice2d", codes.FAST), PCM: ("PCm", codes.FAST), GRAPH: ("PCg", codes.GRAPH),
    EAGER: ("PCg", codes.AUTHORS), REFERENCE: ("PCg", codes.REFERENCE), COMPILED: ("PCg", codes.AUTHORS_COMPILED),
    OURS_COMPILED: ("PCg", codes.COMPILED),
}  # fmt: skip


class Group(NamedTuple):
    """What is timed by turns."""

    model: str
    dtype: str
    volume: str
    step: str
    names: tuple[str, ...]
    gigabytes: float = 0  # of the GPU that what is compiled needs, about: so that not too much is compiled at once

    @property
    def compiled(self) -> list[str]:
        """Contenders that torch.compile makes."""
        return [name for name in self.names if "compiled" in name]

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.volume}, {self.step}{', compiled' if self.compiled else ''}"


INFERENCE = (OURS, SLICES, PCM, GRAPH, EAGER, REFERENCE, *FLOORS)
TRAINING = (OURS, SLICES, EAGER, REFERENCE, *FLOORS)
GRAPHED = (*TRAINING[:2], GRAPH, *TRAINING[2:])
COMPILES = (OURS, COMPILED)

GROUPS = [  # what says most first; in training neither ViT-B at 8x32x512 nor ViT-L at 4x32x512 fit in 79 GiB, whoever's
    Group("ViT-S", "bf16", "8x32x512", "inference", INFERENCE),
    Group("ViT-S", "bf16", "8x32x512", "inference", (*COMPILES, OURS_COMPILED), 5),
    Group("ViT-S", "bf16", "8x32x512", "training", TRAINING),
    Group("ViT-S", "bf16", "8x32x512", "training", COMPILES, 30),
    Group("ViT-B", "bf16", "8x32x512", "inference", INFERENCE),
    Group("ViT-S", "bf16", "4x64x64", "inference", INFERENCE),
    Group("ViT-S", "bf16", "4x64x64", "training", GRAPHED),
    Group("ViT-L", "bf16", "4x32x512", "inference", INFERENCE),
    Group("ViT-B", "bf16", "8x32x512", "inference", COMPILES, 9),
    Group("ViT-S", "bf16", "1x32x256", "inference", INFERENCE),
    Group("ViT-S", "bf16", "32x64x64", "training", GRAPHED),
    Group("ViT-S", "fp32", "32x64x64", "training", GRAPHED),
    Group("ViT-B", "bf16", "32x64x64", "inference", INFERENCE),
    Group("ViT-B", "bf16", "32x64x64", "training", TRAINING),
    Group("ViT-S", "bf16", "4x64x64", "inference", COMPILES, 2),
    Group("ViT-S", "bf16", "4x64x64", "training", COMPILES, 2),
    Group("ViT-S", "bf16", "1x32x256", "inference", COMPILES, 2),
    Group("ViT-S", "bf16", "32x64x64", "training", COMPILES, 6),
    Group("ViT-B", "bf16", "32x64x64", "inference", COMPILES, 3),
    Group("ViT-L", "bf16", "4x32x512", "inference", COMPILES, 7),
]
