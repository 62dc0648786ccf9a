"""Whether a CUDA graph is being recorded in this thread, and what a recorded pass draws on the host.

A replay runs no Python: what a host draws on the CPU has to be drawn again before it, into the memory that the recorded
kernels read. (What is drawn on the device is new in every replay by itself.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_here = threading.local()


class HostDraws:
    """Random draws of one pass on the host, in order, and where the device finds them."""

    def __init__(self) -> None:
        self._draws: list[tuple[Callable[[], Tensor], Tensor]] = []
        self._next: int | None = None  # to be handed out; None: what is asked for is collected

    def collect(self) -> None:
        """A pass begins, whose draws become those of this object."""
        self._draws, self._next = [], None

    def hand_out(self) -> None:
        """The same pass begins again: it gets the memory that was filled for the first."""
        self._next = 0

    def take(self, draw: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `draw` gives, on a device. Raises RuntimeError for a draw that was not collected."""
        if self._next is None:
            self._draws.append((draw, draw().to(device)))
            return self._draws[-1][1]
        if self._next == len(self._draws):
            raise RuntimeError("the model draws another number of times on the CPU in every pass")
        self._next += 1
        return self._draws[self._next - 1][1]

    def draw_again(self) -> None:
        """New values for the next replay."""
        for draw, place in self._draws:
            place.copy_(draw())

    def draw_only(self) -> None:
        """Takes from the host's generator what one pass takes."""
        for draw, _ in self._draws:
            draw()


@contextmanager
def recording(draws: HostDraws) -> Iterator[None]:
    """Within the block a pass of this thread is recorded, or run to be recorded."""
    before = getattr(_here, "draws", None)
    _here.draws = draws
    try:
        yield
    finally:
        _here.draws = before


def is_recording() -> bool:
    """Whether this runs within `recording`, in this thread."""
    return getattr(_here, "draws", None) is not None


def drawn_on_host(draw: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Random numbers that a model draws on the CPU, as a tensor on a device; drawn again before every replay."""
    if torch.compiler.is_compiling() or not is_recording():
        return draw().to(device)
    draws: HostDraws = _here.draws
    return draws.take(draw, device)
