"""Progress of many scans, each through many layers, where stderr is a terminal; nothing where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..lifted import LiftedModel
from ..optional import require


class Progress:
    """Two bars: scans, and the layers, or the windows, of the present one."""

    def __init__(self, bars: Any, scans: int, layers: int) -> None:
        self.bars, self.layers = bars, layers
        self.scan_task = bars.add_task("scans", total=scans)
        self.layer_task = bars.add_task("", total=layers)

    def start(self, name: str) -> None:
        self.bars.reset(self.layer_task, total=self.layers, description=require("rich.markup", "scans").escape(name))

    def advance(self, steps: int) -> None:
        self.bars.advance(self.layer_task, steps)

    def windows(self, done: int, total: int) -> None:
        """What `sliding_window` tells: they take the place of layers."""
        self.bars.update(self.layer_task, completed=done, total=total)

    def expect(self, volumes: int) -> None:
        """The present scan holds volumes, each of which `advance_scan` counts besides."""
        self.bars.update(self.scan_task, total=self.bars.tasks[self.scan_task].total + volumes)

    def advance_scan(self) -> None:
        self.bars.advance(self.scan_task)
        self.bars.reset(self.layer_task, total=self.layers)


@contextmanager
def progress_of(model: LiftedModel, scans: int, tiled: bool = False) -> Iterator[Progress]:
    """Shows the bars within the block: of the layers of `model`, or where scans are `tiled`, of what `windows` is told.

    Raises MissingPackageError without rich.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()  # what goes into a pipe must not pass through the bars
    bars = _bars(redirect_stdout=terminal)
    progress = Progress(bars, scans, len(model.blocks) + 1)  # the last norm is a step as well
    with following(model, None if tiled else progress.advance), bars:
        yield progress


@contextmanager
def following(model: LiftedModel, advance: Callable[[int], Any] | None) -> Iterator[None]:
    """Within the block `advance` is called with the number of steps, layers and the last norm, that have been taken.

    Hooks on blocks would make these run otherwise.
    """
    model.after_steps = advance
    try:
        yield
    finally:
        model.after_steps = None


@contextmanager
def window_bar(wanted: bool | Callable[[int, int], Any] | None) -> Iterator[Callable[[int, int], Any]]:
    """Within the block what is to be called with windows done and in all: a bar on a terminal, or a callback."""
    if callable(wanted) or not wanted:
        yield wanted or (lambda done, total: None)
        return
    bars = _bars(redirect_stdout=False)
    task = bars.add_task("windows", total=None)
    with bars:
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _bars(redirect_stdout: bool) -> Any:
    console = require("rich.console", "scans").Console(stderr=True)
    return require("rich.progress", "scans").Progress(
        console=console, transient=True, disable=not console.is_terminal, redirect_stdout=redirect_stdout
    )
