"""The Triton kernel of rope passes everything."""

import pytest
import torch

from planecycle_fast.geometry.rope import Augmentation, Rope, make_periods
from planecycle_fast.ops import Axial, Tables, rope, rope_ref
from planecycle_fast.ops.rotary.rope_triton import OP, arguments_of

from ..kernelcheck.budget import check_bits
from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import VARIED
from ..kernelcheck.observers import Observer, observing
from ..kernelcheck.overflow import apart, apart_unaligned, probing
from ..specs.rope import KINDS, SPEC, case

TestRope = op_tests(SPEC, examples=250)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
AXIAL = [kind for kind in KINDS if "tables" not in kind and "dense" not in kind]


def tables_of(angles, length, head_dim):
    """Cosine and sine that the kernel turns by: those of the complex number 1."""
    dtype = angles.tables().sin[0].dtype
    x = torch.zeros(1, length, 1, head_dim, dtype=torch.promote_types(dtype, torch.float32))
    x[..., : head_dim // 2] = 1
    return rope(x, angles, 0, backend="triton").squeeze((0, 2)).tensor_split(2, -1)


@pytest.mark.parametrize("grid", [(13, 7), (1, 64), (3, 5, 4), (5, 4, 3)], ids=str)
@pytest.mark.parametrize("kind", AXIAL)
def test_tables_are_those_of_rope(kind, grid):
    """To the bit in 16 bits, whose roundings are followed one by one; else off by an ulp of 1."""
    angles, length = KINDS[kind](grid, 32), grid[0] * grid[1] * (grid[2] if len(grid) == 3 else 1)
    expected = angles.rope.sincos(grid, angles.augmentation)
    for got, table in zip(tables_of(angles, length, 32), reversed(expected)):
        table = table[:, :16]
        if torch.finfo(table.dtype).bits == 16:
            check_bits(kind, got.to(table.dtype), table)
        else:
            torch.testing.assert_close(got.to(table.dtype), table, rtol=0, atol=torch.finfo(table.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_coordinates_that_are_rounded_to_the_periods_dtype(dtype):
    """As timm does where periods were cast with the model: tables, for the kernel promotes."""
    periods = make_periods(8, 100.0).to(dtype)
    rounded, promoted = [Axial(Rope(periods, coords_as_periods=narrow), (5, 3)) for narrow in (True, False)]
    for got, table in zip(tables_of(rounded, 15, 32), reversed(rounded.rope.sincos((5, 3)))):
        assert table.dtype == dtype
        check_bits("rounded", got.to(dtype), table[:, :16])
    assert not torch.equal(tables_of(promoted, 15, 32)[0].to(dtype), tables_of(rounded, 15, 32)[0].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("largest", [3, 100, 6000])
def test_sine_and_cosine_of_large_angles(dtype, largest):
    """Off by an ulp of 1, also near multiples of pi/2. Inverse periods are the angles of the coordinate 1."""
    spread = torch.linspace(-largest, largest, 256, dtype=torch.float64)
    near = torch.pi / 2 * torch.linspace(1, 2 * largest // 3, 256, dtype=torch.float64).round()
    for wanted in (spread, near):
        found = Rope((wanted / (2 * torch.pi)).to(dtype), periods_are_inverse=True, coord_dtype=dtype)
        angles = Axial(found, (1, 1), Augmentation(shift=torch.ones(2, dtype=dtype)))
        exact = torch.cat(found.angles((1, 1), angles.augmentation), -1).double()
        for got, expected in zip(tables_of(angles, 1, 1024), (exact.cos(), exact.sin())):
            torch.testing.assert_close(got.double(), expected[0][None], rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", VARIED, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, in_table_dtype", [("axial", False), ("dense bf16", True), ("tables", False)])
def test_in_place_is_the_same_to_the_bit(kind, in_table_dtype, dtype, layout):
    c = case(kind, (3, 4), 2, 4, 16, turned=3, in_table_dtype=in_table_dtype)
    x = layout(c.make(dtype)["x"])
    expected = SPEC.fast(x, **c.settings)
    assert SPEC.fast(x, **c.settings, inplace=True) is x
    check_bits("in place", x, expected)


@pytest.mark.parametrize("turned", [3, 9, 0])
def test_in_place_touches_nothing_else(turned):
    """Neither globals nor heads that do not turn, which may hold anything, are read or written."""

    class Touched(Observer):
        def accessed(self, access):
            if access.argument.name in ("x", "out"):
                elements.update((access.distances // 4).tolist())

    elements, c = set(), case("axial", (3, 4), 2, 9, 16, turned=turned)
    x = c.make(torch.float32)["x"]
    before = x.clone()
    with observing(Touched()):
        SPEC.fast(x, **c.settings, inplace=True)
    places = torch.arange(x.numel()).view(x.shape)
    assert elements == set(places[:, 2:, :turned].flatten().tolist())
    assert torch.equal(x[:, :2], before[:, :2]) and torch.equal(x[:, :, turned:], before[:, :, turned:])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("table", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("in_table_dtype", [False, True])
def test_dtypes_of_x_and_tables(dtype, table, in_table_dtype):
    """As close to the reference as two of its roundings; globals are rounded where it rounds them."""
    c = case("tables", (3, 4), 2, 3, 16)
    angles = Tables(*[tuple([t.to(table) for t in ts]) for ts in c.settings["angles"]])
    x = c.make(dtype)["x"]
    got, expected = [f(x, angles, 2, in_table_dtype=in_table_dtype) for f in (_fast, rope_ref)]
    coarse = [table if in_table_dtype else torch.promote_types(dtype, table), dtype]
    eps = max(torch.finfo(d).eps for d in coarse)
    torch.testing.assert_close(got, expected, rtol=0, atol=8 * eps)
    assert torch.equal(got[:, :2], expected[:, :2]) and got.dtype == dtype


def _fast(*args, **kwargs):
    return rope(*args, **kwargs, backend="triton")


def test_tables_of_any_strides():
    x, angles = torch.randn(2, 13, 2, 16), KINDS["tables"]((3, 4), 16)
    expected = _fast(x, angles, 1)
    for layout in VARIED:
        check_bits(layout.__name__, _fast(x, Tables(*[tuple(map(layout, ts)) for ts in angles]), 1), expected)
    mixed = Tables(tuple(map(VARIED[1], angles.sin)), angles.cos)
    check_bits("of sine alone", _fast(x, mixed, 1), expected)


@pytest.mark.parametrize("layout", [apart, apart_unaligned], ids=lambda layout: layout.__name__)
def test_overflow_of_strides_of_tables(layout):
    angles = KINDS["tables"]((2, 3, 2), 16, device="meta")
    angles = Tables(*[tuple(map(layout, ts)) for ts in (angles.sin, angles.cos)])
    x = torch.empty(2, 13, 2, 16, device="meta")
    with probing() as probe:
        OP.body(x, *arguments_of(x, angles, 1, None, False))
    assert probe.launches == 1


C = case("axial", (2, 1), 1, 2, 4, 1, turned=1)
X = C.make(torch.float64)["x"]
DIRECTION = torch.randn(X.shape, dtype=torch.float64)


def cubed(function):
    return lambda x: (function(x, **C.settings) ** 3).sum()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f)(X),
        lambda f: torch.func.jvp(f, (X,), (DIRECTION,))[1],
        lambda f: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (DIRECTION,))[1], (X,), (DIRECTION,))[1],
        lambda f: torch.func.jvp(torch.func.grad(f), (X,), (DIRECTION,))[1],
        lambda f: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (DIRECTION,))[1])(X),
        lambda f: torch.func.hessian(f)(X),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, DIRECTION])),
        lambda f: torch.func.jvp(torch.func.vmap(f), (torch.stack([X, X]),), (torch.stack([X, DIRECTION]),))[1],
        lambda f: torch.func.vmap(f, in_dims=2)(torch.stack([X, DIRECTION], 2)),
    ],
    ids=["grad", "jvp", "jvp-jvp", "jvp-grad", "grad-jvp", "hessian", "vmap-grad", "jvp-vmap", "vmap"],
)
def test_transforms_of_torch_func(transform):
    torch.testing.assert_close(transform(cubed(SPEC.fast)), transform(cubed(SPEC.reference)))


