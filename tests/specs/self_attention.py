"""self_attention for the test bed: rows at the edges of its three kernels, packed and apart, turned on load or not."""

import math
from dataclasses import replace

import torch

from planecycle_fast.ops.multihead_attention.self_attention import in_steps, self_attention_on
from planecycle_fast.ops.multihead_attention.self_attention_autograd import arguments_of
from planecycle_fast.ops.multihead_attention.self_attention_backward_triton import BACKWARD
from planecycle_fast.ops.multihead_attention.self_attention_load import turned_on_load
from planecycle_fast.ops.multihead_attention.self_attention_triton import OP

from ..kernelcheck.spec import Case, Spec
from .rope import KINDS, placed

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TABLES = [f"{name}{i}" for name in ("sin", "cos") for i in range(3)]


def case(
    grid, g, heads=2, head_dim=16, sequences=1, load="qk", kind="tables", packed=True, scale=None, narrow=False,
    device="cpu", name="", **others,
):  # fmt: skip
    """Of `grid` patches after g globals; nothing turns where `load` is empty."""
    rows = g + math.prod(grid)
    shape = (sequences, rows, heads, head_dim)
    tensors = {"q": (sequences, rows, 3 * heads, head_dim)} if packed else dict.fromkeys("qkv", shape)
    angles = KINDS[kind](grid, head_dim, device=device) if load else None
    settings = dict(angles=angles, num_globals=g, scale=scale, in_table_dtype=narrow, load=load, packed=packed)
    name = name or f"{rows} rows, {heads}x{head_dim}{' packed' if packed else ''} load {load or 'nothing'}"
    return Case(tensors, settings, name, **others)


def fast(q, k=None, v=None, *, angles, packed, **settings):
    return self_attention_on("triton", q, k, v, angles and placed(angles, q), **settings)


def reference(q, k=None, v=None, *, angles, packed, num_globals, scale, in_table_dtype, load):
    angles = angles and placed(angles, q)
    return in_steps("reference", "reference", q, k, v, angles, num_globals, scale, in_table_dtype, load)


def op_arguments(tensors, settings):
    """The calls of forward, for inference and for training, and of backward; what none turns has turned before."""
    settings = {name: value for name, value in settings.items() if name != "packed"}
    angles = settings.pop("angles")
    angles = angles and placed(angles, tensors["q"])
    held = [tensors["q"], tensors.get("k"), tensors.get("v")]
    *arguments, precision = arguments_of("triton", *held, angles, **settings)
    q, k, v, scale, g, grid, sin, cos, load, narrow, _ = arguments
    n, rows, heads, head_dim = q.shape
    heads = heads // 3 if k is None else heads
    out = q.new_ones((n, rows, heads, head_dim)).detach()
    lse = out.new_ones((n, heads, rows), dtype=torch.promote_types(out.dtype, FP32))
    fixed = [t if t is None else t.detach() for t in (q, k, v)]

    def on_load(training):
        within = turned_on_load(rows, head_dim, q.dtype, training)
        return "".join(name for name in load if name in within)

    turns, trained = (scale, g, grid, sin, cos), on_load(True)
    return [
        (OP, (q, k, v, *turns, trained, narrow, True, precision)),
        (BACKWARD, (out, *fixed, out, lse, *turns, trained, trained, narrow, precision)),
        (OP, (*fixed, *turns, on_load(False), narrow, False, precision)),
    ]


def groups(t, settings):
    """Of a packed tensor q, k and v, whose gradients are of different sizes."""
    return {f"part {i}": part for i, part in enumerate(t.tensor_split(3, 2) if settings["packed"] else [t])}


def named_cases():
    yield case((1,), 0, name="1 row")
    yield case((1,), 1, packed=False, name="2 rows")
    yield case((5, 3), 0, heads=3, name="15 rows of three heads")
    yield case((5, 3), 1, packed=False, load="q", name="16 rows, keys turned before")
    yield case((4, 4), 1, load="", name="17 rows, nothing turns")
    yield case((4, 4), 5, sequences=2, head_dim=64, heads=3, name="21 rows")
    yield case((2, 3, 5), 1, head_dim=24, name="31 rows, three axes")
    yield case((31,), 1, packed=False, kind="dense", head_dim=8, name="32 rows, a dense table")
    yield case((8, 4), 1, heads=1, head_dim=40, name="33 rows")
    yield case((29, 2), 5, heads=1, packed=False, name="63 rows")
    yield case((8, 8), 0, heads=1, load="q", name="64 rows")
    yield case((2, 4, 8), 1, heads=2, head_dim=16, sequences=2, only=BF16, name="65 rows, three axes")
    yield case((2, 4, 8), 1, heads=1, head_dim=16, only=FP32, name="65 rows, three axes, many tiles")
    yield case((8, 16), 0, heads=1, head_dim=8, only=BF16, name="128 rows, whole tiles")
    yield case((8, 8), 5, heads=1, head_dim=8, load="", only=FP16, name="69 rows, nothing turns")
    yield case((4, 4), 5, heads=1, scale=0.7, narrow=True, kind="bf16 tables", name="in bf16, of another scale")
    yield case((11, 6), 1, heads=1, head_dim=40, only=FP32, name="67 rows, too wide to hold all keys")


