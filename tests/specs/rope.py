"""rope for the test bed: tables and what they are made from, in every dtype, on packed and separate heads."""

import dataclasses
import math

import torch

from planecycle_fast.geometry.rope import Augmentation, Rope, make_periods
from planecycle_fast.ops import Axial, Tables, rope, rope_ref
from planecycle_fast.ops.rotary.rope_triton import IN_PLACE, OP, arguments_of

from ..kernelcheck.spec import Case, Spec

POINTERS = [f"{name}{i}" for name in ("sin", "cos", "period") for i in range(3)]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def tables(grid, head_dim, dtype=FP32, dense=False, device="cpu"):
    """Sines and cosines of random angles: a table per axis, sections as unequal as can be, or halves of a dense one."""
    half = head_dim // 2
    if dense:
        shapes = [(math.prod(grid), head_dim)]
    else:
        bounds = [half * i // len(grid) for i in range(len(grid) + 1)]
        shapes = [(n, bounds[i + 1] - bounds[i]) for i, n in enumerate(grid)]
    if device == "meta":
        angles = [torch.empty(shape, device="meta") for shape in shapes]
    else:
        generator = torch.Generator().manual_seed(head_dim)
        angles = [4 * torch.rand(shape, generator=generator) - 2 for shape in shapes]
    return Tables(*[tuple([f(a).to(dtype)[:, :half] for a in angles]) for f in (torch.sin, torch.cos)])


def axial(grid, head_dim, periods=FP32, augmented=False, inverse=False, device="cpu", **settings):
    """The settings of a host that has such periods."""
    made = make_periods(head_dim // 4, 100.0, dtype=FP64, device=device)
    found = Rope((1 / made if inverse else made).to(periods), periods_are_inverse=inverse, **settings)
    values = {"shift": [0.3, -0.2, 0.1][: len(grid)], "jitter": [1.1, 0.8, 1.3][: len(grid)], "rescale": [1.2]}
    drawn = {name: torch.tensor(value, dtype=found.coord_dtype, device=device) for name, value in values.items()}
    return Axial(found, tuple(grid), Augmentation(**drawn) if augmented else None)


KINDS = {
    "dense": lambda grid, hd, **kw: tables(grid, hd, dense=True, **kw),
    "tables": tables,
    "bf16 tables": lambda grid, hd, **kw: tables(grid, hd, BF16, **kw),
    "dense bf16": lambda grid, hd, **kw: tables(grid, hd, BF16, dense=True, **kw),
    "axial": axial,
    "inverse": lambda grid, hd, **kw: axial(grid, hd, inverse=True, **kw),
    "augmented": lambda grid, hd, **kw: axial(grid, hd, augmented=True, **kw),
    "min": lambda grid, hd, **kw: axial(grid, hd, normalize="min", **kw),
    "max": lambda grid, hd, **kw: axial(grid, hd, normalize="max", augmented=True, **kw),
    "bf16": lambda grid, hd, **kw: axial(
        grid, hd, BF16, True, coord_dtype=BF16, promote_coords=False, normalize="max", **kw
    ),
    "bf16 coordinates": lambda grid, hd, **kw: axial(grid, hd, FP32, True, coord_dtype=BF16, **kw),
    "fp16 coordinates, divided": lambda grid, hd, **kw: axial(
        grid, hd, FP32, coord_dtype=FP16, promote_coords=False, **kw
    ),
    "bf16 periods": lambda grid, hd, **kw: axial(grid, hd, BF16, inverse=True, table_dtype=BF16, **kw),
    "fp64 periods": lambda grid, hd, **kw: axial(grid, hd, FP64, table_dtype=FP32, **kw),
}  # fmt: skip


def case(kind, grid, g, heads, head_dim, sequences=2, turned=None, in_table_dtype=False, device="cpu", name=""):
    return Case(
        tensors={"x": (sequences, g + math.prod(grid), heads, head_dim)},
        settings=dict(
            angles=KINDS[kind](grid, head_dim, device=device),
            num_globals=g,
            turned=turned,
            in_table_dtype=in_table_dtype,
        ),
        name=name or f"{kind} {'x'.join(map(str, grid))} g={g} {heads}x{head_dim}",
    )


def placed(angles, x):
    """Angles where x is; for a float64 x in float64 from the beginning."""
    wide = x.dtype == FP64
    if not wide and x.device.type == "cpu":
        return angles

    def move(t):
        return None if t is None else t.to(x.device, FP64 if wide else t.dtype)

    if isinstance(angles, Tables):
        return Tables(*[tuple([move(t) for t in ts]) for ts in angles])
    changed = {"coord_dtype": FP64, "table_dtype": None} if wide else {}
    augmentation = angles.augmentation
    if augmentation is not None:
        augmentation = Augmentation(*[move(getattr(augmentation, f.name)) for f in dataclasses.fields(augmentation)])
    found = dataclasses.replace(angles.rope, periods=move(angles.rope.periods), **changed)
    return Axial(found, angles.grid, augmentation)


def fast(x, angles, backend="triton", **settings):
    return rope(x, placed(angles, x), backend=backend, **settings)


def reference(x, angles, **settings):
    return rope_ref(x, placed(angles, x), **settings)


def op_arguments(tensors, settings, op=OP, in_place=IN_PLACE, arguments_of=arguments_of):
    """The call that `rope` makes, the one of its backward, and the one in place."""
    x = tensors["x"]
    angles, rest = placed(settings["angles"], x), [settings[k] for k in ("num_globals", "turned", "in_table_dtype")]
    arguments = arguments_of(x, angles, *rest)
    grad = x.new_ones(x.shape, requires_grad=x.requires_grad)
    shared = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))
    own = x.detach().clone(memory_format=torch.contiguous_format) if shared else x.detach()
    return [(op, (x, *arguments)), (op, (grad, True, *arguments[1:])), (in_place, (own, *arguments))]


