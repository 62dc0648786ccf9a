"""Records what kernels really do under the interpreter: every load, store and launch."""

from collections import Counter
from contextlib import contextmanager

import numpy as np

from .observers import Observer, observing


class Record(Observer):
    """What the kernels of a block loaded, stored (bytes; masked lanes do not count) and launched (by kernel)."""

    def __init__(self, uncounted=(), once=()):
        self.uncounted, self.once = uncounted, once
        self.read = self.written = 0
        self.launches = Counter()
        self.seen = {}  # of arguments in `once`, by kernel and name: what has been loaded
        self.stored = {}  # arguments that were written to, by kernel

    def launched(self, launch):
        self.launches[launch.kernel] += 1

    def accessed(self, access):
        if access.kind != "load":
            self.stored.setdefault(access.launch.kernel, set()).add(access.argument.name)
        if access.argument.name in self.uncounted:
            return
        size = access.distances.size * access.width
        if access.kind == "load" and access.argument.name in self.once:
            key = access.launch.kernel, access.argument.name
            before = self.seen.get(key, np.empty(0, np.int64))
            self.seen[key] = np.union1d(before, access.distances)
            size = (self.seen[key].size - before.size) * access.width
        if access.kind in ("load", "atomic"):
            self.read += size
        if access.kind in ("store", "atomic"):
            self.written += size


@contextmanager
def recording(uncounted=(), once=()):
    """Within it every kernel that the interpreter runs is recorded in the `Record` that it gives.

    Arguments of kernels in `uncounted` are not: the ledger leaves out weights, statistics and tables. Of those in
    `once`, which programs share by caches, each element counts once per kernel.
    """
    with observing(Record(uncounted, once)) as record:
        yield record
