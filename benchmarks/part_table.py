"""What a part of ``make gpu`` writes: whole after every row, so that a stop at any moment loses the row it was at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from planecycle_fast.bench.environment import about, folder_name

from .budget import Part

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
Item = TypeVar("Item")


def results_folder() -> Path:
    """That of this GPU."""
    folder = RESULTS / folder_name(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def header(command: str) -> str:
    """Where and of what a result of this GPU is, as a line."""
    return about(torch.device("cuda"), command)


def write(path: Path, text: str) -> None:
    """Puts a file in place of the one before in one step: whoever reads, or stops us, finds one of the two."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class PartTable:
    """The rows of a part, and its files."""

    def __init__(
        self, part: Part, files: Mapping[Path, Callable[[list, str], str]]
    ) -> None:  # files: what makes the text of each, of all rows and of what is to be said below them
        self.part, self.files, self.rows, self._at = part, files, [], ""
        self._write()

    def each(self, items: Iterable[tuple[str, Item]]) -> Iterator[Item]:
        """Items of (name, item) as long as there is time. The one at work is named in the files: it may be the last."""
        for name, item in self.part.within((name, (name, item)) for name, item in items):
            print(f"{self.part.name}: {name}", flush=True)
            self._at = name
            self._write()
            yield item
        self.close()

    def add(self, row: Any) -> None:
        self.rows.append(row)
        self._write()

    def close(self) -> None:
        """Nothing more will come."""
        self._at = ""
        self._write()

    def _write(self) -> None:
        note = self.part.note() + (f"Not finished: {self._at}\n" if self._at else "")
        for path, text in self.files.items():
            write(path, text(self.rows, note))
