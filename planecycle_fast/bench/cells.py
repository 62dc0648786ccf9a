"""What is measured: models x volumes x modes x implementations x steps, and which of it a run takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

from ..cost.modes import MODES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST, REFERENCE, GRAPH, COMPILED = "fast", "reference", "fast, CUDA graph", "fast, compiled"
AUTHORS, AUTHORS_COMPILED = "authors", "authors, compiled"
OURS = (FAST, GRAPH, COMPILED)
CODES = (*OURS, REFERENCE, AUTHORS, AUTHORS_COMPILED)
ACCELERATED = "authors, accelerated"  # by `pcf.accelerate`, in no sweep
REDUCED = "fast, compiled, reduce-overhead"  # torch.compile's own CUDA graphs, in no sweep either
PRODUCTS, FLOOR = "products alone", "products + attention"
FLOORS = (PRODUCTS, FLOOR, *[f"products + {kernel}" for kernel in ("flash", "cuDNN", "efficient", "FlashAttention 3")])
STEPS = ("inference", "probe", "finetune")
GRAPHED = ("inference", "finetune")  # steps of which there are CUDA graphs
VITS = ("ViT-S", "ViT-B", "ViT-L", "ViT-7B")
PEERS = ("3D ResNet-50", "ACS ResNet-50", "ViViT-B")
PEER = "peer"  # the code of a cell of one of them
CODE_NAMES = {FAST: "planecycle_fast", GRAPH: "planecycle_fast, CUDA graph", COMPILED: "planecycle_fast, compiled",
              REFERENCE: "plain PyTorch", AUTHORS: "authors' code", AUTHORS_COMPILED: "authors' code, compiled",
              ACCELERATED: "authors' code, accelerated", REDUCED: "planecycle_fast, compiled, reduce-overhead",
              PEER: ""}  # floors are called by their code  # fmt: skip
PATCH, GLOBALS = 16, 5  # of all these models: pixels along a patch; class and register tokens of a slice


class Volume(NamedTuple):
    """The size of a batch of volumes, in slices and pixels."""

    batch: int
    depth: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, (B, 3, D, height, width)."""
        return (self.batch, 3, self.depth, self.height, self.width)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Patches of one volume along D, H, W."""
        return (self.depth, self.height // PATCH, self.width // PATCH)

    @property
    def patches(self) -> int:
        """Of one volume."""
        return self.depth * (self.height // PATCH) * (self.width // PATCH)

    def __str__(self) -> str:
        sides = (self.height,) if self.height == self.width else (self.height, self.width)
        return "x".join(map(str, (self.batch, self.depth, *sides)))


def parse_volume(text: str) -> Volume:
    """Volume of "BxDxS" (slices of S x S pixels) or "BxDxHxW". ValueError for anything else."""
    if not re.fullmatch(r"\d+(x\d+){2,3}", text):
        raise ValueError(f"volumes must be like 1x32x256 (batch x slices x pixels) or 1x32x256x192, got {text!r}")
    numbers = [int(part) for part in text.split("x")]
    volume = Volume(*numbers[:3], numbers[-1])
    if 0 in numbers or volume.height % PATCH or volume.width % PATCH:
        raise ValueError(f"volumes must have no side of 0 and pictures in multiples of {PATCH} pixels, got {text!r}")
    return volume


class Cell(NamedTuple):
    """One thing that is measured."""

    model: str
    dtype: str
    volume: str  # of Volume
    step: str
    mode: str  # "" for peers
    code: str

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What it shares with those that it is measured with, in turns."""
        return self[:4]


QUICK_CUBES = ("1x6x96", "1x10x160", "1x16x256")  # as many tokens along D as along H and W
QUICK_VOLUME = "1x64x64"  # what small 3D data sets have
FULL_VOLUMES = (
    *(f"{batch}x64x64" for batch in (1, 2, 4, 8, 16, 32)),
    "1x32x256", "1x64x256", "4x32x160", "1x32x448", "1x8x128", "1x16x256", "1x24x384", "1x32x512",
)  # fmt: skip


Chosen = Sequence[str] | None  # of one axis; None takes what the sweep has


def full(
    device: torch.device, models: Chosen = None, volumes: Chosen = None, dtypes: Chosen = None, steps: Chosen = None
) -> list[Cell]:
    """Every combination; None takes the whole of that axis, and the device's usual dtype."""
    cells = []
    for group in _groups(device, models or VITS + PEERS, volumes or FULL_VOLUMES, dtypes, steps):
        graphs = device.type == "cuda" and group[3] in GRAPHED
        codes = [code for code in CODES if code != GRAPH or graphs]
        of_vit = [Cell(*group, mode, code) for mode in MODES for code in codes]
        cells += [Cell(*group, "", PEER)] if group[0] in PEERS else of_vit
    return cells


def quick(
    device: torch.device, models: Chosen = None, volumes: Chosen = None, dtypes: Chosen = None, steps: Chosen = None
) -> list[Cell]:
    """A few cells that show each mode, each implementation but the compiled ones, and each step."""
    cells, chosen = [], bool(volumes or steps)  # by the user, so that nothing is left out for its time
    for group in _groups(device, models or ("ViT-S", *PEERS), volumes or (QUICK_VOLUME, *QUICK_CUBES), dtypes, steps):
        model, _, volume, step = group
        if step != "inference" and volume != QUICK_CUBES[0] and not chosen:
            continue
        if model in PEERS:
            wanted = step == "inference" and volume == QUICK_VOLUME
            cells += [Cell(*group, "", PEER)] if wanted or chosen else []
            continue
        cells += [Cell(*group, mode, FAST) for mode in MODES if mode != "PCm" or volume not in QUICK_CUBES or chosen]
        graphs = [GRAPH] if device.type == "cuda" and step in GRAPHED else []
        cells += [Cell(*group, "PCg", code) for code in (REFERENCE, AUTHORS, *graphs)]
    return cells


def _groups(
    device: torch.device, models: Sequence[str], volumes: Sequence[str], dtypes: Chosen, steps: Chosen
) -> list[tuple[str, str, str, str]]:
    dtypes = dtypes or (("bf16",) if device.type == "cuda" else ("fp32",))
    return [group[1:2] + group[:1] + group[2:] for group in product(dtypes, models, volumes, steps or STEPS)]


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that are measured together, in the order in which they come first."""
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.group, []).append(cell)
    return list(found.values())


def choices(text: str | None, known: Sequence[str], name: str) -> list[str] | None:
    """Names separated by commas, each of `known`; None for None. ValueError, naming the argument, for others."""
    if text is None:
        return None
    lower = {each.lower(): each for each in known}
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if not chosen or any([part.lower() not in lower for part in chosen]):
        raise ValueError(f"{name} must be some of {', '.join(known)}, separated by commas, got {text!r}")
    return list(dict.fromkeys([lower[part.lower()] for part in chosen]))
