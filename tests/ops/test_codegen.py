"""Every kernel compiles for every GPU without spills, with 16-byte accesses; the committed table is not stale."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.geometry.planes import DH, DW, HW

from ..kernelcheck import codegen_table
from ..kernelcheck.codegen import check_binary, compile_variant
from ..kernelcheck.launches import launches_of, variants
from ..specs import SPECS
from ..specs.plane_switch import SPEC as PLANE_SWITCH
from ..specs.plane_switch import case

FEW = 4  # of builds that take seconds
BUILDS = [
    pytest.param(spec, choice, marks=[pytest.mark.full] if (i >= FEW if spec.slow_builds else i % 2) else [])
    for spec in SPECS
    for i, choice in enumerate(codegen_table.pairwise(codegen_table.all_factors(spec)))
]


def _name(value):
    return " ".join(getattr(v, "__name__", str(v)) for v in value.values()) if isinstance(value, dict) else ""


def test_a_run_compiles_no_more_than_it_may():
    assert 20 <= len([build for build in BUILDS if not build.marks]) <= 150  # of `make test`


def test_torch_finds_the_kernels_for_its_compile_caches():
    from torch._library.triton import get_inner_triton_kernels

    for spec in SPECS:
        cases = [case for case in (spec.typical, *spec.cases) if not case.narrower]
        kernels = {launch.kernel for c in cases for launch in launches_of(spec, c, c.only or spec.dtypes[0])}
        found = {kernel for op in spec.ops for kernel in get_inner_triton_kernels(op.body)}
        assert kernels and found == (set() if spec.opaque else kernels)


@pytest.mark.parametrize("spec, choice", BUILDS, ids=_name)
def test_machine_code(spec, choice):
    _, variant, wide = codegen_table.build(spec, **choice)
    binary = compile_variant(variant, choice["arch"])
    check_binary(binary, choice["arch"], wide, spec.exempt, tensor_cores=spec.tensor_cores)


@pytest.mark.parametrize("pool", ["none", "PCg", "PCm"])
@pytest.mark.parametrize("call", [0, 1])
def test_float64_compiles_too(pool, call):
    choice = dict(dtype=torch.float64, layout=codegen_table.contiguous, channels=384, pool=pool, call=call)
    _, variant, wide = codegen_table.build(PLANE_SWITCH, aligned=True, arch=90, **choice)
    check_binary(compile_variant(variant, 90), 90, wide)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_the_table_is_not_stale(spec):
    rows, builds = codegen_table.read_table(), codegen_table.every_build(spec)
    assert codegen_table.stale(spec, rows, builds) is None, "run `make codegen` and commit its table"
    assert {row["triton"] for row in rows} == {triton.__version__}, "the table is of another triton: `make codegen`"


def test_a_stale_table_is_noticed(monkeypatch):
    rows, builds = codegen_table.read_table(), codegen_table.every_build(PLANE_SWITCH)
    fewer = [row for row in rows if row["kernel"] == "plane_switch_kernel"][1:]
    assert "1 builds of plane_switch are missing" in codegen_table.stale(PLANE_SWITCH, fewer, builds)
    monkeypatch.setattr(codegen_table, "source_hash", lambda kernel: "another")
    assert codegen_table.stale(PLANE_SWITCH, rows, builds) == "the source of plane_switch_kernel has changed"


def test_the_source_of_a_kernel_is_all_that_it_calls():
    """In other modules too."""
    from planecycle_fast.ops.residual.add_norm_backward_triton import add_norm_backward_kernel

    names = {function.fn.__name__ for function in codegen_table.reached(add_norm_backward_kernel)}
    assert {"add_norm_backward_kernel", "_patches", "gradient", "_normalized", "load_rows", "_bin_size"} <= names


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_sizes_are_not_specialised(pool_method):
    launches = []
    shapes = [(32, 14, 14), (1, 1, 1), (17, 16, 16), (64, 4, 4), (16, 32, 48), (4096, 64, 64), (9, 31, 5)]
    for sizes in shapes:
        for old, new in ((HW, DW), (DW, DH), (DH, HW)):
            for batch, g in ((1, 5), (3, 1), (16, 16)):
                launches += launches_of(PLANE_SWITCH, case(old, new, sizes, g, 384, batch, pool_method), torch.bfloat16)
    assert max(launch.grid[0] for launch in launches) > 2**20
    assert len(variants(launches, [True])) == 2  # forward and backward


def test_one_launch_for_both_kinds_of_rows():
    for pool_method in ("PCg", "PCm"):
        launches = launches_of(PLANE_SWITCH, case(HW, DW, (32, 14, 14), 5, 384, 1, pool_method), torch.bfloat16)
        assert len(launches) == 2  # forward and backward, one each
        assert all(len(launch.grid) == 1 for launch in launches)  # y and z end at 65,535