def groups(t, settings):
    g, turned = settings["num_globals"], settings["turned"]
    turned = t.shape[2] if turned is None else turned
    return {"globals": t[:, :g, :turned], "patches": t[:, g:, :turned], "passed heads": t[:, :, turned:]}


def named_cases():
    yield case("axial", (3, 5), 5, 6, 16, turned=4, name="packed")
    yield case("dense", (3, 5), 5, 6, 16, turned=4, name="packed, a dense table")
    yield case("tables", (4, 3), 1, 2, 16, name="separate, tables")
    yield case("axial", (4, 4), 0, 1, 64, sequences=3, name="no globals")
    yield case("axial", (4, 4), 5, 2, 16, name="21 rows")
    yield case("axial", (16, 16), 5, 1, 8, sequences=1, name="261 rows")
    yield case("axial", (2, 3, 4), 5, 3, 16, turned=2, name="three axes")
    yield case("max", (2, 3, 2), 1, 1, 48, name="three axes, by the longest, augmented")
    yield case("inverse", (3, 1, 5), 2, 1, 16, name="three axes, inverse periods")
    yield case("tables", (2, 3, 2), 2, 2, 6, name="three tables of 1 channel")
    yield case("min", (2, 7), 2, 2, 12, name="by the shortest")
    yield case("max", (7, 2), 2, 2, 20, name="by the longest, augmented")
    yield case("augmented", (3, 4), 1, 2, 16, name="augmented")
    yield case("inverse", (3, 4), 1, 2, 16, name="inverse periods")
    yield case("bf16", (5, 3), 1, 2, 16, name="bf16 coordinates and periods")
    yield case("bf16 coordinates", (5, 3), 1, 2, 16, name="bf16 coordinates, promoted")
    yield case("fp16 coordinates, divided", (5, 3), 1, 2, 16, name="fp16 coordinates, promoted by division")
    yield case("bf16 periods", (5, 3), 1, 2, 16, name="bf16 inverse periods and tables")
    yield case("fp64 periods", (5, 3), 1, 2, 16, name="float64 periods")
    yield case("bf16 tables", (5, 3), 1, 2, 16, name="bf16 tables")
    yield case("dense bf16", (5, 3), 2, 3, 16, turned=2, in_table_dtype=True, name="in bf16, globals too")
    yield case("bf16", (5, 3), 2, 2, 16, in_table_dtype=True, name="in bf16 of bf16 coordinates")
    yield case("dense", (5, 3), 1, 2, 16, in_table_dtype=True, name="in the dtype of wider tables")
    yield case("tables", (3,), 1, 2, 2, sequences=40, name="hd 2")
    yield case("tables", (3, 4), 1, 2, 6, name="hd 6")
    yield case("axial", (3, 4), 1, 2, 80, sequences=1, name="hd 80")
    yield case("axial", (3, 4), 1, 1, 128, sequences=1, name="hd 128")
    yield case("tables", (2, 2), 1, 21, 8, turned=13, name="heads of three programs")
    yield case("tables", (2, 2), 1, 3, 8, turned=0, name="no head turns")
    yield case("axial", (1, 1), 1, 2, 16, sequences=9, name="one patch")


