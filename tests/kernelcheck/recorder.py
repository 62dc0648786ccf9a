"""Records what kernels really do under the interpreter: every load, store and launch."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import triton.runtime.interpreter as shipped
from triton.runtime.interpreter import InterpreterBuilder


class Record:
    """What the kernels of a block loaded, stored (bytes; masked lanes do not count) and launched (by kernel)."""

    def __init__(self):
        self.read = self.written = 0
        self.launches = Counter()


@contextmanager
def recording():
    """Within it every kernel that the interpreter runs is recorded in the `Record` that it gives."""
    record = Record()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    run = shipped.GridExecutor.__call__

    def lanes(pointers, mask):
        bits = pointers.get_element_ty().primitive_bitwidth
        if mask is None:
            return pointers.data.size * max(1, bits // 8)
        count = int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape)))
        return count * max(1, bits // 8)

    def masked_load(self, pointers, mask, *rest, **more):
        record.read += lanes(pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def masked_store(self, pointers, value, mask, *rest, **more):
        record.written += lanes(pointers, mask)
        return store(self, pointers, value, mask, *rest, **more)

    def atomic_rmw(self, operation, pointers, value, mask, *rest, **more):
        record.read += lanes(pointers, mask)
        record.written += lanes(pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest, **more)

    def atomic_cas(self, pointers, *rest, **more):
        record.read += lanes(pointers, None)
        record.written += lanes(pointers, None)
        return cas(self, pointers, *rest, **more)

    def launch(self, *args, **kwargs):
        record.launches[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    patches = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
    }
    before = {name: getattr(InterpreterBuilder, name) for name in patches}
    try:
        for name, patch in patches.items():
            setattr(InterpreterBuilder, name, patch)
        shipped.GridExecutor.__call__ = launch
        yield record
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)
        shipped.GridExecutor.__call__ = run
