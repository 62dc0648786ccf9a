"""attention of a packed qkv, by itself, and along another plane with all that leads there.

The second: rows in HW order change to DW, become q, k and v, turn, and attend. Others copy rows, turn and attend in
passes of their own; the linear layer is the same for all.

make bench
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, attention, attention_ref, plane_switch, plane_switch_ref, rope, rope_ref

from . import op_peers as peers
from .op_benchmark import benchmark_of
from .op_cells import GLOBALS, INFERENCE, OURS, REFERENCE, STEPS, TRAINING, Maker, OpCell, Shape, backend_of, fixed

ON_LOAD = "planecycle_fast, RoPE on load"


def cells(shapes: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[OpCell]:
    for shape in shapes:
        shape = shape if shape.sequences[1] < 100 else shape._replace(batch=1)  # the reference holds all scores
        for step in STEPS:
            yield alone(shape, step, dtype)
        yield along_another_plane(shape, device, dtype)


def flops(sequences: int, rows: int, channels: int) -> int:
    """Of scores and their product with the values, forward."""
    return 4 * sequences * rows**2 * channels


def _of_heads(function: Callable[..., Tensor], heads: int) -> Callable[[Tensor], Tensor]:
    """From qkv (N, rows, 3*C) to what the projection takes, (N, rows, C)."""
    return lambda qkv: function(*qkv.unflatten(2, (3, heads, -1)).unbind(2)).flatten(2)


def alone(shape: Shape, step: str, dtype: torch.dtype) -> OpCell:
    """Attention along HW."""
    n, rows = shape.sequences

    def on_heads(make: Maker) -> Maker:
        return lambda: _of_heads(make(), shape.heads)

    forward = flops(n, rows, shape.channels)
    return OpCell(
        "attention", shape.label, step, dtype, {"qkv": (n, rows, 3 * shape.channels)},
        {
            OURS: on_heads(fixed(attention)), REFERENCE: on_heads(fixed(attention_ref)),
            peers.SDPA: on_heads(fixed(peers.sdpa)),
            **{label: on_heads(peers.named_attention(name)) for name, label in (peers.TORCHS | peers.FLASH).items()},
        },
        flops=forward * (3.5 if step == TRAINING else 1),  # backward computes the scores again, as torch counts it
    )  # fmt: skip


def along_another_plane(shape: Shape, device: str, dtype: torch.dtype) -> OpCell:
    """Attention along DW of rows in HW order."""
    sizes, channels, heads = shape.sizes, shape.channels, shape.heads
    n, rows = shape.batch * DW.slices(sizes), GLOBALS + DW.length(sizes)
    m = transition(HW.slices(sizes), DW.slices(sizes), sizes[0])
    where = (HW, DW, sizes, GLOBALS)
    angles = Axial(Rope(make_periods(channels // heads // 4, base=100.0, device=device)), DW.grid(sizes))
    tables = angles.tables()

    def joined(change: Callable, turn: Callable, attend: Callable) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, weight: Tensor) -> Tensor:
            qkv = F.linear(change(x), weight).unflatten(2, (3 * heads, -1))
            return attend(*turn(qkv)).flatten(2)

        return call

    def ours():
        backend = backend_of(device, "rope")
        own = angles if backend == "triton" else tables

        def turn(qkv: Tensor) -> tuple[Tensor, ...]:
            rope(qkv[:, :, : 2 * heads], own, GLOBALS, inplace=True, backend=backend)
            return qkv.split(heads, 2)

        return joined(lambda x: plane_switch(x, *where, m, backend=backend), turn, attention)

    def turned_on_load():
        attend, backend = peers.own_attention(angles, GLOBALS, False)(), backend_of(device, "rope")

        def call(x: Tensor, weight: Tensor) -> Tensor:
            qkv = F.linear(plane_switch(x, *where, m, backend=backend), weight).unflatten(2, (3 * heads, -1))
            return attend(qkv).flatten(2)

        return call

    def reference_turn(qkv: Tensor) -> tuple[Tensor, ...]:
        return rope_ref(qkv, tables, GLOBALS, 2 * heads).split(heads, 2)

    def copies(x: Tensor) -> Tensor:
        return peers.separate_passes(x, *where)

    def with_copies():
        sin, cos = peers.dense(tables, GLOBALS, torch.float32)

        def turn(qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = qkv.split(heads, 2)
            return peers.rotate_half(q, sin, cos), peers.rotate_half(k, sin, cos), v

        return joined(copies, turn, peers.sdpa)

    @peers.maker
    def flash_with_copies(name: str):
        attend = peers.named_attention(name)()
        return joined(copies, peers.flash_rotary(tables, GLOBALS, dtype, device)(), attend)

    return OpCell(
        "attention", f"{shape.label}, along DW of rows in HW order", INFERENCE, dtype,
        {"x": (*shape.sequences, channels), "weight": (3 * channels, channels)},
        {
            OURS: ours,
            ON_LOAD: turned_on_load,
            REFERENCE: fixed(joined(lambda x: plane_switch_ref(x, *where, m), reference_turn, attention_ref)),
            f"{peers.SDPA}, copies and RoPE": with_copies,
            **{f"{label}, copies and rotary": flash_with_copies(name) for name, label in peers.FLASH.items()},
        },
        flops=flops(n, rows, channels) + 6 * n * rows * channels**2,
        spread={"weight": channels**-0.5},
    )  # fmt: skip


test_attention = benchmark_of(cells)
