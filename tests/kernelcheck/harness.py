"""All checks of an operation in one line of a test file: ``TestThing = op_tests(THING)``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import checks
from .executor import typed_by_inductor
from .layouts import LAYOUTS, VARIED, contiguous, permuted
from .overflow import apart, apart_unaligned

EXAMPLES = 50  # of each dtype


def op_tests(spec, examples=None):
    """A class of tests for pytest to find. `examples` of hypothesis, or `EXAMPLES`, run for each of three dtypes."""
    examples = examples or EXAMPLES
    of_plain = pytest.mark.parametrize("case", spec.plain, ids=lambda case: case.name)
    of_small = pytest.mark.parametrize("case", spec.small, ids=lambda case: case.name)
    of_empty = pytest.mark.parametrize("case", spec.empty, ids=lambda case: case.name)
    of_huge = pytest.mark.parametrize("case", spec.huge, ids=lambda case: case.name)
    of_dtypes = pytest.mark.parametrize("dtype", spec.dtypes, ids=lambda dtype: str(dtype).split(".")[1])
    fuzzed = [pytest.param(d, marks=pytest.mark.full) if d == torch.float16 else d for d in spec.dtypes]
    of_fuzzed = pytest.mark.parametrize("dtype", fuzzed, ids=lambda dtype: str(dtype).split(".")[1])
    of_layouts = _layouts(LAYOUTS)
    of_cases_and_dtypes = pytest.mark.parametrize("case, dtype", list(_in_dtypes(spec)))

    class Tests:
        @of_plain
        def test_plain(self, case):
            checks.plain(spec, case)

        @of_cases_and_dtypes
        def test_error_budget(self, case, dtype):
            checks.error_budget(spec, case, dtype)

        @pytest.mark.parametrize("case", [c for c in spec.cases if c.only is None], ids=lambda case: case.name)
        def test_float64(self, case):
            checks.float64(spec, case)

        @of_fuzzed
        @settings(max_examples=examples, derandomize=True)
        @given(case=spec.strategy(), layout=st.sampled_from(VARIED), upstream=st.sampled_from(VARIED))
        def test_error_budget_of_any_case(self, case, layout, upstream, dtype):
            checks.error_budget(spec, case, dtype, layout, upstream)

        @pytest.mark.full
        @of_dtypes
        @settings(max_examples=3 * examples)
        @given(case=spec.strategy(), layout=st.sampled_from(VARIED), upstream=st.sampled_from(VARIED))
        def test_error_budget_of_many_cases(self, case, layout, upstream, dtype):
            checks.error_budget(spec, case, dtype, layout, upstream)

        @of_small
        def test_derivatives(self, case):
            checks.derivatives(spec, case)

        @of_small
        def test_forward_mode(self, case):
            checks.forward_mode(spec, case)

        @of_small
        def test_needed_gradients(self, case):
            checks.needed_gradients(spec, case)

        @_layouts([contiguous, pytest.param(permuted, marks=pytest.mark.full)] if spec.any_strides else [contiguous])
        def test_opcheck(self, layout):
            checks.opcheck(spec, spec.typical, layout)

        @of_small
        def test_opcheck_of_cases(self, case):
            checks.opcheck(spec, case, dtype=torch.bfloat16)

        @pytest.mark.parametrize("dynamic", [False, True])
        @of_small
        def test_compiled(self, case, dynamic):
            checks.compiled(spec, case, dynamic)

        def test_compiled_bf16(self):
            checks.compiled(spec, spec.typical, dtype=torch.bfloat16)

        @of_dtypes
        @of_layouts
        def test_layouts(self, layout, dtype):
            checks.layouts(spec, spec.typical, dtype, layout)

        @of_empty
        def test_zero_sizes(self, case):
            checks.zero_sizes(spec, case)

        @of_small
        def test_gradient_of_a_sum(self, case):
            checks.gradient_of_a_sum(spec, case)

        @of_small
        def test_nan_footprint(self, case):
            checks.nan_footprint(spec, case)

        @of_small
        def test_repeatable(self, case):
            checks.repeatable(spec, case, torch.bfloat16)

        @of_small
        def test_autocast(self, case):
            checks.autocast(spec, case)

        @pytest.mark.parametrize("case, dtype", list(_in_dtypes(spec, every=False)))
        def test_declared_cost(self, case, dtype):
            checks.declared_cost(spec, case, dtype)

        @_layouts([contiguous, pytest.param(permuted, marks=pytest.mark.full)] if spec.any_strides else [contiguous])
        @of_huge
        def test_overflow(self, case, layout):
            checks.overflow(spec, case, layout)

        @pytest.mark.parametrize("case", [] if spec.opaque else spec.huge, ids=lambda case: case.name)
        def test_overflow_typed_by_inductor(self, case):
            checks.overflow(spec, case, typed=typed_by_inductor)

        @_layouts([permuted, apart, apart_unaligned] if spec.any_strides else [contiguous])
        @pytest.mark.parametrize("case", [spec.typical, *spec.small], ids=lambda case: case.name)
        def test_overflow_of_strides(self, case, layout):
            checks.overflow(spec, case, layout)

        def test_overflow_sees_huge_cases(self):
            checks.huge_cases(spec)

        @_layouts(LAYOUTS if spec.any_strides else [contiguous])
        def test_declared_cost_of_layouts(self, layout):
            checks.declared_cost(spec, spec.typical, spec.dtypes[0], layout)

        @of_empty
        def test_declared_cost_of_nothing(self, case):
            checks.declared_cost(spec, case, spec.dtypes[0])

    Tests.spec = spec
    Tests.__doc__ = f"Everything that planecycle_fast::{spec.op.name} must pass."
    return Tests


def _layouts(layouts):
    return pytest.mark.parametrize("layout", layouts, ids=lambda layout: layout.__name__)


def _in_dtypes(spec, every=True):
    """`Spec.in_dtypes`, by name."""
    for case, dtype in spec.in_dtypes(every):
        yield pytest.param(case, dtype, id=f"{case.name}-{str(dtype).split('.')[1]}")
