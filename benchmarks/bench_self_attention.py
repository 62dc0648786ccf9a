"""self_attention: from a packed qkv to what the projection takes, RoPE and layout included.

`gpu_attention.py` measures it at the sizes that the table of attentions goes by.

make bench
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from planecycle_fast.ops import Axial, rope, self_attention, self_attention_ref

from . import op_peers as peers
from .bench_attention import flops
from .bench_rope import axial
from .op_benchmark import benchmark_of
from .op_cells import GLOBALS, OURS, REFERENCE, STEPS, TRAINING, Maker, OpCell, Shape, backend_of, fixed


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape, step in product(shapes, STEPS):
        shape = shape if shape.sequences[1] < 100 else shape._replace(batch=1)  # the reference holds all scores
        yield cell(shape, step, axial(shape, device), device, dtype)


def cell(shape: Shape, step: str, angles: Axial, device: str, dtype: torch.dtype) -> OpCell:
    (n, rows), heads = shape.sequences, shape.heads
    settings = dict(angles=angles, num_globals=GLOBALS)

    def ours():
        return partial(self_attention, **settings, backend=backend_of(device, "self_attention"))

    def in_two(make: Maker) -> Maker:
        """After our rope."""

        def made() -> Callable[[Tensor], Tensor]:
            attend, backend = make(), backend_of(device, "rope")

            def call(qkv: Tensor) -> Tensor:  # (N, rows, 3*heads, hd)
                turned = rope(qkv, angles, GLOBALS, turned=2 * heads, backend=backend)
                return attend(*turned.split(heads, 2))

            return call

        return made

    return OpCell(
        "self_attention", shape.label, step, dtype, {"qkv": (n, rows, 3 * heads, shape.channels // heads)},
        {
            OURS: ours, REFERENCE: fixed(partial(self_attention_ref, **settings)),
            peers.SDPA: in_two(fixed(peers.sdpa)),
            **{label: in_two(peers.named_attention(name)) for name, label in (peers.TORCHS | peers.FLASH).items()},
        },
        flops=flops(n, rows, shape.channels) * (3.5 if step == TRAINING else 1),  # as in bench_attention
    )  # fmt: skip


test_self_attention = benchmark_of(cells)
