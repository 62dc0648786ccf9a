"""One group of cells: contenders made, compared, their memory measured, and then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cost.meter import Meter
from ..cost.planning import DEVICES, Planned, plan
from . import rows as files
from .cells import AUTHORS_COMPILED, COMPILED, DTYPES, FAST, GRAPH, MODES, REFERENCE, Cell, parse_volume
from .contenders import NotHereError
from .costs import flops, free_bytes, is_out_of_memory, launches, peak_bytes, peer_peak, release
from .expected import Expected
from .networks import network
from .steps import step_of
from .timing import interleaved

VOLUMES = 3  # different ones, in turn


class Effort(NamedTuple):
    """How thoroughly a group is timed."""

    name: str
    rounds: int
    warmups: int  # beside the calls for comparison and memory
    seconds: float  # of all rounds of a group, at most, once there were three


QUICK = Effort("quick", rounds=7, warmups=0, seconds=8)
FULL = Effort("full", rounds=20, warmups=2, seconds=120)


@dataclass
class Group:
    """Cells of one model, dtype, volume and step, on one device."""

    cells: Sequence[Cell]
    device: torch.device
    host: nn.Module | None  # None for peers
    results: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    steps: dict[Cell, Callable[[Tensor], Any]] = field(default_factory=dict)  # what may be timed

    def measure(self, effort: Effort) -> dict[Cell, dict[str, Any]]:
        """Everything but the ceilings, by cell."""
        self.results = {cell: {"status": files.MEASURED, "reason": ""} for cell in self.cells}
        _, dtype, volume, step = self.cells[0].group
        size = parse_volume(volume)
        torch.manual_seed(1)
        volumes = [torch.randn(size.shape, device=self.device).to(DTYPES[dtype]) for _ in range(VOLUMES)]
        expected = None if self.host is None else Expected(self.host, dtype, step, volumes[0])
        for cell in self.cells:
            self._attempt(cell, partial(self._prepare, cell, volumes[0], expected))
        expected = None  # its float32 weights and outputs
        self._time(volumes, effort)
        return self.results

    def _prepare(self, cell: Cell, volume: Tensor, expected: Expected | None) -> None:
        """Makes a contender, compares it, measures its memory; then it may be timed."""
        result = self.results[cell]
        costs = flops(cell.model, cell.mode, cell.volume, cell.step)
        result |= {"flops": costs.total, "attention_flops": costs.attention}
        foreseen = None if self.host is None else _planned(self.host, cell)
        if foreseen is not None and cell.code in (FAST, REFERENCE):
            result |= {"planned_bytes": foreseen.peak_bytes, "planned_flops": foreseen.flops, "path": foreseen.path,
                       "moved_bytes": foreseen.read + foreseen.written, "launches": foreseen.launches}  # fmt: skip
        needed = foreseen.peak_bytes if foreseen is not None else peer_peak(cell) if self.host is None else 0
        free = free_bytes(self.device)
        if free is not None and needed > free:
            words = f"{needed / 2**30:.1f} GiB predicted, {free / 2**30:.1f} GiB free"
            result |= {"status": files.SKIPPED, "reason": words}
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
        if "moved_bytes" not in result and cell.code not in (GRAPH, COMPILED, AUTHORS_COMPILED):
            with Meter() as meter:
                step(volume)
            result |= {"moved_bytes": meter.read + meter.written, "launches": meter.launches}
        if self.device.type == "cuda":
            result["launches"] = launches(step, volume)
        self.steps[cell] = step

    def _held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _time(self, volumes: Sequence[Tensor], effort: Effort) -> None:
        """Times all that may be, in turns; what fails beside the others is left out, and it begins again."""
        while self.steps:
            found = {cell: _named(cell, step) for cell, step in self.steps.items()}
            try:
                times = interleaved(
                    found, [(volume,) for volume in volumes], device=self.device, rounds=effort.rounds,
                    warmups=effort.warmups, seconds=effort.seconds,
                )  # fmt: skip
            except _Stopped as stopped:
                cell = stopped.cell
                self._attempt(cell, partial(_raise, stopped.__cause__))
                del self.steps[cell]
                continue
            for cell, of_one in times.items():
                self.results[cell] |= {
                    "seconds": of_one.median, "p20": of_one.p20, "p80": of_one.p80, "rounds": of_one.rounds
                }  # fmt: skip
            return

    def _attempt(self, cell: Cell, what: Callable[[], None]) -> None:
        """Runs `what`; what goes wrong becomes the cell's status."""
        try:
            what()
            return
        except NotHereError as error:
            found = files.NOT_HERE, str(error)
        except Exception as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            found = (files.OUT_OF_MEMORY, "") if is_out_of_memory(error) else (files.FAILED, words)
        self.results[cell] |= dict(zip(("status", "reason"), found))
        release(self.device)


class _Stopped(Exception):
    """A contender raised within its turn."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(str(cell))
        self.cell = cell


def _named(cell: Cell, step: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def call(volume: Tensor) -> Any:
        try:
            return step(volume)
        except Exception as error:
            raise _Stopped(cell) from error

    return call


def _raise(error: BaseException | None) -> None:
    raise error


_plans: dict[tuple, Any] = {}


def _planned(host: nn.Module, cell: Cell) -> Planned | None:
    """What `plan` says of a cell; for the authors' code what it says of the reference. None for other devices."""
    device = next(host.parameters()).device.type
    if device not in DEVICES:
        return None
    backend = "auto" if cell.code in (FAST, GRAPH, COMPILED) else "reference"
    key = (cell[:-1], backend)
    if key not in _plans:
        size = parse_volume(cell.volume)
        _plans[key] = plan(
            host, size.shape, dtype=DTYPES[cell.dtype], device=device, step=cell.step,
            backend=backend, **MODES[cell.mode],
        )  # fmt: skip
    return _plans[key]
