"""Every kernel as torch.compile would launch it on a GPU: it compiles, and torch finds what it writes to."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are not compiled under TRITON_INTERPRET=1", allow_module_level=True)

from ..kernelcheck.codegen import check_binary, compile_variant
from ..kernelcheck.codegen_table import all_factors, pairwise
from ..kernelcheck.inductor import arguments_of, check_writes, inductor_variant
from ..kernelcheck.launches import launches_of
from ..kernelcheck.layouts import contiguous
from ..specs import SPECS as ALL

SPECS = [spec for spec in ALL if not spec.opaque]  # others are calls to it


def builds(spec):
    """(launch, whether its accesses must be wide): what the codegen gate builds, two by two, and two small cases.

    In those many sizes are 1: constants.
    """
    factors = all_factors(spec) | {"arch": [90], "aligned": [True], "dtype": [torch.bfloat16]}
    for choice in pairwise(factors):
        case = spec.factors_case(**{name: choice[name] for name in spec.factors})
        launches = launches_of(spec, case, choice["dtype"], choice["layout"])
        launch = launches[choice["call"] % len(launches)]
        yield launch, choice["layout"] is contiguous and spec.wide(choice)
    for case in spec.small[:2]:
        yield from [(launch, False) for launch in launches_of(spec, case, torch.float32)]


def variants():
    found = {}
    for spec in SPECS:
        for launch, wide in builds(spec):
            variant = inductor_variant(launch)
            found[variant.name, wide] = spec, variant, wide
    return list(found.values())


VARIANTS = variants()


FEW = 4  # of builds that take seconds; of the others every second one in `make test`
BUILDS = [
    pytest.param(*build, marks=[pytest.mark.full] if (i >= FEW if build[0].slow_builds else i % 2) else [])
    for spec in SPECS
    for i, build in enumerate([build for build in VARIANTS if build[0] is spec])
]


@pytest.mark.parametrize("spec, variant, wide", BUILDS, ids=lambda v: getattr(v, "name", "").split(":")[0])
def test_machine_code(spec, variant, wide):
    """What holds of triton's own builds holds of Inductor's: no spills, offsets of 64 bits, wide accesses."""
    check_binary(compile_variant(variant, 90), 90, wide, spec.exempt, tensor_cores=spec.tensor_cores)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_every_kernel_is_among_them(spec):
    built = {variant.kernel.__name__ for other, variant, _ in VARIANTS if other is spec}
    assert built == set(spec.outputs)
    launched = [
        launch for case in (spec.typical, *spec.cases) for launch in launches_of(spec, case, case.only or torch.float32)
    ]
    assert built == {launch.kernel.__name__ for launch in launched}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_exactly_outputs_are_written(spec):
    seen, few = set(), [spec.typical, *spec.small]
    for case in [*few, *spec.cases]:
        for dtype in [torch.bfloat16, torch.float64] if case is spec.typical else [torch.bfloat16]:
            for launch in launches_of(spec, case, dtype):
                if (key := _kind(launch)) not in seen:
                    seen.add(key)
                    ways = (False, True) if case in few else (True,)
                    check_writes(launch, spec.outputs[launch.kernel.__name__], ways)


def _kind(launch):
    """What of a launch may change what its kernel writes to: which tensors there are, constants that are no sizes."""
    kept = {name: v.dtype if isinstance(v, torch.Tensor) and v.numel() else None
            for name, v in arguments_of(launch).items() if v is None or isinstance(v, torch.Tensor)}  # fmt: skip
    words = [(name, v) for name, v in launch.constants.items() if isinstance(v, (str, bool))]
    return launch.kernel.__name__, tuple(kept.items()), tuple(words)
