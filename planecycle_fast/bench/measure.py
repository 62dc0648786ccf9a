"""One group of cells: contenders made, compared, their memory measured, and then timed in turns."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cost.meter import Meter
from ..cost.planning import DEVICES, Planned, plan
from ..optional import MissingPackageError
from . import rows as files
from .cells import (
    AUTHORS_COMPILED,
    COMPILED,
    DTYPES,
    FAST,
    FLOORS,
    GRAPH,
    MODES,
    PEERS,
    REDUCED,
    REFERENCE,
    Cell,
    parse_volume,
)
from .contenders import NotHereError, vit
from .costs import flops, free_bytes, is_out_of_memory, launches, peak_bytes, peer_peak, release
from .expected import Expected
from .floor import Floor
from .networks import network
from .steps import step_of
from .timing import LEAST_ROUNDS, by_turns, summary

VOLUMES = 3  # different ones, in turn


class Effort(NamedTuple):
    """How thoroughly a group is measured."""

    name: str
    rounds: int
    warmups: int  # beside the calls for comparison and memory
    seconds: float  # of all rounds of a group, at most, once there were the least
    least: int = LEAST_ROUNDS
    counted: bool = True  # what is planned, FLOPs, bytes moved and launches, besides times and memory
    exact: bool = True  # training, too, is compared with the reference in float32, not in the contenders' own dtype


QUICK = Effort("quick", rounds=7, warmups=0, seconds=8)
FULL = Effort("full", rounds=20, warmups=2, seconds=120)


class Hosts:
    """The model of the groups that are measured now: made once, gone before the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.key, self.host = device, None, None

    def of(self, cell: Cell) -> nn.Module | None:
        """None for peers. Raises MemoryError for weights that do not fit, MissingPackageError without timm."""
        if cell.model in PEERS:
            return None
        key = cell.model, cell.dtype
        if key != self.key:
            self.key = self.host = None
            release(self.device)
            dtype = DTYPES[cell.dtype]
            needed = sum([p.numel() for p in vit(cell.model, "meta", dtype).parameters()]) * dtype.itemsize
            free = free_bytes(self.device)
            if free is not None and needed > free:
                raise MemoryError(f"weights of {needed} bytes, {free} free")
            self.host, self.key = vit(cell.model, self.device, dtype), key
        return self.host


def measure_group(group: Sequence[Cell], hosts: Hosts, effort: Effort) -> list[files.Row]:
    """A row of each cell of a group; where not even the weights and volumes fit, they say so."""
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # one per contender
            results = Group(group, hosts.device, hosts.of(group[0])).measure(effort)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        results = {cell: {"status": files.OUT_OF_MEMORY, "reason": "of weights and volumes"} for cell in group}
    except MissingPackageError as error:
        results = {cell: {"status": files.NOT_HERE, "reason": str(error)} for cell in group}
    finally:
        if any(["compiled" in cell.code for cell in group]):
            torch._dynamo.reset()
        release(hosts.device)
    made = {"group": uuid.uuid4().hex[:12], "effort": effort.name}
    return [{"cell": cell._asdict(), **results[cell], **made} for cell in group]


