"""Each check catches the fault it is there for, and lets the operation pass that has none."""

from dataclasses import replace

import pytest
import torch

from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.ops.registry import Cost

from ..kernelcheck import checks
from ..kernelcheck.budget import BudgetError
from ..kernelcheck.harness import op_tests
from ..kernelcheck.interpreter import Bf16ArithmeticError
from ..kernelcheck.layouts import contiguous, permuted
from . import faulty
from .faulty import make

RIGHT = make("right")


class TestRight(op_tests(RIGHT, examples=10)):
    """The operation without a fault passes everything; but its copies of strided inputs are no secret."""

    def test_declared_cost_of_layouts(self):
        checks.declared_cost(RIGHT, RIGHT.small[0], torch.float32, contiguous)
        with pytest.raises(AssertionError, match="moves data beside its kernels: {'clone': "):
            checks.declared_cost(RIGHT, RIGHT.small[0], torch.float32, permuted)


def test_a_cast_to_bf16_that_truncates():
    spec = make("truncating", faulty.truncating_kernel)
    checks.error_budget(spec, spec.cases[1], torch.float32)
    with pytest.raises(BudgetError, match="out, rows at .* errors lean one way, by -0.3. eps of torch.bfloat16"):
        checks.error_budget(spec, spec.cases[1], torch.bfloat16)


def test_a_coarse_rounding():
    spec = make("coarse", faulty.coarse_kernel)
    with pytest.raises(BudgetError, match=r"out, rows at \(.*\): error .*, allowed 2 x .* rounding of torch.float32"):
        checks.error_budget(spec, spec.cases[1], torch.float32)
    with pytest.raises(AssertionError, match="out"):
        checks.float64(spec, spec.cases[1])
    checks.float64(RIGHT, RIGHT.cases[1])


def test_arithmetic_in_bf16():
    spec = make("bf16", faulty.bf16_kernel)
    with pytest.raises(Bf16ArithmeticError, match="arithmetic on bf16"):
        checks.error_budget(spec, spec.cases[0], torch.bfloat16)


def test_an_output_that_is_not_written():
    spec = make("forgetful", faulty.forgetful_kernel)
    with pytest.raises(BudgetError, match=r"out, rows at \(2, 4, 6\): not finite where float64 is"):
        checks.error_budget(spec, spec.cases[0], torch.float32)


def test_a_nan_that_is_swallowed():
    spec = make("silent", faulty.silent_kernel)
    checks.error_budget(spec, spec.cases[0], torch.float32)
    with pytest.raises(BudgetError, match="out, nan in x, rows at .*: 1 elements differ in NaN"):
        checks.nan_footprint(spec, spec.cases[0])


def test_strides_of_the_fake_are_wrong():
    spec = make("strides", fake=lambda x, y: x.new_empty(x.shape[::-1]).permute(2, 1, 0))
    with pytest.raises(AssertionError, match="opcheck: .*stride"):
        checks.opcheck(spec, spec.small[0])


def test_a_mutation_that_is_not_declared():
    def body(run):
        def mutating(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out = run(x.contiguous(), y.contiguous())
            x.detach().zero_()
            return out

        return mutating

    spec = make("mutating", body=body)
    with pytest.raises(AssertionError, match="opcheck: .*mutat"):
        checks.opcheck(spec, spec.small[0])


def test_the_gradient_of_the_wrong_operand():
    spec = make("swapped", backward=lambda ctx, g: (g * 1, g * faulty.SCALE))
    with pytest.raises(BudgetError, match="grad of x, rows"):
        checks.error_budget(spec, spec.cases[0], torch.float32)
    with pytest.raises(AssertionError, match="gradcheck: Jacobian mismatch"):
        checks.derivatives(spec, spec.small[0])


def test_gradients_that_depend_on_which_are_needed():
    def backward(ctx, g):
        return g * faulty.SCALE, g * (1 if ctx.needs_input_grad[0] else 2)

    spec = make("subset", backward=backward)
    checks.error_budget(spec, spec.cases[0], torch.float32)
    with pytest.raises(BudgetError, match=r"grad of y, where \('y',\) needs a gradient"):
        checks.needed_gradients(spec, spec.small[0])


def test_tangents_of_zero():
    spec = make("tangents", tangents=False)
    with pytest.raises(AssertionError, match="forward mode: no tangent"):
        checks.forward_mode(spec, spec.small[0])
    with pytest.raises(AssertionError, match="forward mode neither works nor raises"):
        checks.forward_mode(replace(spec, forward_mode=False), spec.small[0])


def test_tangents_that_are_lost_where_gradients_are_needed():
    def fast(x, y):
        return RIGHT.op(x, y) if x.requires_grad else RIGHT.fast(x, y)

    with pytest.raises((AssertionError, RuntimeError), match="forward|jvp"):
        checks.forward_mode(replace(RIGHT, fast=fast), RIGHT.small[0])


def test_an_unrelated_error_in_forward_mode():
    def fast(x, y):
        if torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError("shapes cannot be multiplied")
        return RIGHT.op(x, y)

    with pytest.raises(AssertionError, match="raises something else: shapes cannot be multiplied"):
        checks.forward_mode(replace(RIGHT, fast=fast, forward_mode=False), RIGHT.small[0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x * x + y

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0].detach() * g, g


@pytest.mark.parametrize("twice", [True, False])
def test_a_double_backward_of_zero(twice):
    spec = replace(RIGHT, fast=lambda x, y: Once.apply(x, y), forward_mode=False, twice=twice)
    with pytest.raises(AssertionError, match="gradcheck|double backward neither works nor raises"):
        checks.derivatives(spec, spec.small[0])


def test_the_dtype_of_the_fake_is_wrong():
    spec = make("fake_dtype", fake=lambda x, y: torch.empty(x.shape, dtype=torch.float32, device=x.device))
    checks.opcheck(spec, spec.small[0])
    with pytest.raises(AssertionError, match="opcheck: .*dtype"):
        checks.opcheck(spec, spec.small[0], dtype=torch.bfloat16)


def test_the_dtype_of_the_output_is_wrong():
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x, y).float())
    with pytest.raises(BudgetError, match=r"out, rows: torch.float32 \(3, 5, 7\), expected torch.bfloat16"):
        checks.error_budget(spec, spec.cases[0], torch.bfloat16)


