"""The kernel of rope compiled without a GPU: what `test_codegen.py` and `test_custom_ops.py` ask of one operation."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.ops.rotary.rope_triton import rope_triton

from ..kernelcheck.codegen import ARCHITECTURES, check_binary, compile_variant
from ..kernelcheck.launches import launches_of, variants
from ..kernelcheck.layouts import contiguous, stepped
from ..specs.rope import KINDS, MODELS, SPEC, case, codegen_case
from .test_custom_ops import graphs_of, target  # noqa: F401  (a fixture)

OTHERS = sorted(set(KINDS) - {kind for _, _, kind, _ in MODELS.values()})  # than those of the committed table


@pytest.mark.parametrize("kind, arch", list(zip(OTHERS, itertools.cycle(ARCHITECTURES))))
def test_other_kinds_of_angles_compile_too(kind, arch):
    launch = launches_of(SPEC, case(kind, (14, 14), 5, 18, 64, turned=12), torch.bfloat16)[0]
    check_binary(compile_variant(launch.variant(True, arch), arch), arch, wide=True, exempt=SPEC.exempt)


@pytest.mark.parametrize("model", MODELS)
def test_float64_compiles_too(model):
    (launch, *_) = launches_of(SPEC, codegen_case(model), torch.float64)
    check_binary(compile_variant(launch.variant(True, 90), 90), 90, wide=True, exempt=SPEC.exempt)


@pytest.mark.parametrize("kind", ["dense", "tables", "axial", "max"])
def test_sizes_are_not_specialised(kind):
    for layout, expected in ((contiguous, 2), (stepped, 3)):  # out of place as in backward, in place; and forward
        launches = []
        for grid in ((14, 14), (1, 1), (16, 1), (17, 32), (64, 4)):
            for sequences, g, heads in ((1, 0, 18), (16, 5, 36), (100, 1, 1)):
                c = case(kind, (*grid, 3) if kind == "max" else grid, g, heads, 64, sequences, turned=heads // 2)
                launches += launches_of(SPEC, c, torch.bfloat16, layout)
        assert len(variants(launches, [True])) == expected
        assert all(len(launch.grid) == 1 for launch in launches)  # y and z end at 65,535


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["axial", "dense", "bf16"])
def test_compilers_see_the_kernel_and_nothing_else(kind, dynamic):
    angles = KINDS[kind]((3, 4), 16)
    x = torch.zeros(2, 14, 6, 16, requires_grad=True)
    graphs = graphs_of(lambda x: rope_triton(x, angles, 2, 4, False, False), x, dynamic=dynamic)
    assert len(graphs) == 2  # forward and backward
    for graph in graphs:
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert len([call for call in calls if call.startswith("triton_kernel_wrapper")]) == 1, calls
        assert [call for call in calls if call.startswith("aten") and "sym" not in call] == ["aten.new_empty.default"]
