"""Loads, stores and atomics of interpreted kernels: from places to addresses, past the observers.

What observers refuse does not happen. Lanes that are masked without a value have none (NaN), as on a GPU.
"""

import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as shipped
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .observers import NUMBER, Access, Fault, launches, watching

_within_atomic = []


def patch_memory():
    """Makes the interpreter's loads, stores and atomics go through observers."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def masked_load(self, ptrs, mask, other, *rest, **more):
        mask = _boolean(mask, ptrs)
        addresses = _addresses("load", ptrs, mask)
        dtype = ptrs.get_element_ty()
        if mask is not None and other is None and watching:  # undefined on a GPU; as shipped 0
            other = TensorHandle(np.full(np.shape(ptrs.data), *_worst(dtype)), dtype)
        if addresses is None:
            return TensorHandle(np.zeros(np.shape(ptrs.data), shipped._get_np_dtype(dtype)), dtype)
        return load(self, addresses, mask, other, *rest, **more)

    def masked_store(self, ptrs, value, mask, *rest, **more):
        mask = _boolean(mask, ptrs)
        addresses = _addresses("store", ptrs, mask, value)
        return None if addresses is None else store(self, addresses, value, mask, *rest, **more)

    def atomic_rmw(self, rmwOp, ptr, val, mask, *rest, **more):
        mask = _boolean(mask, ptr)
        addresses = _addresses("atomic", ptr, mask)
        return val if addresses is None else rmw(self, rmwOp, addresses, val, mask, *rest, **more)

    def atomic_cas(self, ptr, cmp, val, *rest, **more):
        addresses = _addresses("atomic", ptr, None)
        return val if addresses is None else cas(self, addresses, cmp, val, *rest, **more)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas = atomic_rmw, atomic_cas
    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):  # of triton 3.8 and newer
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, _as_atomic(getattr(InterpreterBuilder, name)))


def _as_atomic(method):
    """What it loads and stores counts as atomic."""

    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        _within_atomic.append(method)
        try:
            return method(*args, **kwargs)
        finally:
            _within_atomic.pop()

    return wrapper


def _only_addresses():
    return any(not observer.moves_data for observer in watching)


def _boolean(mask, pointers):
    """A mask in the shape of the pointers: scalar comparisons come as integers, masks of block pointers bare."""
    if mask is None:
        return None
    data = np.asarray(mask.data).astype(bool, copy=False)
    return TensorHandle(np.broadcast_to(data, pointers.data.shape), tl.int1)


def _worst(dtype):
    np_dtype = shipped._get_np_dtype(dtype)
    worst = np.nan if np_dtype.kind == "f" else True if np_dtype.kind == "b" else np.iinfo(np_dtype).max
    return 0x7FC0 if dtype == tl.bfloat16 else worst, np_dtype


def _addresses(kind, pointers, mask, value=None):
    """Where a block of places is in memory, or None where nothing is moved. Observers see its unmasked lanes first."""
    places, launch = pointers.data, launches[-1]
    active = None if mask is None or mask.data.all() else mask.data
    flat = (lambda block: block.ravel()) if active is None else (lambda block: block[active])
    lanes = flat(places)
    kind = "atomic" if _within_atomic else kind
    numbers = lanes >> NUMBER
    addresses = places
    for number in np.unique(numbers) if lanes.size and (numbers != numbers[0]).any() else numbers[:1]:
        argument = launch.tensors.get(int(number))
        if argument is None:
            raise Fault(f"{launch}: {kind} through a pointer that comes from no tensor of the launch")
        if watching:
            mine = numbers == number
            distances = (lanes[mine] - np.uint64(argument.place)).view(np.int64)
            values = None if value is None else flat(np.broadcast_to(value.data, places.shape))[mine]
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            for observer in watching:
                observer.accessed(Access(kind, argument, distances, width, values, launch))
        if argument.tensor.device.type != "cpu" and not _only_addresses():
            raise Fault(f"{launch}: {argument} is on {argument.tensor.device}: kernels run on CPU tensors here")
        shift = np.uint64((argument.tensor.data_ptr() - argument.place) % 2**64)
        addresses = np.where(places >> NUMBER == number, places + shift, addresses)
    return None if _only_addresses() else TensorHandle(addresses, pointers.dtype)
