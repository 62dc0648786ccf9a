"""Triton's interpreter rounds bf16 as torch does, refuses arithmetic on it, and shows what is not written."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from ..kernelcheck.executor import check_interpreter
from ..kernelcheck.interpreter import Bf16ArithmeticError, poisoned
from ..kernelcheck.recorder import recording

N = 4096
KINDS = [torch.float32, torch.float16, torch.float64, torch.int32]


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def implicit_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def rounding_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16, fp_downcast_rounding="rtne"))


@triton.jit
def other_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < 0, other=3.0))


@triton.jit
def dot_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + i)
    tl.store(out + i, tl.dot(a, a))


@triton.jit
def add_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v + v)


@triton.jit
def minimum_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(out + i)
    tl.store(out + i, tl.where(a < b, a, b))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out, tl.sum(tl.load(x + i), 0))


@triton.jit
def exp_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.exp(tl.load(x + i)))


@triton.jit
def atomic_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out + i, tl.load(x + i))


@triton.jit
def half_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


def values(dtype):
    """Of all sizes, with halfway cases, infinities and NaN."""
    if not dtype.is_floating_point:
        return torch.randint(-(2**31), 2**31, (N,), dtype=torch.int64).to(dtype)
    x = torch.randn(N, dtype=torch.float64) * torch.logspace(-44, 38, N, dtype=torch.float64)
    x[:6] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38, -0.0, 1e-40])
    x[6:1000] = torch.randn(994).bfloat16().double() * (1 + 2**-8)  # halfway between two bf16 values
    return x.to(dtype)


def same_bits(a, b):
    return ((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("kernel", [cast_kernel, implicit_kernel], ids=["explicit", "implicit"])
def test_to_bf16_rounds_as_torch_does(kernel, dtype):
    x, out = values(dtype), torch.empty(N, dtype=torch.bfloat16)
    kernel[(1,)](x, out, N=N)
    assert same_bits(out, x.to(torch.bfloat16))


def test_to_bf16_to_nearest_by_name():
    x, out = values(torch.float32), torch.empty(N, dtype=torch.bfloat16)
    rounding_kernel[(1,)](x, out, N=N)
    assert same_bits(out, x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", KINDS[:3], ids=str)
def test_from_bf16_is_exact(dtype):
    x, out = values(torch.float32).to(torch.bfloat16), torch.empty(N, dtype=dtype)
    cast_kernel[(1,)](x, out, N=N)
    assert torch.equal(out.nan_to_num(7), x.to(dtype).nan_to_num(7))


def test_a_constant_for_masked_lanes():
    x, out = torch.zeros(N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.bfloat16)
    other_kernel[(1,)](x, out, N=N)
    assert (out == 3).all()


def test_dot_of_bf16_sums_in_fp32():
    x, out = torch.randn(32, 32).bfloat16(), torch.empty(32, 32)
    dot_kernel[(1,)](x, out, N=32)
    torch.testing.assert_close(out, x.float() @ x.float())


@pytest.mark.parametrize(
    "kernel", [add_kernel, minimum_kernel, sum_kernel, exp_kernel, atomic_kernel], ids=lambda k: k.__name__
)
def test_arithmetic_on_bf16_is_refused(kernel):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises((Bf16ArithmeticError, ValueError), match="bf16|fp32"):  # triton itself refuses some
        kernel[(1,)](x, x.clone(), N=16)


def test_what_is_not_written_shows():
    x = torch.ones(16)
    with poisoned():
        out = torch.empty(16)
    half_kernel[(1,)](x, out, 9, N=16)
    assert not out[:9].isnan().any() and out[9:].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_interpreter_is_refused(monkeypatch):
    """Triton may change what the test bed replaces: then it must say so and not go on."""
    check_interpreter()
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_addptr", lambda self, pointer, offset: None)
        with pytest.raises(RuntimeError, match=r"3.6 to 3.9; in triton .*create_addptr takes \(self pointer offset\)"):
            check_interpreter()
    with monkeypatch.context() as patch:
        patch.delattr(interpreter, "_implicit_cvt")
        with pytest.raises(RuntimeError, match="triton.runtime.interpreter has no _implicit_cvt"):
            check_interpreter()


def test_loads_stores_and_launches_are_recorded():
    x = torch.ones(16)
    with recording() as record:
        for _ in range(3):
            half_kernel[(1,)](x, x.clone(), 9, N=16)
        cast_kernel[(1,)](x, torch.empty(16, dtype=torch.float16), N=16)
        atomic_kernel[(1,)](x, x.clone(), N=16)
    assert record.read == 3 * 9 * 4 + 16 * 4 + 2 * 16 * 4
    assert record.written == 3 * 9 * 4 + 16 * 2 + 16 * 4
    assert record.launches == {"half_kernel": 3, "cast_kernel": 1, "atomic_kernel": 1}
