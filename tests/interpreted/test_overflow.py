"""The overflow probe catches integers that wrap and grids that are too large, with nothing allocated."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from ..kernelcheck import checks
from ..kernelcheck.executor import typed_by_inductor
from ..kernelcheck.observers import Fault
from ..kernelcheck.overflow import GridError, OverflowFault, apart, apart_unaligned, probing
from ..kernelcheck.sanitizer import BoundsError
from ..kernelcheck.spec import Case
from . import faulty


@triton.jit(do_not_specialize=["stride", "n", "m"])
def right_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    """Copies n rows of m elements: one program per row."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, m, BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(out + row * m + c, tl.load(x + row * stride + c, mask=c < m), mask=c < m)


@triton.jit
def narrow_offset_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    for start in range(0, m, BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(out + row * m + c, tl.load(x + row * stride + c, mask=c < m), mask=c < m)  # row * m wraps


@triton.jit
def narrow_product_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    size = n * m  # of out, to reach its last row from the end
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, m, BLOCK):
        c = start + tl.arange(0, BLOCK)
        place = size - (n - row) * m + c
        tl.store(out + place, tl.load(x + row * stride + c, mask=c < m), mask=c < m)


@triton.jit
def narrow_argument_kernel(x, out, stride: tl.int32, n, m, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(out + row * m + c, tl.load(x + row * stride + c, mask=c < m), mask=c < m)


@triton.jit
def narrowing_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    offset = (row * stride).to(tl.int32)
    tl.store(out + row * m + c, tl.load(x + offset + c, mask=c < m), mask=c < m)


@triton.jit
def shifting_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    tl.store(out + (row << 8) + c, tl.load(x + row.to(tl.int64) * stride + c, mask=c < m), mask=c < m)


@triton.jit
def summing_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    total = tl.sum(tl.arange(0, BLOCK) * 0 + n, 0)  # BLOCK x n
    tl.store(out + total * 0, tl.load(x))


@triton.jit
def astray_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    """Nothing overflows, but the place is that of another row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(out + row * m + c, tl.load(x + row * (stride + 1) + c, mask=c < m), mask=c < m)


ROWS, COLUMNS = 2**24, 256  # 2^32 elements


@triton.jit
def annotated_kernel(x, out, stride: tl.int64, n, m, BLOCK: tl.constexpr):
    """Wide by the annotation alone."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    tl.store(out + row.to(tl.int64) * m + c, tl.load(x + row * stride + c, mask=c < m), mask=c < m)


def run(kernel, layout=lambda t: t, grid=None):
    x, out = (torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="meta") for _ in range(2))
    x = layout(x)
    with probing():
        kernel[grid or (ROWS,)](x, out, x.stride(0), ROWS, COLUMNS, BLOCK=256)


@pytest.mark.parametrize("layout", [lambda t: t, apart], ids=["dense", "apart"])
def test_what_is_right_passes(layout):
    run(right_kernel, layout)


def test_overflow_in_an_offset():
    message = r"multiply of 12582911 and 256 gives 3221225216, which does not fit into int32, in .*: tl.store"
    with pytest.raises(OverflowFault, match=message):
        run(narrow_offset_kernel)


def test_overflow_in_a_product_of_sizes():
    message = r"multiply of 16777216 and 256 gives 4294967296, which does not fit into int32, in .*:\d+: size ="
    with pytest.raises(OverflowFault, match=message):
        run(narrow_product_kernel)


def test_overflow_in_a_shift():
    with pytest.raises(OverflowFault, match="left_shift of .*, which does not fit into int32"):
        run(shifting_kernel)


def test_overflow_in_a_cast():
    with pytest.raises(OverflowFault, match="a cast of .*, which does not fit into int32"):
        run(narrowing_kernel)


def test_overflow_in_a_reduction():
    with pytest.raises(OverflowFault, match="a reduction gives 4294967296, which does not fit into int32"):
        run(summing_kernel)


def test_overflow_in_an_argument():
    with pytest.raises(Fault, match="narrow_argument_kernel: stride = 281474976710656 does not fit into int32"):
        run(narrow_argument_kernel, lambda t: t.as_strided(t.shape, (2**48, 1)))


def test_an_address_that_is_wrong_without_overflow():
    with pytest.raises(BoundsError, match="load at no element of x"):
        run(astray_kernel)


def test_an_offset_that_torch_compile_makes_narrow():
    run(annotated_kernel)
    with typed_by_inductor():
        run(right_kernel)
        message = "multiply of 12582911 and 256 gives 3221225216, which does not fit into int32, in .*: tl.store"
        with pytest.raises(OverflowFault, match=message):
            run(annotated_kernel)
    run(annotated_kernel)


@pytest.mark.parametrize("grid, axis", [((2**31,), "x"), ((1, 65_536), "y"), ((1, 1, 100_000), "z")])
def test_a_grid_that_is_too_large(grid, axis):
    with pytest.raises(GridError, match=f"{grid[-1]} programs along {axis}, a GPU takes at most"):
        run(right_kernel, grid=grid)


def test_grids_at_their_limits():
    with pytest.raises(BoundsError):  # the grid is taken; its programs leave the tensor
        run(right_kernel, grid=(2**31 - 1, 65_535, 65_535))


def test_small_sizes_hide_all_of_it():
    """Why there is a probe: the same kernels are right at the sizes that tests can afford."""
    x = torch.randn(8, 256)
    for kernel in (narrow_offset_kernel, narrow_product_kernel, narrow_argument_kernel, narrowing_kernel):
        out = torch.empty(8, 256)
        kernel[(8,)](x, out, 256, 8, 256, BLOCK=256)
        assert torch.equal(out, x)


def test_the_probe_of_an_operation():
    checks.overflow(faulty.make("probed"), Case({"x": (3, 2), "y": (3, 2)}, {}))
    huge = Case({"x": (2**16, 2**16), "y": (2**16, 2**16)}, {})
    with pytest.raises(OverflowFault, match="narrow_kernel, .* which does not fit into int32, in faulty.py"):
        checks.overflow(faulty.make("overflowing", faulty.narrow_kernel), huge)


def test_the_probe_allocates_nothing():
    x = torch.empty(4, 256, device="meta")
    with probing(), pytest.raises(AssertionError, match="out of shape .* is on cpu, expected meta"):
        right_kernel[(4,)](x, torch.empty(4, 256), 256, 4, 256, BLOCK=256)


def test_an_operation_without_huge_cases():
    spec = replace(faulty.make("small"), huge=[Case({"x": (2**17, 2)}, {})])
    with pytest.raises(AssertionError, match="no huge case has more than 2\\^31 elements"):
        checks.huge_cases(spec)
    spec = replace(faulty.make("few"), huge=[Case({"x": (2**16, 2**20)}, {})])
    with pytest.raises(AssertionError, match="no huge case has 100000 slices"):
        checks.huge_cases(spec)


def test_layouts_for_the_probe():
    t = torch.empty(3, 4, 5, device="meta")
    assert apart(t).stride() == (20 * 2**32, 5 * 2**32, 1)
    assert apart_unaligned(t).stride() == (20 * (2**32 + 1), 5 * (2**32 + 1), 2**30 + 1)
    large = torch.empty(2**24, 256, device="meta")
    assert apart(large).stride() == (256 * 2**18, 1)  # all of it within what the probe can address
