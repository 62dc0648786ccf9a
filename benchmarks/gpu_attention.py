"""Attention with all that leads to it, RoPE and layout included, by every implementation that is here.

A part of ``make gpu``; ``python -m benchmarks.gpu_attention`` is the same without a limit of time. It writes
attention.md and attention.jsonl after every row, and names each size at which another choice than that of
`planecycle_fast.runtime.attention_table` is faster: the table is corrected from it. All take a packed qkv as a linear
layer leaves it and give what the projection takes; in training the gradient of that qkv. Those that do not turn
queries and keys themselves come after `ops.rope`, in place for inference. Outputs are compared first; times are
medians by triton's `do_bench`, caches flushed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.bench.table import markdown_table
from planecycle_fast.bench.timing import compare
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, attention_ref, rope, rope_ref
from planecycle_fast.ops.multihead_attention.attention import attention_on
from planecycle_fast.runtime.attention_table import choose_attention
from planecycle_fast.runtime.attentions import ARCHITECTURES, AttentionCall, why_not_attention, why_not_for

from . import op_peers as peers
from .budget import Part
from .op_cells import GLOBALS, INFERENCE, TRAINING
from .op_measure import TOLERANCE
from .part_table import PartTable, header, results_folder

GRIDS = {21: (4, 4), 261: (16, 16), 1029: (32, 32), 69: (8, 8), 133: (8, 16), 517: (16, 32), 4101: (64, 64)}  # by rows
HEADS = {64: 6, 128: 8}  # by head dimension
ELEMENTS = {torch.bfloat16: 2**26, torch.float32: 2**24}  # of queries: sequences are as many as that needs
CHECKED = 4  # sequences whose outputs are compared
MILLISECONDS = {"warmup": 5, "rep": 30}
BARS = {21: 2.0, 261: 1.4, 1029: 1.0}  # inference, bf16, head dimension 64: times of the best other over ours, by rows
SLACK = 1.03  # the table is not corrected for less


class AttentionCell(NamedTuple):
    """What is measured at once."""

    head_dim: int
    rows: int
    dtype: torch.dtype
    step: str

    @property
    def call(self) -> AttentionCall:
        heads = HEADS[self.head_dim]
        sequences = max(CHECKED, ELEMENTS[self.dtype] // (self.rows * heads * self.head_dim))
        return AttentionCall(self.dtype, sequences, self.rows, heads, self.head_dim, self.step == TRAINING)

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} rows, head dimension {self.head_dim}, {dtype}, {self.step}"


def cells() -> Iterator[AttentionCell]:
    """Those of bars and of whole models first."""
    for dtype in ELEMENTS:
        for head_dim in HEADS:
            for step in (INFERENCE, TRAINING):
                for rows in GRIDS:
                    yield AttentionCell(head_dim, rows, dtype, step)


def contender(name: str, cell: AttentionCell, angles: Axial) -> Callable[[Tensor], Tensor]:
    """From a packed qkv (N, rows, 3*heads, hd) to the context (N, rows, heads, hd). Raises NotHereError."""
    reason = why_not_attention(name)
    if reason is not None:
        raise NotHereError(reason)
    heads, training = cell.call.heads, cell.step == TRAINING
    if name == "triton":
        return peers.own_attention(angles, GLOBALS, training)()

    def call(qkv: Tensor) -> Tensor:
        if training:
            qkv = rope(qkv, angles, GLOBALS, turned=2 * heads)
        else:
            rope(qkv[:, :, : 2 * heads], angles, GLOBALS, inplace=True)
        q, k, v = qkv.split(heads, 2)
        reason = why_not_for(name, q, k, v)
        if reason is not None:
            raise NotHereError(reason)
        return attention_on(name, q, k, v, None)

    return call


def compile_only(cell: AttentionCell, device: str = "cuda") -> None:
    """What is ours of a cell, of few sequences: kernels are the same for any number."""
    packed, angles = inputs(cell, CHECKED, device)
    packed.requires_grad_(cell.step == TRAINING)
    for name in ("triton", "sdpa"):  # by ours, and RoPE before others
        out = contender(name, cell, angles)(packed)
        if out.requires_grad:
            out.backward(torch.ones_like(out))


def inputs(cell: AttentionCell, sequences: int, device: str) -> tuple[Tensor, Axial]:
    """A packed qkv (N, rows, 3*heads, hd), and its angles."""
    call = cell.call
    shape = (sequences, call.rows, 3 * call.heads, call.head_dim)
    angles = Axial(Rope(make_periods(call.head_dim // 4, base=100.0, device=device)), GRIDS[cell.rows])
    return torch.randn(shape, dtype=cell.dtype, device=device), angles


def measure(cell: AttentionCell, device: str = "cuda") -> dict:
    """A row: milliseconds of each contender, or why there are none."""
    call = cell.call
    packed, angles = inputs(cell, call.sequences, device)
    turned = rope_ref(packed[:CHECKED].float(), angles.tables(), GLOBALS, 2 * call.heads)
    expected = attention_ref(*turned.split(call.heads, 2))
    row = {
        "head_dim": call.head_dim,
        "heads": call.heads,
        "rows": call.rows,
        "sequences": call.sequences,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "step": cell.step,
        "ms": {},
        "missing": {},
        "refused": {},
    }
    for name in ARCHITECTURES:
        try:
            attend = contender(name, cell, angles)
            with torch.no_grad():
                agreement = compare({name: attend(packed[:CHECKED].clone())}, expected, TOLERANCE[cell.dtype])[name]
            if agreement.reason is not None:
                row["refused"][name] = agreement.reason
                continue
            row["ms"][name] = time_of(attend, packed, cell.step)
        except NotHereError as reason:
            row["missing"][name] = str(reason)
        except Exception as error:  # the code of others raises anything
            text = f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0]}"
            row["refused" if name == "triton" else "missing"][name] = text
    for repeats in (False, True):
        row["repeat" if repeats else "any"] = choose_attention(packed.device, call, repeats).attention
    return row


def time_of(attend: Callable[[Tensor], Tensor], packed: Tensor, step: str) -> float:
    """Milliseconds of a call, in training of forward and backward; packed: (N, rows, 3*heads, hd)."""
    from triton.testing import do_bench

    if step == INFERENCE:
        with torch.no_grad():
            return do_bench(lambda: attend(packed), quantiles=[0.5], **MILLISECONDS)
    leaf = packed.detach().requires_grad_()
    gradient = torch.randn_like(attend(leaf))
    return do_bench(lambda: torch.autograd.grad(attend(leaf), leaf, gradient), quantiles=[0.5], **MILLISECONDS)


def corrections(row: dict) -> Iterator[str]:
    """Where something else that "auto" might take was faster than what the table says."""
    for sizes in ("any", "repeat"):
        usable = {name: ms for name, ms in row["ms"].items() if sizes == "repeat" or name != "cudnn"}
        chosen = row[sizes]
        if chosen in usable:
            best = min(usable, key=usable.get)
            ratio = usable[chosen] / usable[best]
            if ratio > SLACK:
                yield f"- {described(row)}, sizes: {sizes}: {chosen} is chosen, {best} takes 1/{ratio:.2f} of its time"


def bar_line(row: dict) -> str | None:
    """Our kernels against the best other, where there is a bar."""
    if (row["head_dim"], row["dtype"], row["step"]) != (64, "bfloat16", INFERENCE) or row["rows"] not in BARS:
        return None
    bar, others = BARS[row["rows"]], {name: ms for name, ms in row["ms"].items() if name != "triton"}
    if "triton" not in row["ms"] or not others:
        return f"- {described(row)}: not measured (bar {bar:.1f})"
    best = min(others, key=others.get)
    ratio = others[best] / row["ms"]["triton"]
    verdict = "met" if ratio >= bar else "**missed**"
    return f"- {described(row)}: {best} / triton: {ratio:.2f}, {verdict} (bar {bar:.1f})"


def described(row: dict) -> str:
    return f"{row['rows']} rows, head dimension {row['head_dim']}, {row['dtype']}, {row['step']}"


def text_of(about: str, rows: list[dict], note: str) -> str:
    """The page."""
    names = list(ARCHITECTURES)
    shown = []
    for row in rows:
        best = min(row["ms"].values(), default=0)
        found = {name: f"**{ms:.3f}**" if ms == best else f"{ms:.3f}" for name, ms in row["ms"].items()}
        times = [found.get(name, "") for name in names]
        shown.append((described(row), row["any"], row["repeat"], *times))
    said = {f"- {name}: {why}" for row in rows for kind in ("missing", "refused") for name, why in row[kind].items()}
    lines = [
        about, "ms, RoPE and layout included; training is forward and backward.\n",
        *markdown_table(("size", "chosen", "where sizes repeat", *names), shown, 3),
        "\nBars, times of the best other over those of our kernels:\n", *filter(None, map(bar_line, rows)),
        "\nWhere another choice than the table's is faster:\n", *[line for row in rows for line in corrections(row)],
        "\nNot measured:\n", *sorted(said), "",
    ]  # fmt: skip
    return "\n".join(lines) + note


def run(path: Path, about: str, part: Part, device: str = "cuda") -> int:
    """Measures all cells for which there is time. Returns 1 if our kernels raised or computed something else."""
    stored = path.with_suffix(".jsonl")

    def records(rows: list[dict], note: str) -> str:
        head = {"about": about.strip(), "left_out": part.left_out}
        return "".join([json.dumps(each) + "\n" for each in (head, *rows)])

    table = PartTable(part, {path: lambda rows, note: text_of(about, rows, note), stored: records})
    for cell in table.each((cell.name, cell) for cell in cells()):
        table.add(measure(cell, device))
        for line in (bar_line(table.rows[-1]), *corrections(table.rows[-1])):
            if line is not None:
                print(line, flush=True)
    return int(any(["triton" in row["refused"] for row in table.rows]))


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device was found: nothing to run", file=sys.stderr)
        return 1
    command = "python -m benchmarks.gpu_attention"
    return run(results_folder() / "attention.md", header(command), Part("attention", float("inf")))


if __name__ == "__main__":
    sys.exit(main())
