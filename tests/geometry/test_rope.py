"""RoPE tables: the formula, and the tables of the libraries themselves, to the bit."""

import itertools
import math

import pytest
import timm
import torch
import transformers as tr

from planecycle_fast.geometry.planes import HW
from planecycle_fast.geometry.rope import Augmentation, PlaneTables, Rope, coordinates, make_periods, section_sizes
from planecycle_fast.hosts import find_adapter
from planecycle_fast.ops import Axial, Tables, rope, rope_ref

from .. import naive
from ..host_models import BY_NAME

pytestmark = pytest.mark.usefixtures("on_reference")

GRIDS = [(3, 5), (1, 7), (6, 1), (4, 4)]


@pytest.mark.parametrize("normalize", ["separate", "min", "max"])
@pytest.mark.parametrize("plane, sizes", [("HW", (2, 3, 5)), ("DW", (7, 1, 2)), ("DH", (4, 4, 1)), ("DHW", (2, 3, 5))])
def test_tables_follow_the_formula(plane, sizes, normalize):
    periods = make_periods(8, 100.0, dtype=torch.float64)
    rope = Rope(periods, normalize=normalize, coord_dtype=torch.float64)
    grid = [sizes[a] for a in naive.ROPE_AXES[plane]]
    for got, expected in zip(rope.sincos(grid), naive.make_rope(32, normalize)(plane, sizes)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_angles_are_the_separable_form_of_the_dense_tables():
    rope = Rope(make_periods(4, 100.0))
    first, second = rope.angles((3, 5))
    assert (first.shape, second.shape) == ((3, 4), (5, 4))
    sin, _ = rope.sincos((3, 5))
    dense = torch.cat([first[:, None].expand(3, 5, 4), second.expand(3, 5, 4)], -1).sin()
    assert torch.equal(sin, dense.flatten(0, 1).repeat(1, 2))


def test_tables_are_kept_until_periods_change():
    rope = Rope(make_periods(8, 100.0))
    kept = rope.axis_tables((2, 3))
    assert rope.axis_tables((2, 3)) is kept and rope.axis_tables((3, 2)) is not kept
    assert Rope(rope.periods, normalize="max").axis_tables((2, 3)) is not kept
    with torch.inference_mode():
        assert rope.axis_tables((2, 3)) is kept
        assert not rope.axis_tables((4, 4)).sin[0].is_inference()  # gradients may need them
    rope.periods.mul_(2)
    changed = rope.axis_tables((2, 3))
    assert torch.equal(changed.sin[0], (rope.angles((2, 3))[0]).sin()) and not torch.equal(changed.sin[0], kept.sin[0])
    rope.periods.data = rope.periods * 2
    assert not torch.equal(rope.axis_tables((2, 3)).sin[0], changed.sin[0])
    augmented = Augmentation(shift=torch.ones(2))
    assert rope.axis_tables((2, 3), augmented) is not rope.axis_tables((2, 3), augmented)


def test_sections_and_periods():
    assert section_sizes(64, 2) == (16, 16)
    assert section_sizes(64, 3) == (8, 12, 12)
    assert section_sizes(128, 3) == (16, 24, 24)
    expected = [100.0 ** (j / 12) for j in range(12)]
    torch.testing.assert_close(make_periods(12, 100.0), torch.tensor(expected))
    between = make_periods(5, min_period=0.5, max_period=8.0)
    torch.testing.assert_close(between, torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]))
    three = Rope(make_periods(16, 100.0)).axis_periods(3)
    assert [len(p) for p in three] == [8, 12, 12]
    assert all(p[0] == 1 for p in three)  # each with its own full range
    ranged = Rope(make_periods(16, min_period=2.0, max_period=8.0), base=None, min_period=2.0, max_period=8.0)
    assert all(p[0] == 2 and math.isclose(p[-1], 8, rel_tol=1e-6) for p in ranged.axis_periods(3))


