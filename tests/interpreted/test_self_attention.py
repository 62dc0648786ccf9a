"""The Triton kernels of self_attention pass everything."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from planecycle_fast.cost.meter import Meter
from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial
from planecycle_fast.ops.multihead_attention.attention import attention
from planecycle_fast.ops.multihead_attention.self_attention import self_attention, self_attention_ref
from planecycle_fast.ops.multihead_attention.self_attention_backward_triton import BACKWARD
from planecycle_fast.ops.multihead_attention.self_attention_triton import OP
from planecycle_fast.ops.multihead_attention.self_attention_within import self_attention_within

from ..kernelcheck import checks
from ..kernelcheck.budget import check_bits
from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import permuted, sliced
from ..kernelcheck.observers import Observer, observing
from ..kernelcheck.overflow import apart, apart_unaligned, probing
from ..specs.self_attention import KINDS, SPEC, case, long_cases, op_arguments

TestSelfAttention = op_tests(SPEC, examples=8)  # few, as each runs three or four kernels
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(long_cases()), ids=lambda case: case.name)
def test_error_budget_of_many_rows(case, dtype):
    checks.error_budget(SPEC, case, dtype)


@pytest.mark.full
@pytest.mark.parametrize("case", list(long_cases()), ids=lambda case: case.name)
def test_float64_of_many_rows(case):
    checks.float64(SPEC, case)


def test_gradients_are_turned_back_along_three_axes():
    """Beyond one tile, where queries and keys have turned in place before (`self_attention_within`)."""
    angles = Axial(Rope(make_periods(4, 100.0)), (2, 4, 8))
    leaf = torch.randn(1, 1 + 64, 3 * 1, 16, requires_grad=True)
    upstream = torch.randn(1, 65, 1, 16)
    [expected] = torch.autograd.grad(self_attention_ref(leaf, angles=angles, num_globals=1), leaf, upstream)
    out = self_attention_within(leaf * 1, angles, angles.tables(), 1, 0.25, False)
    [found] = torch.autograd.grad(out, leaf, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, dtype", [(21, torch.float32), (69, torch.bfloat16), (69, torch.float32)], ids=str)
def test_logarithms_of_sums(rows, dtype):
    c = case((rows - 1,), 1, 2, 16, load="")
    (_, arguments), *_ = op_arguments(c.make(dtype), c.settings)
    q, k, _ = c.make(dtype)["q"].double().chunk(3, 2)
    expected = (torch.einsum("nqhd,nkhd->nhqk", q, k) / 4).logsumexp(-1)
    out, lse = OP(*arguments)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    arguments = (*arguments[:-2], False, arguments[-1])
    without, nothing = OP(*arguments)
    assert nothing.numel() == 0
    check_bits("without logarithms", without, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_is_its_value(dtype):
    """Bit for bit. (Gradients of its query and key are zeros by structure, which no measure of rounding judges.)"""
    c = case((1,), 0, 3, 24, 2, packed=False)
    tensors = c.make(dtype)
    check_bits("out", SPEC.fast(**tensors, **c.settings), tensors["v"])


@pytest.mark.parametrize("infinity", [float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("grid", [(3, 4), (8, 8)])
def test_scores_without_end_are_torchs(grid, infinity):
    """Where all scores of a row, or of a tile of it, are minus infinity, and where one is infinite."""
    c = case(grid, 1, 1, 8, load="", name="")
    for places in ((slice(None),), (slice(0, 64),), (slice(64, None),), (1,)):
        q = c.make(torch.float32)["q"].abs()
        q[:, places[0], 1] = infinity
        got, expected = [f(q, **c.settings) for f in (SPEC.fast, SPEC.reference)]
        assert torch.equal(got.isfinite(), expected.isfinite()), places
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("grid", [(3, 4), (8, 8)])
def test_globals_stay_as_they_are(grid):
    """Infinities too, whose products with a sine of 0 would be NaN."""
    c = case(grid, 2, 1, 8, packed=False)
    tensors = c.make(torch.bfloat16)
    tensors["k"][:, 1, :, 2] = float("inf")
    got, expected = [f(**tensors, **c.settings) for f in (SPEC.fast, SPEC.reference)]
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", [sliced, permuted], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("packed", [False, True])
def test_any_strides(packed, layout):
    """Rows and heads at any distances go to the kernels as they lie; channels that are not dense are copied."""
    c = case((3, 4), 1, 2, 16, 2, packed=packed)
    tensors = c.make(torch.float32)
    expected = SPEC.fast(**tensors, **c.settings)
    check_bits("out", SPEC.fast(**{name: layout(t) for name, t in tensors.items()}, **c.settings), expected)
    turned = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    with Traffic() as traffic:
        out = SPEC.fast(**turned, **c.settings)
    assert set(traffic.rows) == {"self_attention"}
    check_bits("out", out, expected)


@pytest.mark.parametrize("layout", [apart, apart_unaligned], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("rows, dtype", [(21, torch.bfloat16), (69, torch.bfloat16), (400, torch.bfloat16)], ids=str)
def test_overflow_of_distances(rows, dtype, layout):
    c = case((rows,), 0, 3, 16, 4, packed=False, kind="dense", device="meta")
    tensors = {name: layout(t).as_strided(t.shape, (*layout(t).stride()[:3], 1)) for name, t in
               c.make(dtype, device="meta").items()}  # fmt: skip
    for op, arguments in op_arguments(tensors, c.settings):
        if op is BACKWARD:
            arguments = (tensors["q"], *arguments[1:])  # a gradient whose rows are as far apart
        with probing() as probe:
            op.body(*arguments)
        assert probe.launches == op.cost(*arguments).launches


def test_public_function_turns_keys_once():
    """In a pass of their own where a kernel would turn them for each tile of queries; and it is differentiable."""
    q = case((9, 9), 1, 1, 8).make(torch.float32)["q"].requires_grad_()
    angles = KINDS["tables"]((9, 9), 8)
    with Traffic() as traffic:
        out = self_attention(q, angles=angles, num_globals=1, backend="triton")
    assert {"rope", "self_attention"} <= set(traffic.rows)
    expected = self_attention_ref(q, angles=angles, num_globals=1)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(t.square().sum(), q)[0] for t in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("make, message", [
    (lambda: torch.zeros(1, 5, 3, 12), "head dimension that is a multiple of 8 and at most 128, got 12"),
    (lambda: torch.zeros(1, 5, 3, 136), "head dimension that is a multiple of 8 and at most 128, got 136"),
    (lambda: torch.zeros(1, 5, 3, 16, dtype=torch.float8_e4m3fn), "float16 or bfloat16 or float64, got float8"),
])  # fmt: skip
def test_what_kernels_do_not_take_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"backend 'triton' does not take these tensors: .*{message}"):
        self_attention(make(), backend="triton")


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_a_scale_that_is_not_positive_is_refused_by_name(scale):
    q = torch.randn(1, 5, 3, 16)
    with pytest.raises(ValueError, match=f"positive and finite, got {scale}"):
        self_attention(q, scale=scale, backend="triton")
    with pytest.raises(ValueError, match=f"attention 'triton' does not take .* positive and finite, got {scale}"):
        attention(q, q, q, scale, "triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [5, 70])
def test_products_are_counted(rows, packed):
    """As torch counts those of the reference: two products there, five back."""
    c = case((rows,), 0, 2, 16, 3, load="", packed=packed)
    tensors = {name: t.requires_grad_() for name, t in c.make(torch.float32).items()}
    with Meter() as meter, FlopCounterMode(display=False) as counter:
        out = self_attention(**tensors, backend="triton")
        assert counter.get_total_flops() == meter.flops == 4 * 3 * 2 * rows**2 * 16
        out.sum().backward()
    assert counter.get_total_flops() == meter.flops == 14 * 3 * 2 * rows**2 * 16


class Seen(Observer):
    """Kernels and what they were compiled for."""

    def __init__(self):
        self.launches = []

    def launched(self, launch):
        self.launches.append((launch.kernel, launch.values["UNIT"]))


def test_accesses_are_16_bytes_wide_where_heads_allow_it():
    """What starts elsewhere is copied; the operation itself takes it, element by element."""
    for dtype, start, wide in ((torch.bfloat16, 0, 8), (torch.float32, 4, 4), (torch.bfloat16, 4, 8)):
        q = torch.randn(2 * 5 * 6 * 16 + start).to(dtype)[start:].view(2, 5, 6, 16)
        with observing(Seen()) as seen:
            expected = self_attention(q, backend="triton")
        assert seen.launches == [("self_attention_tile_kernel", wide)]
        if start == wide // 2:
            with observing(Seen()) as seen:
                out, _ = OP(q, None, None, 0.25, 0, [], [], [], "", False, False, "ieee")
            assert seen.launches == [("self_attention_tile_kernel", 1)]
            check_bits("out", out, expected)


def test_transforms_are_refused_by_name():
    q = torch.randn(1, 3, 3, 8)
    with pytest.raises(NotImplementedError, match="self_attention has no forward-mode .* use backend='reference'"):
        torch.func.grad(lambda t: self_attention(t, backend="triton").sum())(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_all_turns_before(dtype):
    """In a pass of its own, whose gradient is rounded once more than what kernels turn back before they store it."""
    c = SPEC.typical
    found = []
    for function in (SPEC.fast, torch.compile(SPEC.fast, fullgraph=True, backend="aot_eager")):
        q = c.make(dtype)["q"].requires_grad_()
        out = function(q, **c.settings)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), q)))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