def test_transforms_in_place():
    def turned(function):
        return lambda x: function(2 * x, **C.settings, inplace=True)

    for transform in (
        lambda f: torch.func.jvp(f, (X,), (DIRECTION,))[1],
        lambda f: torch.func.vmap(f)(torch.stack([X, DIRECTION])),
    ):
        torch.testing.assert_close(transform(turned(SPEC.fast)), transform(turned(SPEC.reference)))


def test_compiled_in_place():
    x = X.float()
    expected = SPEC.fast(x, **C.settings)
    torch._dynamo.reset()
    compiled = torch.compile(SPEC.fast, fullgraph=True, backend="aot_eager")
    got = x.clone()
    assert torch.equal(compiled(got, **C.settings, inplace=True), expected) and torch.equal(got, expected)


def test_angles_that_need_a_gradient_are_refused():
    x, angles = torch.randn(1, 13, 1, 16), KINDS["tables"]((3, 4), 16)
    needs = Tables([t.clone().requires_grad_() for t in angles.sin], angles.cos)
    periods = make_periods(4, 100.0).requires_grad_()
    for made in (needs, Axial(Rope(periods), (3, 4))):
        with pytest.raises(ValueError, match="angles must not need a gradient on backend 'triton'"):
            _fast(x, made, 1)
        with torch.no_grad():
            _fast(x, made, 1)

    def of_a_table(t):
        return _fast(x, Tables((t, angles.sin[1]), angles.cos), 1)

    sine = angles.sin[0]
    for transform in (
        lambda: torch.func.jvp(of_a_table, (sine,), (sine,)),
        lambda: torch.func.grad(lambda t: of_a_table(t).sum())(sine),
        lambda: torch.func.vmap(of_a_table)(torch.stack([sine, sine])),
    ):
        with pytest.raises(ValueError, match="angles must not need a gradient|angles must be the same"):
            transform()