@dataclass
class Group:
    """Cells of one model, dtype, volume and step, on one device."""

    cells: Sequence[Cell]
    device: torch.device
    host: nn.Module | None  # None for peers
    results: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    steps: dict[Cell, Callable[[Tensor], Any]] = field(default_factory=dict)  # what may be timed
    seconds: dict[Cell, list[float]] = field(default_factory=dict)  # of every timed call

    def measure(self, effort: Effort) -> dict[Cell, dict[str, Any]]:
        """Everything but the ceilings, by cell."""
        self.results = {cell: {"status": files.MEASURED, "reason": ""} for cell in self.cells}
        _, dtype, volume, step = self.cells[0].group
        torch.manual_seed(1)
        shape = parse_volume(volume).shape
        volumes = [torch.randn(shape, device=self.device).to(DTYPES[dtype]) for _ in range(VOLUMES)]
        in_float32 = effort.exact or step == "inference"
        expected = None if self.host is None else Expected(self.host, dtype, step, volumes[0], in_float32)
        for cell in self.cells:
            try:
                self._prepare(cell, volumes[0], expected, effort.counted)
            except Exception as error:
                self._failed(cell, error)
            if cell not in self.steps:
                release(self.device)
        expected = None  # its float32 weights and outputs
        if self.steps:
            self.seconds = by_turns(
                self.steps, [(volume,) for volume in volumes], device=self.device, rounds=effort.rounds,
                warmups=effort.warmups, seconds=effort.seconds, least=effort.least, raised=self._failed,
            )  # fmt: skip
        for cell, calls in self.seconds.items():
            self.results[cell] |= dict(zip(("seconds", "p20", "p80", "rounds"), summary(calls)))
        return self.results

    def _prepare(self, cell: Cell, volume: Tensor, expected: Expected | None, counted: bool) -> None:
        """Makes a contender, compares it, measures its memory; then it may be timed."""
        result = self.results[cell]
        needed, free = self._foresee(cell) if counted else 0, free_bytes(self.device)
        if free is not None and needed > free:
            words = f"{needed / 2**30:.1f} GiB predicted, {free / 2**30:.1f} GiB free"
            result |= {"status": files.SKIPPED, "reason": words}
            return
        if cell.code in FLOORS:  # compute nothing that could be compared
            step = self._floor.make(cell.code)
            step(volume)
            self.steps[cell] = step
            return
        before = self._held()
        made = network(cell, self.host, volume)
        held = self._held() - before if cell.code == GRAPH else 0  # what a captured graph keeps for itself
        step, result["weight_bytes"] = step_of(cell.step, made), made.weight_bytes
        if expected is None:
            step(volume)
        else:
            agreement, result["compared_at"] = expected.check(cell, made, step)
            result["error"] = agreement.error
            if agreement.reason is not None:
                result |= {"status": files.REFUSED, "reason": agreement.reason}
                return
        result["peak_bytes"] = held + peak_bytes(step, volume)
        if counted and "moved_bytes" not in result and cell.code not in (GRAPH, COMPILED, REDUCED, AUTHORS_COMPILED):
            with Meter() as meter:
                step(volume)
            result |= {"moved_bytes": meter.read + meter.written, "launches": meter.launches}
        if counted and self.device.type == "cuda":
            result["launches"] = launches(step, volume)
        self.steps[cell] = step

    def _foresee(self, cell: Cell) -> int:
        """Notes what is counted without data. Returns the bytes that a contender will need at once, 0 if unknown."""
        costs = flops(cell.model, cell.mode, cell.volume, cell.step)
        self.results[cell] |= {"flops": costs.total, "attention_flops": costs.attention}
        if self.host is None:
            return peer_peak(cell)
        foreseen = _planned(self.host, cell)
        if foreseen is None or cell.code in FLOORS:
            return 0
        if cell.code in (FAST, REFERENCE):
            self.results[cell] |= {
                "planned_bytes": foreseen.peak_bytes, "planned_flops": foreseen.flops, "path": foreseen.path,
                "moved_bytes": foreseen.read + foreseen.written, "launches": foreseen.launches,
            }  # fmt: skip
        return foreseen.peak_bytes

    @cached_property
    def _floor(self) -> Floor:
        cell = self.cells[0]
        return Floor(self.host, parse_volume(cell.volume), cell.step == "finetune")

    def _held(self) -> int:
        if self.device.type != "cuda":
            return 0
        release(self.device)
        return torch.cuda.memory_reserved(self.device)  # what a graph may write to is reserved, and not allocated

    def _failed(self, cell: Cell, error: Exception) -> None:
        """What went wrong becomes the cell's status."""
        if isinstance(error, NotHereError):
            found = files.NOT_HERE, str(error)
        elif is_out_of_memory(error):
            found = files.OUT_OF_MEMORY, ""
        else:
            found = files.FAILED, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.results[cell] |= dict(zip(("status", "reason"), found))
        self.steps.pop(cell, None)


_plans: dict[tuple, Any] = {}


def _planned(host: nn.Module, cell: Cell) -> Planned | None:
    """What `plan` says of a cell; for the authors' code what it says of the reference. None for other devices."""
    device = next(host.parameters()).device.type
    if device not in DEVICES:
        return None
    backend = "auto" if cell.code in (FAST, GRAPH, COMPILED, REDUCED) else "reference"
    key = (cell[:-1], backend)
    if key not in _plans:
        size = parse_volume(cell.volume)
        _plans[key] = plan(
            host, size.shape, dtype=DTYPES[cell.dtype], device=device, step=cell.step,
            backend=backend, **MODES[cell.mode],
        )  # fmt: skip
    return _plans[key]
