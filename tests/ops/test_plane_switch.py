"""plane_switch: rows move bit for bit, globals go through M."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.geometry.planes import DH, DHW, DW, HW, PLANES, row_map
from planecycle_fast.geometry.pooling import Transition, transition
from planecycle_fast.ops import Norm, add_norm, plane_switch, plane_switch_ref

pytestmark = pytest.mark.usefixtures("on_reference")

PAIRS = list(itertools.product(PLANES.values(), repeat=2))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tokens(plane, sizes, g, batch=2, channels=6, dtype=torch.float64):
    return torch.randn(batch * plane.slices(sizes), g + plane.length(sizes), channels, dtype=dtype)


def m_between(old, new, sizes, *settings):
    return transition(old.slices(sizes), new.slices(sizes), sizes[0], *settings)


@given(
    pair=st.sampled_from(PAIRS),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    g=st.sampled_from([0, 1, 5]),
    settings=st.tuples(st.sampled_from(["PCg", "PCm"]), st.sampled_from(["depth", "plane"])),
)
def test_rows_follow_the_row_map(pair, sizes, g, settings):
    old, new = pair
    x, m = tokens(old, sizes, g), m_between(old, new, sizes, *settings)
    out = plane_switch(x, old, new, sizes, g, m)
    rows = x.view(2, -1, 6)[:, row_map(old, new, sizes, g).index()]
    assert torch.equal(out.view(2, new.slices(sizes), -1, 6)[:, :, g:].flatten(1, 2), rows)
    expected = m.apply(x.view(2, old.slices(sizes), -1, 6)[:, :, :g])
    assert torch.equal(out.view(2, new.slices(sizes), -1, 6)[:, :, :g], expected)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_there_and_back_is_bit_exact(old, new, dtype):
    sizes, g = (3, 4, 5), 2
    x = tokens(old, sizes, g, dtype=dtype)
    there = plane_switch(x, old, new, sizes, g, m_between(old, new, sizes))
    back = plane_switch(there, new, old, sizes, g, m_between(new, old, sizes))
    assert back.dtype == dtype
    assert torch.equal(back[:, g:], x[:, g:])


def test_nothing_is_done_where_nothing_changes():
    x = tokens(HW, (3, 4, 5), 2)
    assert plane_switch(x, HW, HW, (3, 4, 5), 2, transition(3, 3, 3)) is x
    assert plane_switch(x, HW, HW, (3, 4, 5), 2, transition(3, 3, 3, "PCm")) is not x
    patches = x[:, 2:].contiguous()
    assert plane_switch(patches, HW, HW, (3, 4, 5), 0, transition(3, 3, 3, "PCm")) is patches


@pytest.mark.parametrize("batch, channels", [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_nothing_in_is_nothing_out(old, new, batch, channels):
    sizes, g = (3, 4, 5), 2
    x = tokens(old, sizes, g, batch, channels).requires_grad_()
    out = plane_switch(x, old, new, sizes, g, m_between(old, new, sizes))
    assert out.shape == (batch * new.slices(sizes), g + new.length(sizes), channels)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_a_strided_input_gives_the_same():
    sizes, g = (3, 4, 5), 2
    x, m = tokens(HW, sizes, g), m_between(HW, DW, sizes)
    wide = torch.stack([x, x], -1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(plane_switch(wide, HW, DW, sizes, g, m), plane_switch(x, HW, DW, sizes, g, m))


@pytest.mark.parametrize("settings", list(itertools.product(["PCg", "PCm"], ["depth", "plane"])), ids=str)
@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_gradients(old, new, settings):
    sizes, g = (3, 2, 4), 1
    x = tokens(old, sizes, g, batch=1, channels=2).requires_grad_()
    m = m_between(old, new, sizes, *settings)

    def call(x):
        return plane_switch(x, old, new, sizes, g, m)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_reference_is_called_by_that_name_too():
    x, m = tokens(HW, (3, 4, 5), 2), transition(3, 4, 3)
    assert torch.equal(plane_switch_ref(x, HW, DW, (3, 4, 5), 2, m), plane_switch(x, "HW", "DW", (3, 4, 5), 2, m))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x": torch.zeros(6, 22, 4).int()},
            TypeError,
            "x must be a floating-point tensor, got torch.int32",
        ),
        ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
        ({"x": torch.zeros(6, 21, 4)}, ValueError, r"x must have shape \(B\*3, 22, C\) .* got \(6, 21, 4\)"),
        ({"x": torch.zeros(7, 22, 4)}, ValueError, r"x must have shape .* got \(7, 22, 4\)"),
        ({"x": torch.zeros(6, 22)}, ValueError, r"x must have shape .* got \(6, 22\)"),
        (
            {"transition": Transition(3, 5)},
            ValueError,
            r"transition must be a matrix \(4, 3\) .*, got \(5, 3\)",
        ),
        ({"transition": None}, TypeError, "transition must be a pooling.Transition, got NoneType"),
        ({"old": "HX"}, ValueError, "old must be one of HW, DW, DH, DHW, got 'HX'"),
        ({"new": 3}, TypeError, "new must be the name of a plane, got int 3"),
        ({"sizes": (3, 4)}, ValueError, r"sizes must be \(D, H, W\), at least 1 each, got \(3, 4\)"),
        ({"sizes": (3, 0, 5)}, ValueError, r"sizes must be \(D, H, W\), at least 1 each, got \(3, 0, 5\)"),
        ({"num_globals": -1}, ValueError, "num_globals must be at least 0, got -1"),
        ({"backend": "metal"}, ValueError, "backend must be 'auto' or one of triton, cpu, reference, got 'metal'"),
        ({"backend": "triton"}, ValueError, "backend 'triton' is not usable: .*; usable: (cpu, )?reference"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.zeros(6, 22, 4), "old": HW, "new": DW, "sizes": (3, 4, 5), "num_globals": 2}
    arguments |= {"transition": transition(3, 4, 3)} | change
    with pytest.raises(error, match=message):
        plane_switch(**arguments)


def in_full(old, sizes, g, dtype=torch.float64, batch=2, channels=6):
    """A stream: residual, branch, scale, and a norm."""
    x, branch = (tokens(old, sizes, g, batch, channels, dtype) for _ in range(2))
    scale, weight, bias = torch.randn(3, channels, dtype=dtype)
    return x, branch, scale, Norm(weight, bias, 1e-5)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_in_full_it_is_the_sum_the_switch_and_the_norm(old, new, pool_method):
    sizes, g = (3, 4, 5), 2
    x, branch, scale, norm = in_full(old, sizes, g)
    m = m_between(old, new, sizes, pool_method)
    out, normed = plane_switch(x, old, new, sizes, g, m, branch, scale, norm)
    expected = plane_switch(x + scale * branch, old, new, sizes, g, m)
    assert torch.equal(out, expected)
    assert torch.equal(normed, F.layer_norm(expected, (6,), norm.weight, norm.bias, norm.eps))
    assert torch.equal(plane_switch(x, old, new, sizes, g, m, branch, scale), expected)
    assert torch.equal(plane_switch(x, old, new, sizes, g, m, norm=norm._replace(bias=None, rms=True))[0],
                       plane_switch(x, old, new, sizes, g, m))  # fmt: skip


def test_with_one_plane_it_is_add_norm():
    sizes, g = (3, 4, 5), 2
    x, branch, scale, norm = in_full(DW, sizes, g)
    m = transition(4, 4, 4)
    got = plane_switch(x, DW, DW, sizes, g, m, branch, scale, norm)
    assert all(torch.equal(a, b) for a, b in zip(got, add_norm(x, branch, scale, norm)))


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("old, new", [(HW, DW), (DH, HW), (DW, DHW)], ids=str)
def test_derivatives_in_full(old, new, pool_method):
    sizes, g = (3, 2, 2), 1
    x, branch, scale, norm = in_full(old, sizes, g, batch=1, channels=3)
    m = m_between(old, new, sizes, pool_method)
    leaves = [t.requires_grad_() for t in (x, branch, scale, norm.weight, norm.bias)]

    def call(x, branch, scale, weight, bias):
        return plane_switch(x, old, new, sizes, g, m, branch, scale, Norm(weight, bias, 1e-5))

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("new", PLANES.values(), ids=str)
def test_globals_of_their_own(new, pool_method):
    """Patches as a convolution makes them, globals beside them: no `cat`, no transpose."""
    sizes, g = (3, 4, 5), 2
    maps = torch.randn(6, 6, 4, 5, dtype=torch.float64)  # (B*D, C, H, W)
    patches, alike = maps.flatten(2).mT, torch.randn(1, g, 6, dtype=torch.float64)
    m = m_between(HW, new, sizes, pool_method)
    for globals_ in (torch.randn(6, g, 6, dtype=torch.float64), alike):
        expected = plane_switch(torch.cat([globals_.expand(6, -1, -1), patches], 1), HW, new, sizes, g, m)
        got = plane_switch(patches, HW, new, sizes, g, m, globals_=globals_)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
        assert got.is_contiguous()
        with Traffic() as traffic:
            plane_switch(patches, HW, new, sizes, g, m, globals_=globals_)
        assert not {"cat", "clone", "stack"} & traffic.copies.keys()
    mixed = plane_switch(patches.bfloat16(), HW, new, sizes, g, m, globals_=alike.float())
    assert mixed.dtype == torch.float32  # as `cat` promotes, under autocast


FULL = [
    ({"branch": torch.zeros(6, 21, 4)}, ValueError, r"branch must have x's shape, \(6, 22, 4\), got \(6, 21, 4\)"),
    ({"scale": torch.zeros(4)}, ValueError, "scale must be None without a branch to scale"),
    ({"norm": torch.nn.LayerNorm(4)}, TypeError, "norm must be an ops.Norm, got LayerNorm"),
    (
        {"globals_": torch.zeros(1, 2, 4)},
        ValueError,
        r"x must have shape \(B\*3, 20, C\) for no globals .*\(6, 22, 4\)",
    ),
    (
        {"x": torch.zeros(6, 20, 4), "globals_": torch.zeros(6, 1, 4)},
        ValueError,
        r"globals_ must have shape \(6, 2, 4\) or \(1, 2, 4\), got \(6, 1, 4\)",
    ),
    (
        {"x": torch.zeros(6, 20, 4), "globals_": [0.0]},
        TypeError,
        "globals_ must be a floating-point tensor or None, got list",
    ),
]


@pytest.mark.parametrize("change, error, message", FULL, ids=lambda v: str(v)[:40])
def test_bad_input_in_full(change, error, message):
    test_bad_input(change, error, message)