@pytest.mark.parametrize(
    "x, message",
    [
        ((2**30, 2, 1, 2), "2147483648 rows"),
        ((1, 2, 1, 2048), "hd = 2048"),
        ((2**28, 2, 2**12, 512), "programs"),
        ((2**30, 1, 2**13, 2), "2147483648 programs"),
        ((1, 1, 2**31, 2), "2147483648 heads"),
    ],
    ids=str,
)
def test_what_is_too_large_is_refused(x, message):
    angles = Tables(*[(torch.empty(2, x[3] // 2, device="meta"),)] * 2)
    x = torch.empty(x, device="meta")
    with pytest.raises(ValueError, match=f"too large for backend 'triton': .*{message}.* expected at most"):
        OP.body(x, *arguments_of(x, angles, 0, None, False))


def test_as_many_programs_as_a_grid_takes():
    angles = Tables(*[(torch.empty(1, 1, device="meta"),)] * 2)
    x = torch.empty(512 * (2**21 - 1), 1, 8 * 2**10, 2, device="meta")  # 512 rows and 8 heads of a program
    with probing() as probe:
        OP.body(x, *arguments_of(x, angles, 0, None, False))
    assert probe.launch.grid == (2**31 - 2**10, 1, 1)


class Seen(Observer):
    """The constants that a kernel was compiled for, launch by launch."""

    def __init__(self):
        self.constants = []

    def launched(self, launch):
        self.constants.append({name: value for name, value in launch.values.items() if name.isupper()})


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("head_dim, itself", [(64, True), (80, True), (12, False)])
def test_accesses_are_16_bytes_wide_where_heads_allow_it(dtype, head_dim, itself):
    wide = 16 // dtype.itemsize if itself or dtype.itemsize >= 4 else 1
    c = case("axial", (2, 3), 1, 6, head_dim, turned=4)
    with observing(Seen()) as seen:
        x = c.make(dtype)["x"].requires_grad_()
        SPEC.fast(x, **c.settings).sum().backward()
    assert [constants["UNIT"] for constants in seen.constants] == [wide, 1]  # a sum's gradient has strides of 0
