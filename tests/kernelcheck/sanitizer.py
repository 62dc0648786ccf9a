"""Bounds and races: what the interpreter does not see of a kernel, and a GPU does not tell.

Bounds: every lane of every load, store and atomic must be an element of the view that its pointer comes from; that the
view's storage goes on behind it does not help. Races: programs run at once on a GPU, in any order, so what one of them
writes no other may read or write within the launch, unless both do it by atomics. Reads by many, lanes that share an
element of an expanded view, and a program that writes where it has read itself (in place) are fine.

What is not understood: programs that wait for each other by atomics (they are reported), pointers that come from
memory and large views that overlap themselves (refused), the order of accesses of the threads of one program, and a
descriptor's scatter that names a row twice.
"""

import numpy as np

from .observers import Fault, Observer


class BoundsError(Fault):
    """An access to something that is no element of the tensor that the kernel was given."""


class RaceError(Fault):
    """Two programs of a launch, or two lanes of a store, meet in one element."""


class Bounds(Observer):
    """Raises BoundsError before an access that is not to elements."""

    def accessed(self, access):
        argument, size = access.argument, access.argument.tensor.element_size()
        outside = np.zeros(access.distances.shape, bool)
        for part in range(0, access.width, size):  # more than one where a kernel takes several elements as one
            outside |= ~argument.elements.contain((access.distances + part) // size)
        misaligned = (access.distances + argument.tensor.data_ptr()) % access.width != 0
        if outside.any() or misaligned.any():
            wrong, what = (outside, "no element") if outside.any() else (misaligned, "an odd address")
            distance = int(access.distances[wrong][0])
            raise BoundsError(
                f"{access.launch}: {access.kind} at {what} of {argument}: "
                f"{np.count_nonzero(wrong)} of {wrong.size} lanes, the first {distance} bytes from the first element"
                f"{', within its storage' if _in_storage(argument.tensor, distance, access.width) else ''}"
            )


def _in_storage(tensor, distance, width):
    start = tensor.storage_offset() * tensor.element_size() + distance
    return 0 <= start <= tensor.untyped_storage().nbytes() - width


class Races(Observer):
    """Raises RaceError before an access that races with an earlier one of the same launch."""

    def launched(self, launch):
        storages = [a.tensor.untyped_storage() for a in launch.tensors.values() if a.tensor.device.type != "meta"]
        self.blocks = []
        for start, end in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
            if self.blocks and start < self.blocks[-1].end:  # the same memory, by another storage
                self.blocks[-1].end = max(end, self.blocks[-1].end)
            else:
                self.blocks.append(_Block(start, end))

    def accessed(self, access):
        tensor = access.argument.tensor
        if tensor.device.type != "meta" and access.distances.size:  # on meta nothing is there, of any size
            address = tensor.data_ptr()
            next(block for block in self.blocks if block.start <= address < block.end).accessed(access, address)


class _Block:
    """Who touched which cell of some memory. A cell is as large as the smallest access so far."""

    def __init__(self, start, end):
        self.start, self.end = start, end
        self.cell = None
        self.seen = {}  # by kind: the first program that did it to a cell and another one, counted from 1

    def accessed(self, access, address):
        self._fit(access.width)
        cells = (address - self.start + access.distances) // self.cell
        if access.width > self.cell:
            cells = (cells[:, None] + np.arange(access.width // self.cell)).ravel()
        program = np.ravel_multi_index(access.launch.program, access.launch.grid) + 1
        if access.kind == "store":
            _check_lanes(access)
        for kind, programs in self.seen.items():
            if kind == access.kind != "store":  # reads do not race with reads, nor atomics with atomics
                continue
            for who in programs:
                before = who[cells]
                racing = (before != 0) & (before != program)
                if racing.any():
                    self._report(access, kind, cells, racing, before, address)
        self._note(access.kind, cells, program)

    def _fit(self, width):
        """Makes cells at most so many bytes."""
        if self.cell is None:
            self.cell = width
        elif width < self.cell:
            parts = self.cell // width
            self.seen = {kind: tuple(np.repeat(who, parts) for who in both) for kind, both in self.seen.items()}
            self.cell = width

    def _note(self, kind, places, program):
        if kind not in self.seen:
            cells = -(-(self.end - self.start) // self.cell)
            self.seen[kind] = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        first, other = self.seen[kind]
        before = first[places]
        other[places[(before != 0) & (before != program)]] = program
        first[places[before == 0]] = program

    def _report(self, access, kind, cells, racing, before, address):
        launch, argument = access.launch, access.argument
        place = np.flatnonzero(racing)[0]
        earlier = tuple(int(i) for i in np.unravel_index(int(before[place]) - 1, launch.grid))
        distance = self.start + int(cells[place]) * self.cell - address
        element = argument.elements.index(distance // argument.tensor.element_size())
        words = {"load": "read", "store": "write", "atomic": "atomic"}
        raise RaceError(
            f"{launch.kernel}: {words[kind]}-{words[access.kind]} race of programs {earlier} and {launch.program} "
            f"at element {element} of {argument}"
        )


def _check_lanes(access):
    """Lanes of one store that share an element must write the same."""
    if (np.diff(access.distances) > 0).all():
        return
    distances, order = np.unique(access.distances, return_index=True)
    if distances.size == access.distances.size:
        return
    values = np.ascontiguousarray(access.values)
    bits = values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values
    same = bits[order][np.searchsorted(distances, access.distances)]
    if (bits != same).any():
        distance = int(access.distances[np.flatnonzero(bits != same)[0]])
        element = access.argument.elements.index(distance // access.argument.tensor.element_size())
        raise RaceError(f"{access.launch}: lanes of one store write different values to {element} of {access.argument}")
