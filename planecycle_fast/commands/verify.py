"""`planecycle-fast verify`: the fast path against the reference on this machine, block by block, outputs and gradients.

An element may be off by twice the largest error that the reference makes in the same dtype, over several random inputs,
plus one rounding of its own; errors are distances from float64. Each block gets the very stream that the reference's
block gets, so that an error shows where it is made. What is missing, of another shape or dtype, or not finite is out of
the budget. Casts that truncate instead of rounding fit into it; the tests of the operations look for those.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cost.gpus import KNOWN_DTYPES
from ..engine.stream import Layer, Stream
from ..inputs import dtype_of, parse_shape, usable_device, with_channels
from ..lifted import LiftedModel, lift
from ..optional import require
from ..pretrained import settings_of
from ..runtime.backends import pick
from ..weights.load import load_model
from . import options
from .options import Argument, Option

FACTOR = 2.0  # times the reference's largest error
Groups = dict[str, dict[str, Tensor]]  # what is compared: tensors by name, in groups by name


class Comparison(NamedTuple):
    """One comparison."""

    what: str  # "block 3", "features", "gradients of block 3", "gradient of the volume", ...
    error: float  # the largest distance from float64 of the fast path
    reference: float  # and of the reference, over all inputs
    share: float  # of what is allowed, at most, in any element

    @property
    def within(self) -> bool:
        """Whether the error is within the budget."""
        return self.share <= 1.0


def compare(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    seeds: int = 8,
    **settings: Any,
) -> list[Comparison]:
    """Compares one volume's features, every block's output, and all gradients.

    Args:
        model: a 2D vision transformer; it stays as it is.
        shape: of the volume, (B, channels, D, height, width) in pixels.
        backend: of the fast path. The reference runs on "reference".
        seeds: random volumes whose errors tell how large the reference's are.
        settings: as `lift` takes them.

    Raises ValueError for what `lift` or the model refuses, for fewer than one seed, and where the reference is not
    finite or has no gradient where float64 has one: it measures nothing then.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    host = copy.deepcopy(model).to(device, dtype).eval()
    fast = lift(host, backend=backend, **settings)
    plain = lift(host, backend="reference", **settings)
    exact = lift(copy.deepcopy(host).double(), backend="reference", **settings)
    first, largest = {}, {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        volume = torch.randn(shape, generator=generator).to(device, dtype)
        _, streams = _watched(plain, volume)
        models = {"plain": plain, "exact": exact} | ({"fast": fast} if seed == 0 else {})
        found = {name: _everything(lifted, volume, streams) for name, lifted in models.items()}
        for key, error in _reference_errors(found["plain"], found["exact"]).items():
            largest[key] = max(error, largest.get(key, 0.0))
        first = first or found
    return [_comparison(what, first, largest) for what in first["exact"]]


def _reference_errors(plain: Groups, exact: Groups) -> dict[tuple[str, str], float]:
    """The reference's errors by group and name. Raises ValueError where it measures nothing."""
    ours, theirs = [[(what, name) for what in groups for name in groups[what]] for groups in (plain, exact)]
    if ours != theirs:
        raise ValueError(f"the reference and float64 do not have the same gradients: {set(ours) ^ set(theirs)}")
    found = {(what, name): _error(plain[what][name], exact[what][name]) for what, name in ours}
    for (what, name), error in found.items():
        if not math.isfinite(error):
            raise ValueError(f"the reference is not finite in {what} ({name}); take another dtype or other weights")
    return found


def _comparison(what: str, first: dict[str, Groups], largest: dict[tuple[str, str], float]) -> Comparison:
    got, plain, exact = [first[name].get(what, {}) for name in ("fast", "plain", "exact")]
    errors, shares = [], []
    for name in plain.keys() | got.keys():
        a, b = got.get(name), plain.get(name)
        comparable = a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)
        if not comparable:
            errors.append(math.inf)
            shares.append(math.inf)
            continue
        kind, right = torch.finfo(a.dtype), exact[name]
        allowed = FACTOR * largest[what, name] + right.double().abs() * kind.eps / 2 + kind.smallest_normal
        errors.append(_error(a, right))
        shares.append(_error(a, right, allowed))
    return Comparison(what, max(errors), max([largest[what, name] for name in plain]), max(shares))


def _watched(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
) -> tuple[list[Layer], list[Stream]]:
    """What each block is called with in a pass without gradients."""
    calls = []
    handles = [block.register_forward_pre_hook(lambda _, args: calls.append(args)) for block in lifted.blocks]
    try:
        with torch.no_grad():
            lifted(volume)
    finally:
        for handle in handles:
            handle.remove()
    return [layer for _, layer in calls], [Stream(*[None if t is None else t.clone() for t in s]) for s, _ in calls]


