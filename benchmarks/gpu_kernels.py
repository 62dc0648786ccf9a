"""Each kernel on shapes of real models against a copy that moves as many bytes, and what the host needs per block.

Parts of ``make gpu`` (`gpu_parts.py`): `kernels`, and `tiles`, other tiles than the shipped ones, of `linear_gelu` too,
a matrix product, whose rate is in `bench_linear_gelu.py`. `self_attention` is here where its sequences are so short
that bytes are what it takes; otherwise in `gpu_attention.py`. Times are medians by triton's `do_bench`, caches flushed.
The bytes are those that the operation declares, which tests hold against what its kernels load and store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch

from planecycle_fast.bench.table import markdown_table
from planecycle_fast.optional import MissingPackageError

from .budget import Part
from .op_cells import GLOBALS, SHAPES
from .part_table import PartTable

HOST = "the host's time per block"
ORDER = (1, 3, 0, 5, 2, 4)  # of SHAPES: ViT-S, L, short sequences, 7B, then those between
MILLISECONDS = {"warmup": 10, "rep": 50}  # of `do_bench`: of a kernel of a millisecond some 50 runs
LINEAR_GELU = "linear_gelu"
ONE_TILE = 64  # rows of a sequence whose attention is a pass over memory
HOST_BAR = 600  # microseconds of the host per block
BAR = 0.9  # of a copy's bandwidth


def run(path: Path, about: str, part: Part) -> int:
    """Times the host, and each kernel against a copy. Returns 1 if one raised; bars are shown, they do not fail."""
    said: list[str] = []  # besides the table

    def text(rows: list, note: str) -> str:
        return "\n".join([about, *said, table(rows), note])

    failed, found = 0, PartTable(part, {path: text})
    for name, make in found.each((name, (name, make)) for name, make in [(HOST, None), *calls()]):
        try:
            if make is None:
                said.append(host_time())
            else:
                found.add(time_call(*make()))
                print("  {microseconds:.1f} us, {ratio:.0%} of the copy".format(**found.rows[-1]), flush=True)
        except Exception as error:  # whatever it is, the next is tried
            failed = 1
            said.append(f"{name}: raised {type(error).__name__}: {(str(error) or 'nothing').splitlines()[0]}\n")
            print(said[-1], flush=True)
    return failed


def calls(one_volume: bool = False) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """(name, what makes it) of every call: (operation, label, channels, arguments), forward and backward."""
    from planecycle_fast.geometry.planes import DH, DW, HW
    from tests.specs import add_norm, patchify, plane_switch, rope, self_attention, swiglu

    def each(spec, c, label, channels, directions=("forward", "backward")):
        for i, direction in enumerate(directions):
            name = f"{label}, {direction}"

            def make(i=i, name=name):
                op, arguments = spec.op_arguments(_tensors(c), c.settings)[i]
                return op, name, channels, arguments

            yield f"{spec.op.name}: {name}", make

    for label, sizes, channels, heads, batch in [SHAPES["cuda"][i] for i in ORDER]:
        batch = 1 if one_volume else batch
        for old, new, pool_method in ((HW, DW, "PCg"), (DW, DH, "PCg"), (DH, HW, "PCg"), (HW, DW, "PCm")):
            where, args = f"{label}, {old} to {new}, {pool_method}", (old, new, sizes, 5, channels, batch, pool_method)
            yield from each(plane_switch.SPEC, plane_switch.case(*args), where, channels)
            yield from each(add_norm.SPEC, add_norm.case(*args), where, channels)
        rows = (batch * sizes[0], GLOBALS + sizes[1] * sizes[2], 1)
        yield from each(add_norm.SPEC, add_norm.case(HW, HW, rows, 0, channels, 1), f"{label}, in place", channels)
        c = rope.case("axial", sizes[1:], 5, 3 * heads, channels // heads, batch * sizes[0], 2 * heads, device="cuda")
        yield from each(rope.SPEC, c, f"{label}, packed", channels, ("forward", "backward", "in place"))
        if rows[1] <= ONE_TILE:
            c = self_attention.case(sizes[1:], GLOBALS, heads, channels // heads, batch * sizes[0])
            yield from each(self_attention.SPEC, c, f"{label}, packed", channels)
        c = patchify.case((3, sizes[0], 16 * sizes[1], 16 * sizes[2]), (16, 16), 5, batch)
        yield from each(patchify.SPEC, c, f"{label}, patch 16", channels)
        for packed in (False, True):
            c = swiglu.case(rows[:2], 4 * channels, packed)
            yield from each(swiglu.SPEC, c, f"{label}, {'packed' if packed else 'separate'}", channels)


def _tensors(c) -> dict[str, torch.Tensor]:
    """Random tensors of a case, made on the GPU: a gigabyte takes the CPU many seconds."""
    return {name: torch.randn(shape, dtype=torch.bfloat16, device="cuda") for name, shape in c.tensors.items()}


def tile_calls() -> list[tuple]:
    """(shape, kernel) of everything that has tiles to choose."""
    found = [(shape, kernel) for shape in SHAPES["cuda"][1:] for kernel in ("forward", "backward")]
    return found + [(shape, LINEAR_GELU) for shape in SHAPES["cuda"][1:]]


def with_tiles(shape, kernel: str) -> Iterator[tuple]:
    """(tile, what calls the kernel) of every candidate, chosen for as long as it is yielded; the shipped one first."""
    from planecycle_fast.geometry.planes import DW, HW
    from planecycle_fast.ops import tiles as configs
    from tests.specs import add_norm

    if kernel == LINEAR_GELU:
        yield from _with_tilings(shape)
        return
    c = add_norm.case(HW, DW, shape.sizes, GLOBALS, shape.channels, shape.batch)
    op, arguments = add_norm.SPEC.op_arguments(_tensors(c), c.settings)[("forward", "backward").index(kernel)]
    key, shipped = (kernel, shape.channels), configs.tile(kernel, shape.channels)
    before = configs.TABLE.get(key)
    try:
        for tile in sorted(configs.candidates(kernel, shape.channels), key=lambda tile: tile != shipped):
            configs.TABLE[key] = tile
            yield tile, lambda: op.body(*arguments)
    finally:
        configs.TABLE.pop(key)
        if before is not None:
            configs.TABLE[key] = before


def _with_tilings(shape) -> Iterator[tuple]:
    """The same of `linear_gelu`."""
    from planecycle_fast.ops.activations import linear_gelu_table, linear_gelu_triton
    from tests.specs import linear_gelu

    rows, hidden = shape.batch * shape.sizes[0], 4 * shape.channels
    c = linear_gelu.case((rows, GLOBALS + shape.sizes[1] * shape.sizes[2]), shape.channels, hidden)
    [(op, arguments)] = linear_gelu.SPEC.op_arguments(_tensors(c), c.settings)
    shipped = linear_gelu_table.tiling(hidden)
    for tile in dict.fromkeys((shipped, *linear_gelu_table.CANDIDATES)):
        with patch.object(linear_gelu_triton, "tiling", lambda hidden, tile=tile: tile):
            yield tile, lambda: op.body(*arguments)


def faster_tile(shape, kernel: str) -> str:
    """The fastest other tile as a line, if it is at least 3 % faster than the shipped one; else nothing."""
    from triton.testing import do_bench

    times = {tile: do_bench(call, quantiles=[0.5], **MILLISECONDS) for tile, call in with_tiles(shape, kernel)}
    shipped, best = next(iter(times)), min(times, key=times.get)
    if times[shipped] <= 1.03 * times[best]:
        return ""
    return f"- {kernel}, C = {shape.channels}: {best}, {times[shipped] / times[best]:.2f} times"


def host_time() -> str:
    """What the host needs per block, of a model too small to keep the GPU busy, against a replayed CUDA graph."""
    from time import perf_counter

    import planecycle_fast as pcf
    from planecycle_fast.bench.contenders import vit

    try:
        lifted = pcf.lift(vit("ViT-S", "cuda", torch.bfloat16))
    except MissingPackageError:
        return "Time of the host per block: not measured, timm is not installed\n"
    volume = torch.randn(1, 3, 16, 64, 64, device="cuda", dtype=torch.bfloat16)
    graph, found = pcf.cuda_graph(lifted, volume), []
    for function in (lifted, graph):
        times = []
        for _ in range(30):
            torch.cuda.synchronize()
            began = perf_counter()
            with torch.no_grad():
                function(volume)
            torch.cuda.synchronize()
            times.append(perf_counter() - began)
        found.append(sorted(times)[len(times) // 2] / len(lifted.blocks) * 1e6)
    mark = "" if found[0] <= HOST_BAR else "**"
    return (
        f"ViT-S, 1 x 16 x 64^2, bf16, per block: {mark}{found[0]:.0f}{mark} us from the host "
        f"(bar {HOST_BAR}), {found[1]:.0f} us as a CUDA graph ({found[0] / found[1]:.1f} times)\n"
    )


def time_call(op, label: str, channels: int, arguments: tuple) -> dict:
    """Times one call of an operation, beside a copy that moves as many bytes."""
    from triton.testing import do_bench

    cost = op.cost(*arguments)
    moved = cost.read + cost.written
    milliseconds = do_bench(lambda: op.body(*arguments), quantiles=[0.5], **MILLISECONDS)
    copy = time_copy(moved)
    return {
        "label": f"{op.name}: {label}",
        "channels": channels,
        "megabytes": moved / 1e6,
        "microseconds": milliseconds * 1e3,
        "bandwidth": moved / milliseconds / 1e9,
        "copy": moved / copy / 1e9,
        "ratio": copy / milliseconds,
    }


@cache
def time_copy(moved: int) -> float:
    """Milliseconds of a copy that reads and writes so many bytes together."""
    from triton.testing import do_bench

    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return do_bench(lambda: target.copy_(source), quantiles=[0.5], **MILLISECONDS)


def table(rows: list[dict]) -> str:
    """The rows as Markdown; a ratio below its bar stands in bold."""
    found = []
    for row in rows:
        ratio = f"**{row['ratio']:.0%}**" if row["ratio"] < BAR else f"{row['ratio']:.0%}"
        shown = [f"{row[name]:{form}}" for name, form in
                 (("megabytes", ".1f"), ("microseconds", ".1f"), ("bandwidth", ".2f"), ("copy", ".2f"))]  # fmt: skip
        found.append([row["label"], row["channels"], *shown, ratio])
    lines = [
        f"bf16, median of many runs with caches flushed. Bar: {BAR:.0%} of the copy; **bold** is below it.",
        "Bytes are those that the operation declares.\n",
        *markdown_table(("call", "C", "MB", "us", "TB/s", "copy, TB/s", "of the copy"), found, 1),
    ]
    return "\n".join(lines) + "\n"