@pytest.mark.parametrize("grid", GRIDS)
def test_hugging_face_tables_to_the_bit(grid):
    model = BY_NAME["hf-dinov3"].make()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        image = torch.zeros(1, 3, grid[0] * 16, grid[1] * 16, dtype=dtype)
        cos, sin = model.rope_embeddings(image)
        got = find_adapter(model)(model).rope(image.dtype).sincos(grid)
        assert torch.equal(got[0], sin) and torch.equal(got[1], cos), dtype


@pytest.mark.parametrize("grid", GRIDS)
def test_timm_tables_to_the_bit(grid):
    model = BY_NAME["timm-dinov3-s"].make()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        expected = model.rope.get_embed(shape=grid)
        got = torch.cat(find_adapter(model)(model).rope(dtype).sincos(grid), -1)
        assert got.dtype == expected.dtype == model.rope.periods.dtype  # cast with the model up to timm 1.0.30
        assert torch.equal(got, expected), dtype


AUGMENTS = [{"shift": 0.4}, {"jitter": 1.5}, {"rescale": 2.0}, {"shift": 0.4, "jitter": 1.5, "rescale": 2.0}]


@pytest.mark.parametrize("augments", AUGMENTS, ids=lambda a: "+".join(a))
def test_hugging_face_draws(augments):
    settings = {"pos_embed_rescale": None} | {f"pos_embed_{k}": v for k, v in augments.items()}
    model = BY_NAME["hf-dinov3"].make(**settings).train()
    image = torch.zeros(1, 3, 48, 80)
    torch.manual_seed(3)
    cos, sin = model.rope_embeddings(image)
    torch.manual_seed(3)
    tables = PlaneTables(find_adapter(model)(model).rope(image.dtype), training=True)
    got = tables.for_block(HW, (1, 3, 5)).sincos()
    assert torch.equal(got[0], sin) and torch.equal(got[1], cos)
    assert tables.for_block(HW, (1, 3, 5)).sincos() is got  # one draw serves the whole forward


@pytest.mark.parametrize("augments", AUGMENTS, ids=lambda a: "+".join(a))
def test_timm_draws(augments):
    rope = timm.layers.RotaryEmbeddingDinoV3(32, **{f"{k}_coords": v for k, v in augments.items()}).train()
    torch.manual_seed(3)
    expected = rope.get_embed(shape=(3, 5))
    torch.manual_seed(3)
    ours = Rope(rope.periods, draw_device=torch.device("cpu"), **augments)
    assert torch.equal(torch.cat(PlaneTables(ours, training=True).for_block(HW, (1, 3, 5)).sincos(), -1), expected)


