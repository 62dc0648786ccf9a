"""The Triton kernel of plane_switch passes everything."""

import pytest
import torch

from planecycle_fast.geometry.planes import DH, DHW, DW, HW
from planecycle_fast.ops.plane_change.plane_switch_triton import OP
from planecycle_fast.ops.registry import Cost
from planecycle_fast.runtime.backends import pick

from ..kernelcheck.harness import op_tests
from ..kernelcheck.observers import Observer, observing
from ..specs.plane_switch import SPEC, case, groups, op_arguments

TestPlaneSwitch = op_tests(SPEC)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_each_row_is_read_once_and_written_once(pool_method):
    """24 patches; globals of 4 slices become those of 2. With declared costs held against what kernels do, above."""
    c = case(HW, DW, (4, 2, 3), 5, 8, batch=3, pool_method=pool_method)
    (_, forward), (_, backward) = op_arguments(c.make(torch.float32), c.settings)
    row = 8 * 4
    assert OP.cost(*forward) == Cost(3 * (24 + 5 * 4) * row, 3 * (24 + 5 * 2) * row, 1)
    read = {"PCg": 4, "PCm": 2}[pool_method]  # each of 4 slices reads the one it was pooled into; PCm reduces 2 once
    assert OP.cost(*backward) == Cost(3 * (24 + 5 * read) * row, 3 * (24 + 5 * 4) * row, 1)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("old, new", [(HW, DW), (DW, DH), (DHW, DH), (DH, DHW)], ids=str)
def test_the_mean_of_equal_globals_is_the_same(old, new, pool_method):
    c = case(old, new, (7, 3, 5), 2, 8, pool_method=pool_method, globals_at="plane")
    values = torch.randint(1, 100, (1, 2, 8)).float()
    x = c.make(torch.float32)["x"]
    groups(x, c.settings)["globals"].copy_(values.expand(len(x), 2, 8))
    out = SPEC.fast(x, **c.settings)[:, :2]
    assert torch.equal(out, values.expand_as(out))


X = case(HW, DW, (2, 3, 1), 1, 1).make(torch.float64)["x"]
DIRECTION = torch.randn(X.shape, dtype=torch.float64)


def cubed(function, c):
    return lambda x: (function(x, **c.settings) ** 3).sum()


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f)(X),
        lambda f: torch.func.jvp(f, (X,), (DIRECTION,))[1],
        lambda f: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (DIRECTION,))[1], (X,), (DIRECTION,))[1],
        lambda f: torch.func.jvp(torch.func.grad(f), (X,), (DIRECTION,))[1],
        lambda f: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (DIRECTION,))[1])(X),
        lambda f: torch.func.hessian(f)(X),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f))(X),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, DIRECTION])),
        lambda f: torch.func.jvp(torch.func.vmap(f), (torch.stack([X, X]),), (torch.stack([X, DIRECTION]),))[1],
        lambda f: torch.func.vmap(f, in_dims=2)(torch.stack([X, DIRECTION], 2)),
    ],
    ids=["grad", "jvp", "jvp-jvp", "jvp-grad", "grad-jvp", "hessian", "jacrev-jacfwd", "vmap-grad", "jvp-vmap", "vmap"],
)
def test_transforms_of_torch_func(transform, pool_method):
    c = case(HW, DW, (2, 3, 1), 1, 1, pool_method=pool_method)
    torch.testing.assert_close(transform(cubed(SPEC.fast, c)), transform(cubed(SPEC.reference, c)))


def test_forward_over_reverse():
    c = case(HW, DW, (2, 3, 1), 1, 1)

    def product(function):  # of the Hessian and a direction
        x = X.clone().requires_grad_()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, DIRECTION)
            (grad,) = torch.autograd.grad(cubed(function, c)(dual), dual, create_graph=True)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    torch.testing.assert_close(product(SPEC.fast), product(SPEC.reference))


class Seen(Observer):
    """The constants that a kernel was compiled for, launch by launch."""

    def __init__(self):
        self.constants = []

    def launched(self, launch):
        self.constants.append({name: value for name, value in launch.values.items() if name.isupper()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_accesses_are_16_bytes_wide_where_rows_allow_it(dtype):
    wide = 16 // dtype.itemsize
    for channels, expected in ((2 * wide, wide), (2 * wide + 1, 1)):
        c = case(HW, DW, (2, 3, 2), 1, channels)
        with observing(Seen()) as seen:
            SPEC.fast(**c.make(dtype), **c.settings)
        assert [constants["UNIT"] for constants in seen.constants] == [expected]


def test_without_globals_one_kernel_serves_both_directions():
    c = case(HW, DW, (2, 3, 2), 0, 8)
    x = c.make(torch.float32)["x"].requires_grad_()
    with observing(Seen()) as seen:
        out = SPEC.fast(x, **c.settings)
        out.backward(torch.ones_like(out))
    forward, backward = seen.constants
    assert forward == backward and forward["POOL"] == "none"


def test_auto_does_not_take_the_interpreter():
    assert pick("auto", torch.device("cpu")) in ("cpu", "reference")
    assert pick("triton", torch.device("cpu")) == "triton"
