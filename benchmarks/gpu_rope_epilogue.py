"""Where queries and keys of many rows turn: what the engine does, against RoPE in the epilogue of the product of qkv.

``python -m benchmarks.gpu --only rope_epilogue``. The engine makes q, k and v by a linear layer, turns the keys in a
pass of their own, in place, and the queries when attention loads them. The candidate (`rope_epilogue_triton.py`) stores
them turned. From normed rows to the context, outputs compared first; times as of `gpu_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.bench.table import markdown_table
from planecycle_fast.bench.timing import compare
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, Tables
from planecycle_fast.ops.multihead_attention.self_attention import self_attention_on, self_attention_ref
from planecycle_fast.ops.rotary.angles import rope_ref
from planecycle_fast.runtime.backends import pick

from . import op_peers as peers
from .budget import Part
from .gpu_attention import CHECKED, time_of
from .op_cells import GLOBALS, INFERENCE
from .op_measure import TOLERANCE
from .part_table import PartTable

GRIDS = {1029: (32, 32), 581: (24, 24)}  # by rows
HEADS = {384: 6, 768: 12, 1024: 16}  # by channels
ROWS = 2**18  # of all sequences
ENGINE = "keys in a pass, queries on load"
LINEAR = "linear layer alone"  # of which it is told what the epilogue costs
EPILOGUE = "in the epilogue"
VARIANTS = {  # of the candidate: whether one dense table, and how many columns a tile has, None: as it comes
    EPILOGUE: (False, None), "in the epilogue, dense table": (True, None),
    "in the epilogue, 128 columns": (False, 128), "in the epilogue, dense table, 128 columns": (True, 128),
}  # fmt: skip


class RopeCell(NamedTuple):
    """What is measured at once."""

    channels: int
    rows: int
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 0  # 0: as many as `ROWS` are

    @property
    def name(self) -> str:
        return f"{self.rows} rows, C = {self.channels}"


class Layer(NamedTuple):
    """Of qkv, and its angles."""

    weight: Tensor  # (3*C, C)
    bias: Tensor  # (3*C,)
    angles: Axial
    heads: int


def cells() -> Iterator[RopeCell]:
    for channels in HEADS:
        for rows in GRIDS:
            yield RopeCell(channels, rows)


def made(cell: RopeCell, device: str) -> tuple[Tensor, Layer]:
    """Normed rows (N, rows, C), and the layer."""
    c, heads = cell.channels, HEADS[cell.channels]
    x = torch.randn(cell.sequences or ROWS // cell.rows, cell.rows, c, dtype=cell.dtype, device=device)
    weight = (torch.randn(3 * c, c, device=device) * c**-0.5).to(cell.dtype)
    bias = torch.randn(3 * c, dtype=cell.dtype, device=device)
    rope = Rope(make_periods(c // heads // 4, base=100.0, device=device))
    return x, Layer(weight, bias, Axial(rope, GRIDS[cell.rows]), heads)


def contenders(layer: Layer, device: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """(name, from x to the context (N, rows, heads, hd), of products to qkv (N, rows, 3*heads, hd))."""
    backend = pick("triton" if device == "cuda" else "auto", torch.device(device))
    tables, attend = layer.angles.tables(), peers.as_blocks_do(layer.angles, GLOBALS, False, backend)

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias).unflatten(2, (3 * layer.heads, -1))

    yield ENGINE, lambda x: attend(linear(x))
    yield LINEAR, linear
    for name, (dense, columns) in VARIANTS.items():
        product = partial(epilogue, layer=layer, tables=one_table(layer.angles) if dense else tables, columns=columns)
        yield name, lambda x, product=product: self_attention_on(backend, product(x), None, None, load="")
        yield f"product {name}", product


def one_table(angles: Axial) -> Tables:
    """As of one axis."""
    return Tables(*[(t.contiguous(),) for t in angles.rope.halves(angles.grid, angles.augmentation)])


def epilogue(
    x: Tensor,  # (N, rows, C)
    layer: Layer,
    tables: Tables,
    columns: int | None,
) -> Tensor:  # (N, rows, 3*heads, hd)
    """The candidate. Raises NotHereError."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] != 9:
        raise NotHereError("it is made for compute capability 9.x")
    from .rope_epilogue_triton import TILES, linear_rope

    tile = None if columns is None else TILES[columns]
    return linear_rope(x, layer.weight, layer.bias, tables, GLOBALS, layer.heads, tile)


def expected(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:  # x: (N, rows, C)
    """In float32: qkv (N, rows, 3*heads, hd), the same with queries and keys turned, and the context."""
    qkv = F.linear(x.float(), layer.weight.float(), layer.bias.float()).unflatten(2, (3 * layer.heads, -1))
    turned = rope_ref(qkv, layer.angles, GLOBALS, 2 * layer.heads)
    return qkv, turned, self_attention_ref(turned)


def measure(cell: RopeCell, device: str = "cuda") -> dict:
    """A row: milliseconds of each contender, or why there are none."""
    x, layer = made(cell, device)
    plain, turned, context = expected(x[:CHECKED], layer)
    row = {"cell": cell, "ms": {}, "missing": {}, "refused": {}}
    for name, call in contenders(layer, device):
        reference = plain if name == LINEAR else turned if name.startswith("product") else context
        try:
            with torch.no_grad():
                agreement = compare({name: call(x[:CHECKED])}, reference, TOLERANCE[cell.dtype])[name]
            if agreement.reason is not None:
                row["refused"][name] = agreement.reason
            else:
                row["ms"][name] = time_of(call, x, INFERENCE)
        except NotHereError as reason:
            row["missing"][name] = str(reason)
        except Exception as error:  # a kernel that has never run raises anything
            row["refused"][name] = f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0]}"
    return row


def verdict(row: dict) -> str:
    """Which is faster, as a line."""
    ms, where = row["ms"], row["cell"].name
    found = [name for name in VARIANTS if name in ms]
    if ENGINE not in ms or not found:
        return f"- {where}: not compared"
    best = min(found, key=ms.get)
    ratio, product = ms[ENGINE] / ms[best], f"product {best}"
    faster = f"{best}, {ratio:.2f} times as fast" if ratio > 1 else f"{ENGINE}, {1 / ratio:.2f} times as fast"
    cost = f"; {product}: {ms[product] / ms[LINEAR]:.2f} times a linear layer" if {product, LINEAR} <= {*ms} else ""
    return f"- {where}: {faster}{cost}"


def text_of(about: str, rows: list[dict], note: str) -> str:
    """The page."""
    names = list(dict.fromkeys([name for row in rows for name in row["ms"]]))
    shown = [(row["cell"].name, *[f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in names])
             for row in rows]  # fmt: skip
    said = {f"- {name}: {why}" for row in rows for kind in ("missing", "refused") for name, why in row[kind].items()}
    lines = [
        about, "ms, bf16, from normed rows to the context; products alone to q, k and v.\n",
        *markdown_table(("", *names), shown, 1), "\nFaster:\n", *map(verdict, rows), "\nNot measured:\n",
        *sorted(said), "",
    ]  # fmt: skip
    return "\n".join(lines) + note


def run(path: Path, about: str, part: Part, device: str = "cuda") -> int:
    """Measures all cells for which there is time. Returns 1 if something raised or computed something else."""
    table = PartTable(part, {path: partial(text_of, about)})
    for cell in table.each((cell.name, cell) for cell in cells()):
        table.add(measure(cell, device))
        print(verdict(table.rows[-1]), flush=True)
    return int(any([row["refused"] for row in table.rows]))