def test_draws_per_block_differ_and_eval_draws_nothing():
    rope = Rope(make_periods(4, 100.0), shift=0.5, draw_per_block=True)
    tables = PlaneTables(rope, training=True)
    assert not torch.equal(tables.for_block(HW, (1, 3, 5)).sincos()[0], tables.for_block(HW, (1, 3, 5)).sincos()[0])
    state = torch.get_rng_state()
    assert torch.equal(PlaneTables(rope, training=False).for_block(HW, (1, 3, 5)).sincos()[0], rope.sincos((3, 5))[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_of_three_axes():
    rope = Rope(make_periods(16, 100.0), shift=0.5, jitter=2.0, rescale=1.5)
    draw = rope.draw(3)
    assert (draw.shift.shape, draw.jitter.shape, draw.rescale.shape) == ((3,), (3,), (1,))
    coords = coordinates((2, 3, 4))
    moved = draw.apply(coords)
    for axis in range(3):
        expected = (coords[axis] + draw.shift[axis]) * draw.jitter[axis] * draw.rescale
        torch.testing.assert_close(moved[axis], expected)
    assert Augmentation().apply(coords)[1] is coords[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: coordinates((2, 3), "mean"), "normalize must be one of separate, min, max, got 'mean'"),
        (lambda: section_sizes(24, 3), "head_dim must be a multiple of 16 for 3D RoPE, got 24"),
        (lambda: section_sizes(6, 2), "head_dim must be a multiple of 4 for 2D RoPE, got 6"),
        (lambda: section_sizes(64, 4), "num_axes must be 2 or 3, got 4"),
        (lambda: make_periods(4), "give either base, or min_period and max_period, got base=None"),
        (lambda: make_periods(4, 100.0, 1.0, 2.0), "give either base, or min_period and max_period"),
        (lambda: make_periods(4, min_period=1.0), "give either base, or min_period and max_period"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bfloat16_hugging_face_model_keeps_its_cast_frequencies():
    model = BY_NAME["hf-dinov3"].make().bfloat16()
    assert isinstance(model, tr.DINOv3ViTModel)
    assert find_adapter(model)(model).rope(torch.bfloat16).periods.dtype == torch.bfloat16


def op_case(grid, g=2, heads=3, head_dim=16, dtype=torch.float64, n=2):
    """x (N, g + L, heads, hd), and tables of sines and cosines per axis."""
    periods = make_periods(head_dim // 4, 100.0, dtype=torch.float64)
    angles = (
        Rope(periods, coord_dtype=torch.float64).angles(grid) if len(grid) > 1 else [torch.randn(grid[0], 8).double()]
    )
    x = torch.randn(n, g + math.prod(grid), heads, head_dim, dtype=dtype)
    return x, Tables(tuple([a.sin() for a in angles]), tuple([a.cos() for a in angles]))


def cast(tables, dtype):
    return Tables(*[tuple([t.to(dtype) for t in ts]) for ts in tables])


@pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 3, 2)], ids=str)
def test_op_turns_pairs_of_channels(grid):
    """Channels j and j + hd/2 of a patch are one complex number, turned by its angle; globals stay."""
    x, tables = op_case(grid)
    got = rope(x, tables, 2)
    turned = torch.view_as_complex(torch.stack(x.tensor_split(2, -1), -1))
    for place in itertools.product(*map(range, grid)):
        row = 2 + sum(i * math.prod(grid[axis + 1 :]) for axis, i in enumerate(place))
        phase = torch.cat([torch.complex(c[i], s[i]) for i, s, c in zip(place, *tables)])
        turned[:, row] *= phase
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert torch.equal(got[:, :2], x[:, :2]) and torch.equal(rope_ref(x, tables, 2), got)


def test_op_on_dense_tables_of_a_host():
    x, tables = op_case((3, 4), head_dim=16)
    dense = Rope(make_periods(4, 100.0, dtype=torch.float64), coord_dtype=torch.float64).sincos((3, 4))
    halves = Tables(*[(t[:, :8],) for t in dense])
    torch.testing.assert_close(rope(x, halves, 2), rope(x, tables, 2), rtol=0, atol=1e-14)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("grid", [(3, 5), (16, 16), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("coord", DTYPES, ids=str)
@pytest.mark.parametrize("period", DTYPES, ids=str)
def test_op_makes_the_tables_of_rope(grid, coord, period):
    """`Axial` gives what the dense tables of `Rope.sincos` give, to the bit, of whatever settings."""
    x = torch.randn(1, 2 + math.prod(grid), 1, 32)
    ways = itertools.product(("separate", "min", "max"), (False, True), (False, True), (None, torch.bfloat16))
    for normalize, inverse, promote, table in ways:
        made = Rope(
            make_periods(8, 100.0).to(period), inverse, normalize=normalize, coord_dtype=coord,
            promote_coords=promote, table_dtype=table, shift=0.3, jitter=1.5, rescale=1.2,
        )  # fmt: skip
        for drawn in (None, made.draw(len(grid))):
            dense = Tables(*[(t[:, :16],) for t in made.sincos(grid, drawn)])
            for in_table_dtype in (False, True):
                got = rope(x, Axial(made, grid, drawn), 2, in_table_dtype=in_table_dtype)
                assert torch.equal(got, rope(x, dense, 2, in_table_dtype=in_table_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_table_dtype", [False, True])
def test_op_in_place_is_the_same_to_the_bit(dtype, table, in_table_dtype):
    """On the queries and keys of a packed qkv, whose values stay."""
    x, tables = op_case((3, 4), heads=6, dtype=dtype)
    tables = cast(tables, table)
    expected = rope(x[:, :, :4], tables, 2, in_table_dtype=in_table_dtype)
    before = x.clone()
    part = x[:, :, :4]
    assert rope(part, tables, 2, inplace=True, in_table_dtype=in_table_dtype) is part
    assert torch.equal(part, expected) and expected.dtype == dtype
    assert torch.equal(x[:, :, 4:], before[:, :, 4:])
    narrow = in_table_dtype and torch.finfo(table).eps > torch.finfo(dtype).eps
    globals_ = before[:, :2, :4]
    assert torch.equal(part[:, :2], globals_.to(table).to(dtype) if narrow else globals_)


@pytest.mark.parametrize("turned", [0, 4, 6, None])
@pytest.mark.parametrize("in_table_dtype", [False, True])
def test_op_passes_other_heads_on(turned, in_table_dtype):
    x, tables = op_case((3, 4), heads=6, dtype=torch.float32)
    settings = dict(num_globals=2, in_table_dtype=in_table_dtype)
    tables = cast(tables, torch.bfloat16)
    expected = torch.cat([rope(x[:, :, :turned], tables, **settings), x[:, :, 6 if turned is None else turned :]], 2)
    got = rope(x, tables, turned=turned, **settings)
    assert torch.equal(got, expected) and got.is_contiguous()
    assert rope(x, tables, turned=turned, inplace=True, **settings) is x
    assert torch.equal(x, expected)


def test_op_as_the_hosts_turn():
    """Bit for bit what facebookresearch's formula gives, in float32 and in bfloat16 with float32 tables."""
    for dtype in (torch.float32, torch.bfloat16):
        x, tables = op_case((3, 4), dtype=dtype)
        tables = cast(tables, torch.float32)
        dense = [torch.cat([a[:, None].expand(3, 4, 4), b.expand(3, 4, 4)], -1).flatten(0, 1).repeat(1, 2)[:, None]
                 for a, b in tables]  # fmt: skip
        patches = x[:, 2:].float()
        a, b = patches.tensor_split(2, -1)
        expected = (patches * dense[1] + torch.cat([-b, a], -1) * dense[0]).to(dtype)
        assert torch.equal(rope(x, tables, 2)[:, 2:], expected)


def test_op_backward_turns_back():
    x, (sin, cos) = op_case((3, 4))
    x.requires_grad_()
    grad = torch.randn_like(x)
    (got,) = torch.autograd.grad(rope(x, Tables(sin, cos), 2), x, grad)
    back = Tables(tuple(-s for s in sin), cos)
    torch.testing.assert_close(got, rope(grad, back, 2), rtol=0, atol=1e-14)
    small, (sin, cos) = op_case((2, 2), heads=1, head_dim=16, n=1)
    call = lambda x, s, c: rope(x, Tables((s, sin[1]), (c, cos[1])), 2)  # noqa: E731
    leaves = [t.requires_grad_() for t in (small, sin[0], cos[0])]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


ZEROS = Tables(*[(torch.zeros(3, 4), torch.zeros(4, 4))] * 2)
PERIODS = Rope(torch.ones(4))


def tables(**change):
    return {"angles": ZEROS._replace(**change)}


def axial(made=PERIODS, grid=(3, 4), **drawn):
    return {"angles": Axial(made, grid, Augmentation(**drawn))}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 14, 3, 16).int()}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ({"x": torch.zeros(2, 14, 48)}, ValueError, r"x must have shape \(N, g \+ L, heads, hd\) .* got \(2, 14, 48\)"),
        ({"x": torch.zeros(2, 14, 3, 15)}, ValueError, r"with an even hd, got \(2, 14, 3, 15\)"),
        ({"x": torch.zeros(2, 15, 3, 16)}, ValueError, r"multiply to L = 13 .* got \[\(3, 4\), \(4, 4\)\]"),
        ({"x": torch.zeros(2, 14, 3, 8)}, ValueError, r"add up to hd/2 = 4, got"),
        ({"num_globals": -1}, ValueError, "num_globals must be from 0 to less than the 14 rows of x, got -1"),
        ({"num_globals": 14}, ValueError, "num_globals must be from 0 to less than the 14 rows of x, got 14"),
        ({"turned": 4}, ValueError, "turned must be from 0 to the 3 heads of x, or None, got 4"),
        ({"turned": -1}, ValueError, "turned must be from 0 to the 3 heads of x, or None, got -1"),
        ({"angles": (ZEROS.sin, ZEROS.cos)}, TypeError, "angles must be ops.Tables or ops.Axial, got tuple"),
        (tables(sin=torch.zeros(12, 8)), ValueError, r"sin must be a sequence of one to three tables, got \(12, 8\)"),
        (tables(cos=()), ValueError, r"cos must be a sequence of one to three tables, got \[\]"),
        (tables(cos=(torch.zeros(12, 8),)), ValueError, r"cos must have the shapes of sin, .*, got \[\(12, 8\)\]"),
        (tables(cos=(torch.zeros(3, 4), None)), TypeError, r"cos\[1\] must be a floating-point tensor, got NoneType"),
        (tables(sin=(torch.zeros(3), torch.zeros(4, 4))), ValueError, r"sin\[0\] must have shape \(n, s\), got \(3,\)"),
        (tables(sin=(ZEROS.sin[0].half(), ZEROS.sin[1])), ValueError, r"sin\[1\] must have the dtype of sin\[0\]"),
        (tables(cos=(ZEROS.sin[0].to("meta"), ZEROS.sin[1])), ValueError, r"cos\[0\] must be on the device of x, cpu"),
        (axial(made=None), TypeError, "angles.rope must be a planecycle_fast.geometry.rope.Rope, got NoneType"),
        (axial(Rope(torch.ones(4).int())), TypeError, "angles.rope.periods must be a floating-point tensor, got"),
        (axial(Rope(torch.ones(5))), ValueError, r"periods must have shape \(hd/4,\) for hd = 16, got \(5,\)"),
        (axial(Rope(torch.ones(4), normalize="mean")), ValueError, "normalize must be one of .* got 'mean'"),
        (axial(grid=(12,)), ValueError, r"angles.grid must have two or three sizes .* L = 12, got \(12,\)"),
        (axial(grid=(2, 5)), ValueError, r"that multiply to L = 12, got \(2, 5\)"),
        (axial(shift=torch.ones(3)), ValueError, r"shift must have shape \(2,\) and dtype torch.float32, got \(3,\)"),
        (
            axial(rescale=torch.ones(1).half()),
            ValueError,
            r"rescale must have .* got \(1,\), torch.float16",
        ),
        (axial(jitter=torch.ones(2).int()), TypeError, "augmentation.jitter must be a floating-point tensor, got"),
        ({"angles": Axial(PERIODS, (3, 4), {})}, TypeError, "angles.augmentation must be a rope.Augmentation or None"),
        ({"x": torch.zeros(2, 14, 3, 16).requires_grad_(), "inplace": True}, ValueError, "inplace must be False"),
        ({"x": torch.zeros(1, 14, 3, 16).expand(2, -1, -1, -1), "inplace": True}, ValueError, "elements share memory"),
        ({"backend": "triton"}, ValueError, "backend 'triton' is not usable"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_op_bad_input(change, error, message):
    arguments = {"x": torch.zeros(2, 14, 3, 16), "angles": ZEROS, "num_globals": 2} | change
    with pytest.raises(error, match=message):
        rope(**arguments)
