"""Whether anything is broken on a GPU, in a minute: each thing once, small, compared; one line each. ``make gpu-smoke``

The model is the tests' stand-in for DINOv3 with ViT-S's channels and a few blocks, in bf16: neither timm nor a
checkout is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import planecycle_fast as pcf
from planecycle_fast.bench.cells import MODES
from planecycle_fast.bench.timing import compare

from .budget import Part
from .part_table import PartTable

TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}  # of the largest value, against the reference in float32
VOLUME = (2, 3, 8, 48, 64)
OK, BROKEN = "ok", "BROKEN"


class Row(NamedTuple):
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


def _row(name: str, check: Callable[[], str]) -> Row:
    began = perf_counter()
    try:
        status, says = OK, check()
    except Exception as error:  # whatever it is, the next is tried
        status, says = BROKEN, f"{type(error).__name__}: {(str(error) or 'without a message').splitlines()[0][:300]}"
    return Row(name, status, says, perf_counter() - began)


def text(about: str, rows: Sequence[Row], note: str) -> str:
    """The file."""
    lines = ["| | | | seconds |", "| --- | --- | --- | ---: |"]
    lines += [f"| {row.name} | {row.status} | {row.says} | {row.seconds:.1f} |" for row in rows]
    return f"{about}\n" + "\n".join(lines) + f"\n\n{note}"


def checks(device: str) -> Iterator[tuple[str, tuple[str, Callable[[], str]]]]:
    """(name, (name, what compares, and says how near it was, or raises))."""
    from tests.specs import SPECS

    found = [("backends", partial(backends, device))]
    found += [(f"operation {spec.op.name}", partial(operation, spec, device)) for spec in SPECS]
    found += [("operation attention", partial(attention, device))]
    found += [(f"model, {mode}", partial(model, mode, device)) for mode in MODES]
    found += [("a training step", partial(training, device)), ("CUDA graph", partial(graph, device)),
              ("CUDA graph of a training step", partial(graphed_training, device)),
              ("torch.compile", partial(compiled, device))]  # fmt: skip
    for each in found:
        yield each[0], each


def backends(device: str) -> str:
    """Which implementations are there; on CUDA Triton's must be."""
    found = pcf.backends()
    if device == "cuda" and found["triton"] is not None:
        raise RuntimeError(f"backend triton is not usable: {found['triton']}")
    return ", ".join([f"{name}: {reason or 'usable'}" for name, reason in found.items()])


def operation(spec: Any, device: str) -> str:
    """Outputs and gradients of a typical call within the error budget."""
    from tests.kernelcheck import checks as bed

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    on_device = lambda t: t.to(device)  # noqa: E731
    bed.error_budget(spec, spec.typical, dtype, on_device, on_device)
    return f"{spec.typical.name or 'typical'}: outputs and gradients within the budget"


def attention(device: str) -> str:
    """Of a packed qkv, against float32."""
    from planecycle_fast.ops import attention, attention_ref

    packed = torch.randn(4, 261, 3, 6, 64, dtype=_dtype(device), device=device)
    return _near(attention(*packed.unbind(2)), attention_ref(*packed.float().unbind(2)), packed.dtype)


def model(mode: str, device: str) -> str:
    """Features of a lifted model against the reference in float32."""
    host, volume = _host(device)
    with torch.no_grad():
        got = pcf.lift(host, **MODES[mode])(volume)
        expected = _reference(host, mode)(volume.float())
    return _near((got.patches, got.pooled()), (expected.patches, expected.pooled()), volume.dtype)


def training(device: str) -> str:
    """The gradient of the first weights, which has passed through everything, against the reference in float32."""
    host, volume = _host(device)
    return _near(_gradient(pcf.lift(host), volume), _gradient(_reference(host, "PCg"), volume.float()), volume.dtype)


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


def graphed_training(device: str) -> str:
    """The gradient by `torch.cuda.make_graphed_callables`."""
    host, volume = _host(device)
    expected, lifted = _gradient(pcf.lift(host), volume), _Pooled(pcf.lift(host))
    graphed = torch.cuda.make_graphed_callables(lifted, (torch.randn_like(volume),), allow_unused_input=True)
    return _near(_gradient(lifted, volume, graphed), expected, volume.dtype)


def compiled(device: str) -> str:
    """torch.compile of a lifted model, inference."""
    torch._dynamo.reset()
    host, volume = _host(device, depth=2)
    lifted = pcf.lift(host)
    with torch.no_grad():
        return _near(torch.compile(lifted)(volume).patches, _reference(host, "PCg")(volume.float()).patches,
                     volume.dtype)  # fmt: skip


class _Pooled(nn.Module):
    """Tensors in, a tensor out, as graphed callables must be."""

    def __init__(self, lifted: nn.Module) -> None:
        super().__init__()
        self.lifted = lifted

    def forward(
        self,
        volume: Tensor,  # (B, 3, D, height, width)
    ) -> Tensor:  # (B, C)
        return self.lifted(volume).pooled()


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _host(device: str, depth: int = 4) -> tuple[nn.Module, Tensor]:
    from tests.standins import DinoVisionTransformer

    torch.manual_seed(0)
    with _on(device):
        host = DinoVisionTransformer(embed_dim=384, num_heads=6, depth=depth, patch_size=16).to(_dtype(device)).eval()
    with torch.no_grad():  # the stand-in's own are for a sixth of the channels
        for parameter in host.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5)
    return host.to(device), torch.randn(VOLUME, device=device).to(_dtype(device))


@contextmanager
def _on(device: str) -> Iterator[None]:
    with torch.device(device):
        yield


def _reference(host: nn.Module, mode: str) -> nn.Module:
    return pcf.lift(copy.deepcopy(host).float(), backend="reference", **MODES[mode])


def _gradient(
    model: nn.Module,
    volume: Tensor,  # (B, 3, D, height, width)
    run: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Of the loss with respect to the weights that a volume meets first."""
    out = (run or model)(volume)
    pooled = out if isinstance(out, Tensor) else out.pooled()
    weight = next(p for name, p in model.named_parameters() if "patch_embed" in name and p.ndim > 1)
    pooled.float().square().mean().backward()
    gradient = weight.grad.clone()
    for parameter in model.parameters():
        parameter.grad = None
    return gradient


def _near(got: Any, expected: Any, dtype: torch.dtype) -> str:
    agreement = compare({"": got}, expected, TOLERANCE[dtype])[""]
    if agreement.reason is not None:
        raise AssertionError(agreement.reason)
    return f"off by {agreement.error:.1e} of the largest value"
