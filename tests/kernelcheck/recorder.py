"""Records what kernels really do under the interpreter: every load, store and launch."""

from collections import Counter
from contextlib import contextmanager

from .observers import Observer, observing


class Record(Observer):
    """What the kernels of a block loaded, stored (bytes; masked lanes do not count) and launched (by kernel)."""

    def __init__(self, uncounted=()):
        self.uncounted = uncounted
        self.read = self.written = 0
        self.launches = Counter()
        self.stored = {}  # arguments that were written to, by kernel

    def launched(self, launch):
        self.launches[launch.kernel] += 1

    def accessed(self, access):
        if access.kind != "load":
            self.stored.setdefault(access.launch.kernel, set()).add(access.argument.name)
        if access.argument.name in self.uncounted:
            return
        size = access.distances.size * access.width
        if access.kind in ("load", "atomic"):
            self.read += size
        if access.kind in ("store", "atomic"):
            self.written += size


@contextmanager
def recording(uncounted=()):
    """Within it every kernel that the interpreter runs is recorded in the `Record` that it gives.

    Arguments of kernels in `uncounted` are not: the ledger leaves out weights, statistics and tables.
    """
    with observing(Record(uncounted)) as record:
        yield record
