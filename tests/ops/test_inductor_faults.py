"""What is wrong under torch.compile alone is caught: each kernel here is right as triton launches it."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

from ..kernelcheck.codegen import CodegenError, check_binary, compile_variant, narrow_lengths
from ..kernelcheck.inductor import WritesError, check_writes, inductor_variant
from ..kernelcheck.launches import Launch

ROWS, ROW = 64, 384


@triton.jit(do_not_specialize=["stride"])
def right_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0) * tl.cast(stride, tl.int64)
    c = tl.arange(0, BLOCK)
    total = tl.load(x + (row + c)).to(tl.float32)
    tl.store(out + (row + c), tl.sqrt_rn(total + tl.cast(eps, tl.float32)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def float_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """As `add_norm_kernel` was: there is no `sqrt_rn` of 64 bits."""
    row = tl.program_id(0) * tl.cast(stride, tl.int64)
    c = tl.arange(0, BLOCK)
    total = tl.load(x + (row + c)).to(tl.float32)
    tl.store(out + (row + c), tl.sqrt_rn(total + eps).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def method_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """As `rope_kernel` was: a constant has no methods."""
    row = tl.program_id(0) * stride.to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(out + (row + c), tl.load(x + (row + c)))


@triton.jit(do_not_specialize=["stride"])
def annotated_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """The annotation alone makes offsets wide."""
    row = tl.program_id(0) * stride
    c = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out + (row + c), tl.load(x + (row + c)))


@triton.jit(do_not_specialize=["stride"])
def summing_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """The annotation alone makes a sum wide."""
    c = (tl.program_id(0) + tl.arange(0, BLOCK) + stride).to(tl.int64)
    tl.store(out + c, tl.load(x + c))


@triton.jit
def constant_kernel(x, out, stride: tl.int64, eps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's length that is a constant has no type of its own."""
    row = (tl.program_id(0) * CHANNELS).to(tl.int64)
    c = tl.arange(0, BLOCK)
    tl.store(out + (row + c), tl.load(x + (row + c)))


@triton.jit(do_not_specialize=["stride"])
def hidden_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """Also writes to x, by assembly that it calls pure, where torch does not look."""
    place = tl.program_id(0) * tl.cast(stride, tl.int64)
    value = tl.load(out + place).to(tl.int16, bitcast=True)
    same = tl.inline_asm_elementwise(
        "st.global.b16 [$1], $2; mov.b16 $0, $2;", "=h,l,h", [x + place, value], tl.int16, is_pure=True, pack=1
    )
    tl.store(out + place, same.to(tl.bfloat16, bitcast=True))


@triton.jit(do_not_specialize=["stride"])
def either_kernel(x, out, stride: tl.int64, eps, BLOCK: tl.constexpr):
    """Where it writes depends on a number, which torch does not follow."""
    target = tl.where(tl.program_id(0) >= 0, out, x)
    c = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(target + c, tl.load(x + c))


def launch(kernel, stride=ROW, **constants):
    x = torch.empty(ROWS, ROW, dtype=torch.bfloat16, device="meta")
    return Launch(kernel, (ROWS,), (x, torch.empty_like(x), stride, 1e-6), dict(constants, BLOCK=128))


def build(kernel, **given):
    made = launch(kernel, **given)
    return compile_variant(inductor_variant(made), 90), compile_variant(made.variant(True, 90), 90)


@pytest.mark.parametrize("stride", [ROW, 1, 2**31])
def test_what_is_right_passes(stride):
    for binary in build(right_kernel, stride=stride):
        check_binary(binary, 90)
    check_writes(launch(right_kernel, stride), {"out"})


def test_signatures():
    """As torch 2.11 to 2.14 make them."""
    types = inductor_variant(launch(right_kernel)).signature
    assert types == {"x": "*bf16", "out": "*bf16", "stride": "i32", "eps": "fp64", "BLOCK": "constexpr"}
    one, long = (inductor_variant(launch(right_kernel, stride)) for stride in (1, 2**31))
    assert one.signature["stride"] == "constexpr" and one.values["stride"] == 1
    assert long.signature["stride"] == "i64"
    assert launch(right_kernel, 1).variant(True, 90).signature["stride"] == "i64"


def test_a_float_that_must_be_of_32_bits():
    compile_variant(launch(float_kernel).variant(True, 90), 90)
    with pytest.raises(triton.CompilationError, match="sqrt_rn"):
        compile_variant(inductor_variant(launch(float_kernel)), 90)


def test_an_int_that_must_not_be_a_constant():
    build(method_kernel)
    with pytest.raises(triton.CompilationError, match="has no attribute"):
        compile_variant(inductor_variant(launch(method_kernel, stride=1)), 90)
    with pytest.raises(RuntimeError, match="assuming every input is mutated"):
        check_writes(launch(method_kernel), {"out"})


@pytest.mark.parametrize("kernel", [annotated_kernel, summing_kernel])
def test_offsets_that_rely_on_an_annotation(kernel):
    ours, shipped = build(kernel)
    check_binary(shipped, 90)
    with pytest.raises(CodegenError, match=r"[12] pointers are advanced by 32-bit offsets or products"):
        check_binary(ours, 90)


def test_rows_of_constant_length():
    for binary in build(constant_kernel, CHANNELS=ROW):
        with pytest.raises(CodegenError, match=r"[12] pointers are advanced by 32-bit offsets or products"):
            check_binary(binary, 90)


def test_an_output_that_torch_misses():
    build(hidden_kernel)
    with pytest.raises(WritesError, match=r"hidden_kernel writes to \['out', 'x'\], torch finds \['out'\]"):
        check_writes(launch(hidden_kernel), {"out", "x"})


def test_an_input_that_torch_takes_for_an_output():
    build(either_kernel)
    with pytest.raises(WritesError, match=r"either_kernel writes to \['out'\], torch finds \['out', 'x'\]"):
        check_writes(launch(either_kernel), {"out"})


def test_narrow_lengths():
    lines = {
        "%a = arith.constant 384 : i32 loc(#loc)": 0,
        "%b = arith.muli %pid, %a : i32 loc(#loc)": 1,
        "%c = arith.muli %a, %a : i32 loc(#loc)": 0,  # a length
        "%d = arith.addi %c, %pid : i32 loc(#loc)": 1,
        "%e = tt.splat %stride : i32 -> tensor<8xi32> loc(#loc)": 0,
        "%f = arith.subi %rows, %e : tensor<8xi32> loc(#loc)": 1,
        "%g = arith.extsi %e : tensor<8xi32> to tensor<8xi64> loc(#loc)": 0,
        "%h = arith.muli %rows, %g : tensor<8xi64> loc(#loc)": 0,
        "%i = arith.muli %pid, %other : i32 loc(#loc)": 0,
        "%j = arith.constant dense<384> : tensor<8xi32> loc(#loc)": 0,
        "%k = arith.addi %j, %rows : tensor<8xi32> loc(#loc)": 1,
    }
    for n in range(1, len(lines) + 1):
        assert narrow_lengths("\n".join([*lines][:n]) + "\n", {"stride", 384}) == sum([*lines.values()][:n])
