"""Time for the parts of a run: what one leaves over goes to those that follow, and what did not fit is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")


class Part:
    """One part, from when it began."""

    def __init__(self, name: str, seconds: float, clock: Callable[[], float] = perf_counter) -> None:
        self.name, self.seconds, self.left_out = name, seconds, []
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - self._clock())

    def within(self, items: Iterable[tuple[str, Item]]) -> Iterator[Item]:
        """Items of (name, item) as long as there is time; the names of the others are kept."""
        for name, item in items:
            if self.left() > 0:
                yield item
            else:
                self.left_out.append(name)

    def note(self) -> str:
        """What was left out, as a line; nothing if all was done."""
        if not self.left_out:
            return ""
        return f"Left out, as {self.seconds:.0f} s were over ({len(self.left_out)}): {'; '.join(self.left_out)}\n"


class Budget:
    """Seconds of each part, in the order in which they run."""

    def __init__(self, shares: Mapping[str, float], clock: Callable[[], float] = perf_counter) -> None:
        self.shares, self._clock, self._began = dict(shares), clock, clock()

    def begin(self, name: str) -> Part:
        """A part may take its share and whatever those before it have not used."""
        due = 0.0
        for part, seconds in self.shares.items():
            due += seconds
            if part == name:
                break
        return Part(name, max(0.0, due - (self._clock() - self._began)), self._clock)
