"""What kernels do in the interpreter, as observers are told of it.

Pointers of a kernel are no addresses here but places: the upper byte says to which tensor of the launch one belongs,
the rest how far it is from that tensor's first element. An access far outside is seen as what it is, whatever lies
there; and tensors on `meta` have places too.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .elements import Elements

NUMBER = np.uint64(56)  # how far to shift a place to get the number of its tensor
MOST_TENSORS = 127  # of a launch
MIDDLE = 1 << 55  # the place of a tensor's first element, but for the number: room for distances of either sign


class Fault(AssertionError):
    """What a kernel must not do."""


@dataclass(frozen=True, eq=False)
class Argument:
    """A tensor that a kernel is given."""

    name: str
    tensor: torch.Tensor
    number: int  # within its launch: odd, so that a place far outside is no other tensor's

    @cached_property
    def elements(self):
        return Elements(self.tensor.shape, self.tensor.stride())

    @cached_property
    def place(self):  # of the first element, aligned as the tensor is
        return (self.number << int(NUMBER)) + MIDDLE + self.tensor.data_ptr() % 256

    def __str__(self):
        return f"{self.name} of shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()}"


@dataclass
class Launch:
    """One run of a kernel over a grid."""

    kernel: str
    values: dict[str, Any]  # of its parameters
    grid: tuple[int, int, int] = (1, 1, 1)
    tensors: dict[int, Argument] = field(default_factory=dict)  # by number
    argument: str = ""  # which is made ready
    program: tuple[int, int, int] = (0, 0, 0)  # which runs

    def add(self, tensor):
        """The `Argument` that a tensor is. Raises Fault for more than `MOST_TENSORS`."""
        if len(self.tensors) == MOST_TENSORS:
            raise Fault(f"{self.kernel} takes more than {MOST_TENSORS} tensors")
        argument = Argument(self.argument, tensor, 2 * len(self.tensors) + 1)
        self.tensors[argument.number] = argument
        return argument

    def __str__(self):
        return f"{self.kernel}, program {self.program}"


@dataclass(frozen=True, eq=False)
class Access:
    """What the lanes that are not masked do to one tensor."""

    kind: str  # "load", "store", "atomic"
    argument: Argument
    distances: np.ndarray  # (N,) int64, bytes from the tensor's first element
    width: int  # bytes
    values: np.ndarray | None  # (N,), of a store
    launch: Launch


class Observer:
    """Told of all that kernels do, before they do it."""

    moves_data = True  # whether loads and stores happen; if not, loads give zeros

    def launched(self, launch):
        """A launch begins."""

    def programs(self, grid):
        """Which programs to run: triples, or None for all."""

    def steps(self, steps):
        """Which of a loop's `steps`, a range, to run."""
        return steps

    def accessed(self, access):
        """An access is about to happen."""


launches = []  # the one that runs; none in between
watching = []  # who is told; `interpreter.patch` adds the sanitizers for good


@contextmanager
def observing(observer):
    """Within it `observer` is told of all kernels that run."""
    watching.append(observer)
    try:
        yield observer
    finally:
        watching.remove(observer)
