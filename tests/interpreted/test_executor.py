"""Kernels run with the arguments, loops and launches that a compiled kernel would have."""

import threading

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ..kernelcheck import interpreter
from ..kernelcheck.executor import typed_by_inductor
from ..kernelcheck.observers import Fault
from ..kernelcheck.overflow import OverflowFault, probing

ALIAS = tl.int64


@triton.jit
def value_kernel(out, value):
    tl.store(out, value)


@triton.jit
def sum_kernel(x, out, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) * scale)


def test_floats_are_float32():
    out = torch.empty(1, dtype=torch.float64)
    value_kernel[(1,)](out, 0.1)
    assert out.item() == np.float32(0.1)
    x, out = torch.full((4,), 2048, dtype=torch.float16), torch.empty(4)
    sum_kernel[(1,)](x, out, 1.0001, N=4)
    assert (out > 2048).all()  # the product is in float32


@triton.jit
def types_kernel(out, few: tl.int64, many, real):
    tl.store(out, few.dtype == tl.int32)
    tl.store(out + 1, many.dtype == tl.int64)
    tl.store(out + 2, real.dtype == tl.float64)


def test_types_as_torch_compile_gives_them():
    """`kernelcheck.inductor` says the same of compiled kernels."""
    out, launched = torch.zeros(3, dtype=torch.bool), (3, 2**31, 0.5)
    types_kernel[(1,)](out, *launched)
    assert out.tolist() == [False, True, False]
    with typed_by_inductor():
        types_kernel[(1,)](out, *launched)
    assert out.all()


def test_booleans():
    out = torch.empty(2, dtype=torch.int32)
    for i, value in enumerate((True, False)):
        value_kernel[(1,)](out[i:], value)
    assert out.tolist() == [1, 0]


def test_reinterpreted_tensors():
    bits, out = torch.ones(1).view(torch.int32), torch.empty(4)
    sum_kernel[(1,)](triton.reinterpret(bits.expand(4).contiguous(), tl.float32), out, 1.0, N=4)
    assert (out == 1).all()


@triton.jit
def declared_kernel(x, direct: tl.int64, alias: ALIAS, text: "i64", plain):  # noqa: F821  (a type of triton's)
    tl.load(x + direct * 65536)
    tl.load(x + alias * 65536)
    tl.load(x + text * 65536)
    tl.load(x + plain * 65536)


def test_declared_types_hold_however_they_are_written():
    x = torch.empty(2**36, device="meta")
    with probing():
        declared_kernel[(1,)](x, 2**17, 2**17, 2**17, 1)
        with pytest.raises(OverflowFault, match=r"which does not fit into int32, in .*plain \* 65536"):
            declared_kernel[(1,)](x, 1, 1, 1, 2**17)


@triton.jit
def narrow_loop_kernel(x, n):
    for k in range(n - 1, n):
        tl.load(x + k * 65536)


@triton.jit
def wide_loop_kernel(x, n: tl.int64, stride: tl.int32):
    for k in range(n - 1, n):
        tl.load(x + k * stride)


@triton.jit
def long_loop_kernel(x, n):
    for k in tl.range(0, n, 1024):
        tl.load(x + k * 0)


def test_loop_variables_have_the_width_of_their_bounds():
    x = torch.empty(2**36, device="meta")
    with probing():
        wide_loop_kernel[(1,)](x, 2**17, 65536)
        with pytest.raises(OverflowFault, match=r"k \* 65536"):
            narrow_loop_kernel[(1,)](x, 2**17)
        with pytest.raises(Fault, match=r"the variable of range\(0, 2147483647, 1024\) passes 2\^31"):
            long_loop_kernel[(1,)](x, 2**31 - 1)


@triton.jit
def parts_kernel(x, count, stride):
    pid = tl.program_id(0)
    if pid < count:
        tl.load(x + pid * stride)
    else:
        tl.load(x)


def test_the_probe_goes_to_where_parts_of_a_grid_meet():
    x = torch.empty(2**33, device="meta")

    def launch(count, stride):
        with probing():
            parts_kernel[(count + 10**6,)](x, count, stride)

    launch(2**18, 1)
    with pytest.raises(OverflowFault, match=r"program \(262143, 0, 0\)"):
        launch(2**18, 8193)


def test_python_is_as_before_after_a_kernel():
    assert value_kernel.fn.__globals__.get("range", range) is range
    index = tl.tensor.__index__ if hasattr(tl.tensor, "__index__") else None
    with pytest.raises(Fault):
        value_kernel[(1,)](torch.empty(0), 1.0)
    assert value_kernel.fn.__globals__.get("range", range) is range
    assert (tl.tensor.__index__ if hasattr(tl.tensor, "__index__") else None) is index
    value_kernel[(1,)](torch.empty(1), 1.0)


def test_patching_twice_changes_nothing():
    interpreter.patch()
    out = torch.empty(1)
    value_kernel[(1,)](out, 3.0)
    assert out.item() == 3


def test_what_cannot_be_run():
    with pytest.raises(ValueError, match=r"grid must have at most 3 axes, got \(1, 1, 1, 2\)"):
        value_kernel[(1, 1, 1, 2)](torch.empty(1), 1.0)
    with pytest.raises(Fault, match="out of shape .* is on meta: kernels run on CPU tensors here"):
        value_kernel[(1,)](torch.empty(1, device="meta"), 1.0)


def test_threads_take_turns():
    outs = [torch.empty(1) for _ in range(4)]

    def work(i):
        for _ in range(10):
            value_kernel[(1,)](outs[i], float(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [out.item() for out in outs] == [0, 1, 2, 3]


@triton.jit
def tuple_kernel(pair, out):
    tl.store(out, tl.load(pair[0] + 5))


def test_tensors_in_tuples_have_a_name():
    with pytest.raises(Fault, match="load at no element of pair of shape"):
        tuple_kernel[(1,)]((torch.empty(3), torch.empty(3)), torch.empty(1))
