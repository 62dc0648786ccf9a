"""Whether anything is broken on a GPU, in a minute: each thing once, small, compared; one line each. ``make gpu-smoke``

The model is the tests' stand-in for DINOv3 with ViT-S's channels and a few blocks, in bf16: neither timm nor a
checkout is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import planecycle_fast as pcf
from planecycle_fast.bench.cells import COMPILED, DTYPES, FAST, GRAPH, MODES, Cell, parse_volume
from planecycle_fast.bench.expected import TOLERANCE, Expected
from planecycle_fast.bench.networks import network
from planecycle_fast.bench.steps import step_of
from planecycle_fast.bench.table import markdown_table
from planecycle_fast.bench.timing import Agreement, compare

from .budget import Part
from .part_table import PartTable

VOLUME = "2x8x48x64"
OK, BROKEN = "ok", "BROKEN"


class Check(NamedTuple):
    """One thing."""

    name: str
    status: str
    says: str
    seconds: float


def run(path: Path, about: str, part: Part, device: str = "cuda") -> int:
    """Writes a line for each thing. Returns 1 if one is broken."""
    table = PartTable(part, {path: partial(text, about)})
    for check in table.each(checks(device)):
        table.add(_row(*check))
        print(f"  {table.rows[-1].status}: {table.rows[-1].says}", flush=True)
    return int(any([row.status == BROKEN for row in table.rows]))


def _row(name: str, check: Callable[[], str]) -> Check:
    began = perf_counter()
    try:
        status, says = OK, check()
    except Exception as error:  # whatever it is, the next is tried
        status, says = BROKEN, f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0][:300]}"
    return Check(name, status, says, perf_counter() - began)


def text(about: str, rows: Sequence[Check], note: str) -> str:
    """The file."""
    found = [(row.name, row.status, row.says, f"{row.seconds:.1f}") for row in rows]
    lines = markdown_table(("", "", "", "seconds"), found, 3)
    return f"{about}\n" + "\n".join(lines) + f"\n\n{note}"


def checks(device: str) -> Iterator[tuple[str, tuple[str, Callable[[], str]]]]:
    """(name, (name, what compares, and says how near it was, or raises))."""
    from tests.specs import SPECS

    found = [("backends", partial(backends, device))]
    found += [(f"operation {spec.op.name}", partial(operation, spec, device)) for spec in SPECS]
    found += [("operation attention", partial(attention, device))]
    found += [(f"model, {mode}", partial(model, device, mode)) for mode in MODES]
    found += [
        ("a training step", partial(model, device, step="finetune")), ("CUDA graph", partial(graph, device)),
        ("CUDA graph of a training step", partial(model, device, code=GRAPH, step="finetune")),
        ("torch.compile", partial(model, device, code=COMPILED, depth=2)),
    ]  # fmt: skip
    yield from [(name, (name, check)) for name, check in found]


def backends(device: str) -> str:
    """Which implementations are there; on CUDA Triton's must be."""
    found = pcf.backends()
    if device == "cuda" and found["triton"] is not None:
        raise RuntimeError(f"backend triton is not usable: {found['triton']}")
    return ", ".join([f"{name}: {reason or 'usable'}" for name, reason in found.items()])


def operation(spec: Any, device: str) -> str:
    """Outputs and gradients of a typical call within the error budget."""
    from tests.kernelcheck import checks as bed

    if device == "cuda" and (major := torch.cuda.get_device_capability()[0]) not in {
        a // 10 for a in spec.architectures
    }:
        return f"not for compute capability {major}.x"
    dtype = DTYPES[_dtype(device)]
    on_device = lambda t: t.to(device)  # noqa: E731
    bed.error_budget(spec, spec.typical, dtype, on_device, on_device)
    return f"{spec.typical.name or 'typical'}: outputs and gradients within the budget"


def attention(device: str) -> str:
    """Of a packed qkv, against float32."""
    from planecycle_fast.ops import attention, attention_ref

    packed = torch.randn(4, 261, 3, 6, 64, dtype=DTYPES[_dtype(device)], device=device)
    expected = attention_ref(*packed.float().unbind(2))
    return _near(compare({"": attention(*packed.unbind(2))}, expected, TOLERANCE[_dtype(device)])[""])


def model(device: str, mode: str = "PCg", code: str = FAST, step: str = "inference", depth: int = 4) -> str:
    """Features, or also the gradient of what a volume meets first, against the reference in float32."""
    host, volume = _host(device, depth)
    cell = Cell("stand-in", _dtype(device), VOLUME, step, mode, code)
    try:
        made = network(cell, host, volume)
        return _near(Expected(host, cell.dtype, step, volume).check(cell, made, step_of(step, made))[0])
    finally:
        torch._dynamo.reset()


def graph(device: str) -> str:
    """A captured model replays what it computes eagerly, to the bit, on a volume that it has not seen."""
    host, volume = _host(device)
    lifted = pcf.lift(host)
    replay, other = pcf.cuda_graph(lifted, volume), torch.randn_like(volume)
    with torch.no_grad():
        expected = lifted(other).patches
    if not torch.equal(replay(other).patches, expected):
        raise AssertionError("a replay differs from the eager model")
    return "a replay equals the eager model to the bit"


def _dtype(device: str) -> str:
    return "bf16" if device == "cuda" else "fp32"


def _host(device: str, depth: int = 4) -> tuple[nn.Module, Tensor]:
    from tests.standins import DinoVisionTransformer

    torch.manual_seed(0)
    dtype = DTYPES[_dtype(device)]
    with torch.device(device):
        host = DinoVisionTransformer(embed_dim=384, num_heads=6, depth=depth, patch_size=16).to(dtype).eval()
    with torch.no_grad():  # the stand-in's own are for a sixth of the channels
        for parameter in host.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5)
    return host.to(device), torch.randn(parse_volume(VOLUME).shape, device=device).to(dtype)


def _near(agreement: Agreement) -> str:
    if agreement.reason is not None:
        raise AssertionError(agreement.reason)
    return f"off by {agreement.error:.1e} of the largest value"
