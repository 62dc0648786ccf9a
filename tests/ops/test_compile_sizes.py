"""Operations take sizes that are symbols: what `test_gpu_ops.test_opcheck` and dynamic shapes need, without a GPU."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
if triton.knobs.runtime.interpret:
    pytest.skip("torch cannot wrap kernels under TRITON_INTERPRET=1", allow_module_level=True)

from torch.library import wrap_triton

from planecycle_fast.ops.registration import OPS
from planecycle_fast.ops.registry import CustomOp

from ..kernelcheck import checks
from ..kernelcheck.interpreter import poisoned
from ..kernelcheck.launches import idle_launches
from ..kernelcheck.layouts import contiguous, permuted
from ..kernelcheck.symbolic import symbolic_sizes, trace
from ..specs import SPECS

CASES = [  # a third of the named ones in `make test`
    pytest.param(spec, c, id=f"{spec.op.name} {c.name}", marks=[] if i % 3 == 0 or c in few else pytest.mark.full)
    for spec in SPECS
    for few in [(spec.typical, *spec.small)]
    for i, c in enumerate((*few, *spec.plain, *spec.cases))
]


@pytest.mark.parametrize("spec, case", CASES)
def test_symbolic_sizes(spec, case):
    symbolic_sizes(spec, case)


@pytest.mark.parametrize("layout", [contiguous, permuted], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_opcheck(spec, layout):
    """As on a GPU, but for what kernels compute; in the interpreter operations are registered in another way."""
    with idle_launches() as launches, poisoned():
        checks.opcheck(spec, spec.typical, layout)
    assert launches


def test_every_operation_has_a_case():
    found = set()
    for spec in SPECS:
        found |= {
            op.name
            for op, _ in spec.op_arguments(spec.typical.make(torch.float32, device="meta"), spec.typical.settings)
        }
    assert found == set(OPS)


@triton.jit
def fill_kernel(out, n, BLOCK: triton.language.constexpr):
    i = triton.language.arange(0, BLOCK)
    triton.language.store(out + i, 0.0, mask=i < n)


TABLE = {(4, 5): 16}
names = itertools.count()


@functools.cache
def block(channels):
    return 16 if channels > 4 else 8


def operation(choose):
    """Registered as those of the package are: rows of zeros, by a kernel that is compiled for what `choose` says."""

    def body(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        out = x.new_empty(sizes[0] * sizes[1], x.shape[2])
        wrap_triton(fill_kernel)[(out.shape[0],)](out, out.shape[1], BLOCK=choose(x, sizes))
        return out

    name = f"symbols_{next(names)}"
    torch.library.triton_op(f"faults::{name}", body, mutates_args=())
    return CustomOp(name, body, lambda *_: None, getattr(torch.ops.faults, name).default)


UNHASHABLE = "cannot take sizes that are symbols: unhashable type"
FAULTS = [
    (lambda x, sizes: block(x.shape[2]), UNHASHABLE),
    (lambda x, sizes: TABLE.get((sizes[0], x.shape[2]), 8), UNHASHABLE),
    (lambda x, sizes: 8 if sizes[1] in {3, 5} else 16, UNHASHABLE),
    (lambda x, sizes: triton.next_power_of_2(x.shape[2]), "fill_kernel would be compiled for a symbol, BLOCK = "),
    (lambda x, sizes: 16 + 0 * int(x.shape[1]), "axis 1 of tensor 1 became the number 7"),
    (lambda x, sizes: 16 + 0 * int(sizes[0]), "integer 2 became the number 4"),
    (lambda x, sizes: 16 if sizes[0] == 4 else 8, "integer 2 became the number 4"),
]


@pytest.mark.parametrize("choose, message", FAULTS, ids=range(len(FAULTS)))
def test_faults_are_seen(choose, message):
    with pytest.raises(AssertionError, match=message):
        trace(operation(choose), (torch.empty(3, 7, 5, device="meta"), [4, 6]))


def test_numbers_of_channels_are_no_fault():
    launches = trace(operation(lambda x, sizes: block(int(x.shape[2]))), (torch.empty(3, 7, 5, device="meta"), [4, 6]))
    assert [launch.constants for launch in launches] == [{"BLOCK": 16}]


def test_opcheck_sees_a_size_in_a_table():
    spec = replace(SPECS[0], op=(op := operation(lambda x, sizes: TABLE.get(x.shape[2], 8))), others=())
    spec = replace(spec, op_arguments=lambda tensors, settings: [(op, (tensors["x"], [4, 6]))])
    with idle_launches(), poisoned(), pytest.raises(AssertionError, match="unhashable type"):
        checks.opcheck(spec, spec.typical)
