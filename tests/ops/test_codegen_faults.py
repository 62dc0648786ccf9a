"""The codegen gate catches a kernel that spills, one that loads narrowly, one that needs too much shared memory."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

from ..kernelcheck.codegen import ARCHITECTURES, SHARED_LIMIT, CodegenError, check_binary, compile_variant
from ..kernelcheck.launches import Launch


@triton.jit
def row_kernel(x, out, stride: tl.int64, BLOCK: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def spilling_kernel(x, out, n, BLOCK: tl.constexpr):
    """Many running sums at once, more than there are registers."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(n):
        total += tl.load(x + k * BLOCK + i) * (1 + total)
    tl.store(out + i, total)


@triton.jit
def dot_kernel(x, out, N: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros([N, N], tl.float32)
    for k in tl.range(0, 8, num_stages=STAGES):
        total = tl.dot(tl.load(x + k * N * N + i), tl.load(x + (k + 9) * N * N + i), total)
    tl.store(out + i, total.to(out.dtype.element_ty))


@triton.jit
def atomic_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK).to(tl.int64)
    tl.atomic_add(out + i, tl.load(x + i))


@triton.jit
def narrow_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * n + tl.arange(0, BLOCK)
    tl.store(out + i.to(tl.int64), tl.load(x + i))


def compiled(kernel, arch=90, aligned=True, dtype=torch.bfloat16, args=(), **constants):
    x = torch.empty(1, dtype=dtype, device="meta")
    launch = Launch(kernel, (1,), (x, x, *args), constants)
    return compile_variant(launch.variant(aligned, arch), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_that_spills(arch):
    binary = compiled(spilling_kernel, arch, dtype=torch.float32, args=(7,), BLOCK=32768)
    assert binary.stack and binary.local
    with pytest.raises(CodegenError, match=r"spills: \d+ bytes of stack, \d+ local loads and stores"):
        check_binary(binary, arch, narrow_offsets=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_that_are_not_vectorised(arch):
    narrow = compiled(row_kernel, arch, args=(385,), BLOCK=1024)  # rows of 385 start anywhere
    check_binary(narrow, arch)
    assert narrow.accesses == {"load": {2: 8}, "store": {2: 8}}
    with pytest.raises(
        CodegenError, match="16 global accesses of less than 16 bytes, at most 0 expected: loads 8 x 2 B"
    ):
        check_binary(narrow, arch, wide=True)
    check_binary(narrow, arch, wide=True, exempt=16)


def test_pointers_that_are_not_aligned():
    wide, narrow = (compiled(row_kernel, aligned=aligned, args=(0,), BLOCK=1024) for aligned in (True, False))
    assert narrow.registers > wide.registers or narrow.accesses["load"] == {2: 8}
    with pytest.raises(CodegenError, match="less than 16 bytes"):
        check_binary(narrow, 90, wide=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_too_much_shared_memory(arch):
    binary = compiled(dot_kernel, arch, N=128, STAGES=5)
    if binary.shared > SHARED_LIMIT[arch]:
        with pytest.raises(CodegenError, match=f"bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}"):
            check_binary(binary, arch, narrow_offsets=True)
    else:
        check_binary(binary, arch, narrow_offsets=True)
    assert arch != 120 or binary.shared > SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_that_are_claimed(arch):
    binary = compiled(dot_kernel, arch, N=64, STAGES=1)
    check_binary(binary, arch, tensor_cores=True, narrow_offsets=True)
    with pytest.raises(CodegenError, match="no tensor-core instruction"):
        check_binary(compiled(row_kernel, arch, args=(1,), BLOCK=1024), arch, tensor_cores=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_atomics(arch):
    binary = compiled(atomic_kernel, arch, dtype=torch.float32, BLOCK=1024)
    check_binary(binary, arch, atomics=True)
    with pytest.raises(CodegenError, match="atomics: the order of sums is not fixed"):
        check_binary(binary, arch)


def test_offsets_of_32_bits():
    binary = compiled(narrow_kernel, args=(3,), BLOCK=1024)
    check_binary(binary, 90, narrow_offsets=True)
    with pytest.raises(CodegenError, match="2 pointers are advanced by 32-bit offsets"):
        check_binary(binary, 90)