def long_cases():
    """Rows whose kernels take the interpreter seconds.

    All elements of a row of gradients share the errors of its weights: there are as many errors as rows.
    """
    yield case((17, 15), 0, heads=1, head_dim=8, name="255 rows", draws=4)
    yield case((16, 16), 0, heads=1, head_dim=8, packed=False, load="q", name="256 rows", draws=4)
    yield case((4, 8, 8), 1, heads=1, head_dim=64, name="257 rows, three axes", draws=4)
    yield case((16, 16), 5, heads=1, head_dim=24, name="261 rows", draws=4)
    yield case((267,), 5, heads=1, head_dim=8, kind="dense", name="272 rows", draws=4)
    yield case((15, 20), 0, heads=1, head_dim=8, load="", name="300 rows", draws=4)
    yield case((16, 32), 5, heads=1, head_dim=8, load="q", name="517 rows", draws=4)
    yield case((32, 32), 5, heads=1, head_dim=8, load="", packed=False, name="1029 rows", draws=4)
    yield case((4, 4), 5, heads=1, head_dim=128, name="21 rows of 128 channels", draws=4)
    yield case((9, 8), 1, heads=1, head_dim=88, name="73 rows of 88 channels", draws=4)


def huge_cases():
    def huge(*args, **kwargs):
        return case(*args, device="meta", **kwargs)

    yield huge((4, 4), 5, 16, 64, 100_000, name="100,000 sequences of 21 rows")
    yield huge((8, 8), 5, 64, 8, 2**17, packed=False, kind="dense", name="2^17 sequences of 69 rows")
    yield huge((2**13, 2**13), 2**10, 2, 40, 2, load="q", name="2^26 rows")
    yield huge((8, 9), 0, 2**26, 40, 1, load="", name="2^26 heads")


def with_symbols(case):
    """All has turned before: how much turns on load depends on rows."""
    return replace(case, settings=case.settings | {"angles": None, "load": ""})


def random_cases():
    from hypothesis import strategies as st

    @st.composite
    def cases(draw):
        grid = tuple(draw(st.sampled_from([(2,), (3,), (11,), (1, 2), (3, 5), (4, 4), (7, 2), (2, 3, 2), (4, 4, 2)])))
        g, packed = draw(st.sampled_from([0, 1, 2, 5])), draw(st.booleans())
        return case(
            grid, g, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([8, 16, 24, 40])), draw(st.integers(1, 2)),
            draw(st.sampled_from(["", "q", "qk"])), draw(st.sampled_from(["tables", "dense", "bf16 tables"])), packed,
            draw(st.none() | st.just(0.3)),
        )  # fmt: skip

    return cases()


MODELS = {  # grid, hd, what turns: every kernel with turning and without, heads of 64, 80, 96 and 128 channels
    "21 rows of 64": ((4, 4), 64, "qk"),
    "21 rows of 128": ((4, 4), 128, "qk"),
    "37 rows of 128": ((4, 8), 128, "qk"),
    "261 rows of 64": ((16, 16), 64, "qk"),
    "1029 rows of 64, keys turned": ((32, 32), 64, "q"),
    "1029 rows of 80": ((32, 32), 80, ""),
    "261 rows of 96": ((4, 8, 8), 96, "qk"),
    "1029 rows of 128, keys turned": ((32, 32), 128, "q"),
}


def codegen_case(model):
    grid, head_dim, load = MODELS[model]
    return case(grid, 5, 6, head_dim, 8, load)


SPEC = Spec(
    op=OP,
    fast=fast,
    reference=reference,
    op_arguments=op_arguments,
    typical=case((3, 4), 2, 2, 16, 2, name="typical"),
    plain=[case((4, 4), 4, 4, 16, 2), case((8, 8), 1, 2, 16, 1, packed=False), case((8, 8), 8, 1, 16, 1, load="q")],
    cases=list(named_cases()),
    small=[
        case((2, 1), 1, 1, 8, name="tables"),
        case((2,), 0, 1, 8, load="q", packed=False, name="keys turned before"),
    ],
    empty=[
        case((2, 3), 2, 3, 16, 0, name="no sequences"),
        case((2, 3), 2, 0, 16, 2, packed=False, name="no heads"),
    ],
    huge=list(huge_cases()),
    strategy=random_cases,
    with_symbols=with_symbols,
    groups=groups,
    forward_mode=False,
    cancels=True,
    twice=False,
    factors={"model": list(MODELS)},
    factors_case=codegen_case,
    wide=lambda choice: True,
    slow_builds=True,
    exempt=24,  # tables of an odd number of channels, logarithms of sums, delta
    any_strides=False,
    any_alignment=False,
    every_dtype=False,
    others=(BACKWARD,),
    uncounted=frozenset([*TABLES, "lse", "delta"]),
    once=frozenset(["q", "k", "v", "grad"]),
    outputs={
        "self_attention_tile_kernel": {"out", "lse"},
        "self_attention_short_kernel": {"out", "lse"},
        "self_attention_kernel": {"out", "lse"},
        "self_attention_tile_backward_kernel": {"grad_q", "grad_k", "grad_v"},
        "self_attention_queries_backward_kernel": {"grad_q", "delta"},
        "self_attention_keys_backward_kernel": {"grad_q", "grad_k", "grad_v"},
    },
)