def _everything(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
    streams: list[Stream],  # of the reference
) -> Groups:
    """All that is compared of a model; blocks on these streams."""
    dtype = next(p.dtype for p in lifted.parameters() if p.is_floating_point())
    volume, found = volume.to(dtype), {}
    own, _ = _watched(lifted, volume)
    with torch.no_grad():
        found["features"] = {name: t for name, t in lifted(volume)._asdict().items() if t is not None}
        for i, (block, layer, stream) in enumerate(zip(lifted.blocks, own, streams)):
            out = block(Stream(*[None if t is None else t.to(dtype) for t in stream]), layer)
            tokens, g = _tokens(out), layer.num_globals
            found[f"block {i}"] = {"globals": tokens[:, :g], "patches": tokens[:, g:]}
    return found | _gradients(lifted, volume)


def _tokens(stream: Stream) -> Tensor:  # (B*P, g + L, C), float64
    """The sum without another rounding."""
    total = stream.residual.double()
    if stream.branch is None:
        return total
    branch = stream.branch.double()
    return total + (branch if stream.scale is None else branch * stream.scale.double())


def _gradients(
    lifted: LiftedModel,
    volume: Tensor,  # (B, channels, D, height, width)
) -> Groups:
    """Of the features, each weighted at random, for the volume and every parameter."""
    volume = volume.detach().requires_grad_()
    outputs = [t for t in lifted(volume) if t is not None]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    hosts = list(lifted.adapter.blocks)
    blocks = {id(p): f"gradients of block {i}" for i, block in enumerate(hosts) for p in block.parameters()}
    leaves = {name: p for name, p in lifted.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(outputs, [volume, *leaves.values()], weights, allow_unused=True)
    found: Groups = {"gradient of the volume": {} if grads[0] is None else {"volume": grads[0]}}
    for (name, leaf), grad in zip(leaves.items(), grads[1:]):
        if grad is not None:
            found.setdefault(blocks.get(id(leaf), "gradients of the rest"), {})[name] = grad
    return dict(sorted(found.items(), key=lambda item: item[0] in ("gradient of the volume", "gradients of the rest")))


def _error(got: Tensor, exact: Tensor, allowed: Tensor | float = 1.0) -> float:
    """The largest distance, as a share of what each element is allowed; infinite where either is not finite."""
    if exact.numel() == 0:
        return 0.0
    share = ((got.double() - exact.double()).abs() / allowed).max().item()
    return math.inf if math.isnan(share) else share


def run_verify(
    model: Annotated[
        str, Argument(help="A timm or Hugging Face name, or a folder; without a hub a name's weights are random.")
    ],
    volume: Annotated[str, Option(help=options.VOLUME)] = "1x8x64",
    dtype: Annotated[str, Option(help="fp32, bf16, fp16.")] = "fp32",
    device: Annotated[str, Option(help="cpu, cuda, cuda:1; auto takes CUDA where there is one.")] = "auto",
    backend: Annotated[str, Option(help="auto, triton, cpu.")] = "auto",
    mode: options.Mode = None,
    cycle_order: options.CycleOrder = None,
    pool_method: options.PoolMethod = None,
    globals_at: options.GlobalsAt = None,
    depth_position: options.DepthPosition = None,
) -> int:
    """The fast path against the reference on this machine: outputs and gradients, block by block."""
    from ..bench.contenders import randomise

    given = dict(mode=mode, cycle_order=cycle_order, pool_method=pool_method, globals_at=globals_at)
    shape = parse_shape(volume)
    number = dtype_of(dtype, KNOWN_DTYPES)
    on = usable_device(device)
    named = pick(backend, on, "add_norm")
    table = require("rich.table", "bench").Table(box=None, padding=(0, 1, 0, 0))
    loaded, source = load_model(model)
    if source.startswith("RANDOM"):
        loaded, source = randomise(loaded), "random weights that show every part"
    shape, settings = with_channels(shape, loaded), settings_of(model, **given, depth_position=depth_position)
    rows = compare(loaded, shape, dtype=number, device=on, backend=backend, **settings)
    print(f"{model}, {source}\nvolume {volume}, {dtype}, {settings['mode']}, backend {named} on {on}")
    for name in ("", "error", "reference's", "of its budget", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        verdict = "ok" if row.within else "TOO LARGE"
        table.add_row(row.what, f"{row.error:.2e}", f"{row.reference:.2e}", f"{row.share:.0%}", verdict)
    require("rich.console", "bench").Console().print(table)
    wrong = [row.what for row in rows if not row.within]
    within = "within the budget: at most twice the reference's error"
    print(f"out of the budget: {', '.join(wrong)}" if wrong else within)
    return int(bool(wrong))
