"""Machine code of self_attention's backward kernels: no spills on any GPU, tensor cores, one build for all sizes."""

import itertools
import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.ops.multihead_attention.self_attention_backward_triton import BACKWARD
from planecycle_fast.ops.multihead_attention.self_attention_load import turned_on_load

from ..kernelcheck.codegen import ARCHITECTURES, check_binary, compile_variant
from ..kernelcheck.inductor import check_writes, inductor_variant
from ..kernelcheck.launches import recorded_launches, variants
from ..specs.self_attention import SPEC

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEAR = pytest.mark.full  # seconds


def launches(rows, head_dim, dtype, precision="ieee", load="qk", packed=True, g=5, heads=6, axes=2, n=8):
    """What the operation launches for `rows` of a sequence."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    patches, half = rows - g, head_dim // 2
    grid = [patches // 4, 4, 1][:axes] if patches % 4 == 0 and axes > 1 else [patches, 1, 1][:axes]
    bounds = [half * i // axes for i in range(axes + 1)]
    tables = [empty(size, bounds[i + 1] - bounds[i], dtype=FP32) for i, size in enumerate(grid)]
    assert math.prod(grid) == patches
    one = empty(n, rows, heads, head_dim)
    held = (empty(n, rows, 3 * heads, head_dim), None, None) if packed else (one, one, one)
    within = turned_on_load(rows, head_dim, dtype, training=True)
    load = "".join([name for name in load if name in within])
    turns = (g, grid, tables, tables, load, "qk", False, precision)
    with recorded_launches(BACKWARD.body) as found:
        BACKWARD.body(one, *held, one, empty(n, heads, rows, dtype=FP32), 0.125, *turns)
    return found


ONE = [(16, 64, BF16), (16, 64, FP32), (32, 64, BF16), (32, 64, FP32), (64, 64, BF16)]
ONE += [(rows, *wide) for rows, wide in itertools.product((16, 32), [(128, FP16), (80, BF16)])]
ONE += [(16, 128, FP32), (16, 96, FP32)]
PASSES = [
    (64, BF16, "ieee"), (64, FP16, "ieee"), (128, BF16, "ieee"), (80, BF16, "ieee"), (96, FP16, "ieee"),
    (64, FP32, "tf32x3"), (64, FP32, "tf32"), (128, FP32, "tf32x3"), (128, FP32, "tf32"),
]  # fmt: skip


def some(cases, few):
    """All of them on each GPU, a few of these in every run."""
    for case, arch in itertools.product(cases, ARCHITECTURES):
        yield pytest.param(*case, arch, marks=[] if (case, arch) in few else DEAR)


@pytest.mark.parametrize("rows, head_dim, dtype, arch", list(some(ONE, [(ONE[2], 100), (ONE[4], 80)])))
def test_one_tile(rows, head_dim, dtype, arch):
    [launch] = launches(rows, head_dim, dtype)
    binary = compile_variant(launch.variant(True, arch), arch)
    exempt = 100 if head_dim % 64 else 4  # one of `lse`; halves of 40 and 48 channels end within 16 bytes of nothing
    check_binary(binary, arch, wide=True, exempt=exempt, tensor_cores=dtype != FP32)


@pytest.mark.parametrize("head_dim, dtype, precision, arch", list(some(PASSES, [(PASSES[0], 90), (PASSES[2], 80)])))
def test_any_rows(head_dim, dtype, precision, arch):
    for launch in launches(261, head_dim, dtype, precision, load=""):
        binary = compile_variant(launch.variant(True, arch), arch)
        check_binary(binary, arch, tensor_cores=dtype != FP32 or precision == "tf32")


def test_wide_heads_in_float32_have_no_tile_of_32_rows():
    """It kept 1,056 bytes of registers in memory."""
    assert [len(launches(rows, 128, FP32)) for rows in (16, 21)] == [1, 2]


@pytest.mark.full
@pytest.mark.parametrize("load, axes, packed", [("qk", 2, True), ("q", 1, False), ("qk", 3, False)])
@pytest.mark.parametrize("rows, dtype", [(21, BF16), (261, BF16), (261, FP32)])
@pytest.mark.parametrize("aligned, arch", [(True, 90), (False, 80)])
def test_other_builds(rows, dtype, load, axes, packed, aligned, arch):
    for launch in launches(rows, 64, dtype, "tf32x3", load, packed, axes=axes):
        # Heads are aligned, or copied (`self_attention_autograd.aligned`); tables and sums need not be.
        binary = compile_variant(launch.variant(aligned, arch, always=lambda t: t.ndim == 4), arch)
        check_binary(binary, arch)


@pytest.mark.full
@pytest.mark.parametrize("rows", [21, 261])
def test_as_inductor_builds_them(rows):
    for launch in launches(rows, 64, BF16):
        check_binary(compile_variant(inductor_variant(launch), 90), 90, tensor_cores=True)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [21, 261])
def test_torch_finds_what_is_written(rows, packed):
    for launch in launches(rows, 64, BF16, packed=packed):
        check_writes(launch, SPEC.outputs[launch.kernel.__name__])


def test_sizes_are_not_specialised():
    found = []
    for rows, g, heads, n in itertools.product((65, 261, 1029, 4101), (0, 1, 5), (1, 6, 16), (1, 3, 16)):
        found += launches(rows, 64, BF16, g=g, heads=heads, n=n)
    assert len(variants(found, [True])) == 2
    found = []
    for rows, g, heads in itertools.product((17, 21, 32), (0, 1, 5), (1, 6, 16)):
        found += launches(rows, 64, BF16, g=g, heads=heads)
    assert len(variants(found, [True])) == 1
