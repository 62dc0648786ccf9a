"""The Triton kernels of swiglu pass everything."""

import pytest
import torch

from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.ops import swiglu, swiglu_ref
from planecycle_fast.ops.activations.swiglu_triton import BACKWARD, INPLACE, OP
from planecycle_fast.ops.registry import Cost

from ..kernelcheck import checks
from ..kernelcheck.budget import check_bits
from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import VARIED, contiguous, offset, permuted, sliced
from ..kernelcheck.observers import Observer, observing
from ..kernelcheck.overflow import probing
from ..specs.swiglu import SPEC, case

TestSwiglu = op_tests(SPEC, examples=230)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def moved(function):
    """What torch runs in a function: calls by operation."""
    with Traffic() as traffic:
        function()
    return {name: row.calls for name, row in traffic.rows.items()}


def test_each_tensor_is_read_once_and_written_once():
    gate, value = torch.zeros(2, 6, 8)
    packed, size = torch.zeros(6, 16), 6 * 8 * 4
    assert OP.cost(gate, value) == OP.cost(packed, None) == Cost(2 * size, size, 1)
    assert BACKWARD.cost(gate, gate, value) == BACKWARD.cost(gate, packed, None) == Cost(3 * size, 2 * size, 1)
    assert INPLACE.cost(gate, value) == Cost(2 * size, size, 1)


@pytest.mark.parametrize("packed", [True, False])
def test_no_copy_in_either_direction(packed):
    """The gradients of packed halves are written to one tensor, where torch would join two."""
    leaves = [t.requires_grad_() for t in case((2, 3), 8, packed).make(torch.float32).values()]
    grad = torch.randn(2, 3, 8)
    run = lambda function: moved(lambda: function(*leaves).backward(grad))  # noqa: E731
    run(SPEC.fast)  # from here on gradients are added to
    assert run(SPEC.fast).keys() <= {"swiglu", "swiglu_backward", "add", "add_"}
    assert ("cat" in run(swiglu_ref)) == packed


def test_halves_go_to_the_kernel_as_they_lie():
    halves = torch.randn(2, 3, 16).chunk(2, dim=-1)
    assert moved(lambda: SPEC.fast(*halves)) == {"swiglu": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, hidden", [((3,), 7), ((2, 5), 40), ((), 16), ((0,), 4)])
def test_in_place_is_the_same_to_the_bit(rows, hidden, dtype):
    gate, value = case(rows, hidden).make(dtype).values()
    expected, before = SPEC.fast(gate, value), value.clone()
    assert moved(lambda: SPEC.fast(gate, value, inplace=True)) == {"swiglu_": 1}
    check_bits("gate", gate, expected)
    check_bits("value", value, before)


@pytest.mark.parametrize("of_value", [contiguous, sliced, permuted], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("of_gate", VARIED, ids=lambda layout: layout.__name__)
def test_in_place_of_any_layout(of_gate, of_value):
    gate, value = case((2, 3), 8).make(torch.float32).values()
    expected = SPEC.fast(gate, value)
    gate, value = of_gate(gate), of_value(value)
    assert SPEC.fast(gate, value, inplace=True) is gate
    check_bits("gate", gate, expected)


def test_in_place_of_itself_and_of_two_dtypes():
    x = torch.randn(3, 8)
    expected = SPEC.fast(x, x)
    check_bits("gate", SPEC.fast(x, x, inplace=True), expected)
    gate, value = torch.randn(2, 3, 8)
    gate = gate.bfloat16()
    expected = SPEC.fast(gate, value)
    assert expected.dtype == torch.float32
    check_bits("gate", SPEC.fast(gate, value, inplace=True), expected.bfloat16())


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_and_packed_under_the_compiler(inplace):
    gate, value = torch.randn(2, 3, 8)
    expected = SPEC.fast(gate, value)
    compiled = torch.compile(SPEC.fast, fullgraph=True, backend="aot_eager")
    x = gate.clone()
    out = compiled(x, value, inplace=inplace)
    check_bits("out", out, expected)
    check_bits("gate", x, expected if inplace else gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_without_end_are_torchs(dtype):
    """Also where a naive sigmoid overflows, and products of zeros and infinities."""
    odd = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 90.0, -90.0, 800.0, -800.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan]
    )
    tensors = dict(zip(("gate", "value"), torch.cartesian_prod(odd, odd).to(dtype).T.contiguous()))
    checks._compare_footprints(SPEC, case((), 196), tensors, contiguous, "all pairs")
    infinite = lambda g: g.fill_(torch.inf)  # noqa: E731
    checks._compare_footprints(SPEC, case((), 196), tensors, infinite, "all pairs, infinite gradients")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_and_small_values_are_within_budget(dtype):
    """Over the range where silu goes from nothing to the identity."""

    class Scaled(type(case((), 1))):
        def make(self, dtype, seed=0, device="cpu"):
            return {name: 4 * t for name, t in super().make(dtype, seed, device).items()}

    checks.error_budget(SPEC, Scaled({"gate": (4, 300)}, {}), dtype)


class Seen(Observer):
    """The constants that a kernel was compiled for, launch by launch."""

    def __init__(self):
        self.units = []

    def launched(self, launch):
        self.units.append(launch.values["UNIT"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accesses_are_16_bytes_wide_where_rows_allow_it(dtype, packed):
    wide = 16 // dtype.itemsize
    for hidden, layout, expected in ((2 * wide, contiguous, wide), (2 * wide + 1, contiguous, 1), (wide, offset, 1)):
        tensors = [layout(t).requires_grad_() for t in case((2, 3), hidden, packed).make(dtype).values()]
        with observing(Seen()) as seen:
            out = SPEC.fast(*tensors)
            out.backward(torch.ones_like(out))
        assert seen.units == [expected] * 2


def test_the_narrower_of_two_dtypes_has_16_bytes():
    gate, value = torch.randn(2, 3, 24)
    for hidden, expected in ((24, 8), (20, 1)):
        with observing(Seen()) as seen:
            SPEC.fast(gate[:, :hidden].contiguous(), value[:, :hidden].half().contiguous())
        assert seen.units == [expected]


@pytest.mark.parametrize("gap", [2**40, 2**40 + 1])
def test_rows_far_apart(gap):
    """What goes to the kernels as it lies: addresses are right at any distance of rows."""
    rows = torch.empty_strided((300, 40), (gap, 1), dtype=torch.bfloat16, device="meta")
    with probing() as probe:
        OP.body(rows, rows)
        OP.body(rows, None)
        INPLACE.body(rows, rows)
        BACKWARD.body(rows, rows, rows)
        BACKWARD.body(rows[:, :20], rows, None)
    assert probe.launches == 5


def test_transforms_are_refused_by_name():
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="swiglu has no forward-mode .* use backend='reference'"):
        torch.func.vmap(lambda t: swiglu(t, backend="triton"))(x)
    assert torch.func.vmap(lambda t: swiglu(t, backend="reference"))(x).shape == (3, 2)