def huge_cases():
    def huge(*args, **kwargs):
        return case(*args, device="meta", **kwargs)

    yield huge("axial", (2**15, 2**15), 0, 1, 64, 1, name="2^30 rows, 2^36 elements")
    yield huge("dense", (2**15, 2**14), 5, 3, 64, 1, turned=2, name="a dense table of 2^29 rows")
    yield huge("max", (2**10, 2**10, 2**8), 5, 3, 64, 2, turned=2, name="three axes of 2^28 patches")
    yield huge("tables", (2**9, 2**9, 2**9), 2**26, 2, 14, 4, name="2^28 globals, three tables, odd halves")
    yield huge("axial", (4, 4), 5, 2, 64, 100_000, turned=1, name="100,000 sequences of 21 rows")
    yield huge("tables", (3, 3), 1, 2**24, 14, 20, turned=2**23, name="2^24 heads")


def random_cases():
    from hypothesis import strategies as st

    @st.composite
    def cases(draw):
        kind = draw(st.sampled_from(sorted(KINDS)))
        is_table = "tables" in kind or "dense" in kind
        axes = draw(st.integers(1, 3) if is_table else st.integers(2, 3))
        grid = tuple(draw(st.tuples(*[st.integers(1, 5 if axes < 3 else 3)] * axes)))
        wide = [16, 32, 48] if axes == 3 else [4, 8, 16, 20, 24, 64]
        head_dim = draw(st.sampled_from([2, 6, *wide] if is_table else wide))
        heads = draw(st.sampled_from([1, 2, 3, 6, 9]))
        return case(
            kind, grid, draw(st.sampled_from([0, 1, 2, 5])), heads, head_dim, draw(st.integers(1, 2)),
            draw(st.none() | st.integers(0, heads)), draw(st.booleans()),
        )  # fmt: skip

    return cases()


MODELS = {  # heads, hd, angles
    "axial 6x64": (6, 64, "axial", (14, 14)),
    "axial 32x128": (32, 128, "axial", (14, 14)),
    "dense 20x64": (20, 64, "dense", (14, 14)),
    "tables 16x80": (16, 80, "tables", (14, 14)),
    "bf16 12x64": (12, 64, "bf16", (14, 14)),
    "three axes 12x96": (12, 96, "max", (4, 7, 7)),
}


def codegen_case(model):
    heads, head_dim, kind, grid = MODELS[model]
    return case(kind, grid, 5, 3 * heads, head_dim, 16, turned=2 * heads)


SPEC = Spec(
    op=OP,
    fast=fast,
    reference=reference,
    op_arguments=op_arguments,
    typical=case("max", (2, 3, 2), 2, 6, 16, turned=4, name="typical"),
    plain=[
        case("axial", (4, 4), 4, 4, 16), case("dense", (4, 4), 4, 4, 16), case("tables", (2, 2, 4), 4, 4, 16),
        case("axial", (2, 2, 4), 4, 4, 16),
    ],
    cases=list(named_cases()),
    small=[
        case("augmented", (2, 1), 0, 1, 4, 1, name="augmented"),
        case("tables", (1, 2), 1, 2, 2, 1, turned=1, name="tables"),
        case("dense bf16", (1, 2), 1, 1, 4, 1, in_table_dtype=True, name="in bf16"),
    ],
    empty=[
        case("axial", (2, 3), 2, 3, 16, 0, name="no sequences"),
        case("tables", (2, 3), 2, 0, 16, 2, name="no heads"),
        case("tables", (2, 3), 2, 3, 0, 2, name="no channels"),
    ],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    exact=frozenset({"globals", "passed heads"}),
    factors={"model": list(MODELS)},
    factors_case=codegen_case,
    wide=lambda choice: True,
    exempt=10,  # periods, one access per axis, and shift, jitter and rescale
    others=(IN_PLACE,),
    uncounted=frozenset([*POINTERS, "shift", "jitter", "rescale"]),
    outputs={"rope_kernel": {"out"}},
)  # fmt: skip