def test_gradients_that_are_lost():
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x.detach(), y))
    with pytest.raises(AssertionError, match="came out, expected"):
        checks.error_budget(spec, spec.cases[0], torch.float32)
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x, y) if x.requires_grad else RIGHT.fast(x, y).detach())
    with pytest.raises(AssertionError, match="came out, expected"):
        checks.needed_gradients(spec, spec.small[0])


def test_a_backward_that_writes_on_what_it_is_given():
    def backward(ctx, g):
        gradients = g * faulty.SCALE, g * 1
        g.detach().zero_()
        return gradients

    spec = make("greedy", backward=backward)
    with pytest.raises(BudgetError, match="incoming gradient, after backward"):
        checks.error_budget(spec, spec.cases[0], torch.float32)


def test_a_backward_that_reads_gradients_as_contiguous():
    def backward(ctx, g):
        dense = torch.as_strided(g, g.shape, torch.empty(g.shape).stride())
        return dense * faulty.SCALE, dense * 1

    spec = make("dense", backward=backward)
    for check in (checks.layouts, lambda spec, case, dtype, layout: checks.gradient_of_a_sum(spec, case)):
        with pytest.raises((AssertionError, RuntimeError)):
            check(spec, spec.cases[0], torch.float32, permuted)


def test_masked_lanes_that_are_used():
    spec = make("masked", faulty.masked_kernel)
    with pytest.raises(BudgetError, match="not finite where float64 is"):
        checks.error_budget(spec, spec.cases[0], torch.float32)


def test_an_empty_input_that_is_not_expected():
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x, y) if x.numel() else torch.empty(1))
    with pytest.raises(AssertionError):
        checks.zero_sizes(spec, spec.empty[0])


def test_results_that_depend_on_the_run():
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x, y) + 1e-3 * torch.rand(1))
    with pytest.raises(BudgetError, match="again at"):
        checks.repeatable(spec, spec.small[0], torch.float32)


def test_a_product_that_autocast_rounds():
    spec = replace(RIGHT, fast=lambda x, y: RIGHT.fast(x, y) @ torch.eye(x.shape[-1]))
    with pytest.raises(BudgetError, match="under autocast"):
        checks.autocast(spec, spec.small[0])


def test_a_copy_inside_a_body():
    def body(run):
        def copying(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return run(x.clone(), torch.cat([y, y])[: len(y)])

        return copying

    spec = make("copying", body=body)
    with pytest.raises(AssertionError, match="moves data beside its kernels: {'clone': .*'cat'"):
        checks.declared_cost(spec, spec.cases[0], torch.float32)
    x = torch.ones(2, 3, 4)
    with Traffic(ops={"copying": spec.op}, namespace="faults") as traffic:
        spec.op(x, x)
    assert traffic.copies == {"clone in copying": 1, "cat in copying": 1}


@pytest.mark.parametrize("change", [Cost(1, 0, 0), Cost(0, -4, 0), Cost(0, 0, 1)], ids=["read", "written", "launches"])
def test_a_declaration_that_is_wrong(change):
    def cost(x, y):
        size = x.numel() * x.element_size()
        return Cost(2 * size + change.read, size + change.written, 1 + change.launches)

    spec = make(f"declares_{'_'.join(map(str, change))}".replace("-", "m"), cost=cost)
    with pytest.raises(AssertionError, match=r"declares \(read, written, launches\) .*, ran "):
        checks.declared_cost(spec, spec.cases[0], torch.float32)


def test_layouts_that_are_read_wrongly():
    def body(run):
        def careless(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return run(x, y)  # as if all were contiguous

        return careless

    spec = make("careless", body=body)
    checks.layouts(spec, spec.cases[0], torch.float32, contiguous)
    with pytest.raises(BudgetError, match="out, permuted at"):
        checks.layouts(spec, spec.cases[0], torch.float32, permuted)


def test_an_operation_that_breaks_the_graph():
    spec = make("breaking")

    def fast(x, y):
        torch._dynamo.graph_break()
        return spec.fast(x, y)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        checks.compiled(replace(spec, fast=fast), spec.small[0])


def test_a_group_that_must_only_move():
    spec = replace(
        RIGHT, fast=lambda x, y: (x + 0 * y) * (1 + 2**-23), reference=lambda x, y: x + 0 * y, exact=frozenset({"rows"})
    )
    with pytest.raises(BudgetError, match="must be equal bit for bit"):
        checks.error_budget(spec, spec.cases[0], torch.float32)
