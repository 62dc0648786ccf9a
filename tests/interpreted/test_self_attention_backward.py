"""The backward kernels of self_attention against autograd of its reference, at the edges of their tiles.

Most of it is for `make test-full`: `test_self_attention.py` has gradients through the public function, but for what
came turned before.
"""

import math
from contextlib import nullcontext

import pytest
import torch

from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.ops import Tables
from planecycle_fast.ops.multihead_attention.self_attention import self_attention_ref
from planecycle_fast.ops.multihead_attention.self_attention_backward_triton import BACKWARD
from planecycle_fast.ops.multihead_attention.self_attention_load import turned_on_load
from planecycle_fast.ops.multihead_attention.self_attention_triton import OP
from planecycle_fast.ops.rotary.angles import rope_ref

from ..kernelcheck.budget import check_all, check_bits, reference_errors
from ..kernelcheck.executor import typed_by_inductor
from ..kernelcheck.interpreter import poisoned
from ..kernelcheck.overflow import probing
from ..kernelcheck.recorder import recording
from ..specs.rope import tables
from ..specs.self_attention import SPEC

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
UNCOUNTED = frozenset(["lse", "delta", *[f"{name}{i}" for name in ("sin", "cos") for i in range(3)]])
DEAR = pytest.mark.full  # seconds
HEADS = 3  # a program of two, and one of one


def on_load(load, q):
    """Those that kernels turn on load."""
    within = turned_on_load(q.shape[1], q.shape[3], q.dtype, training=True)
    return "".join([name for name in load if name in within])


class Case:
    """Packed qkv, gradient of the context, angles, and what forward would have kept."""

    def __init__(self, grid, g, head_dim=16, dtype=FP32, seed=0, dense=False, sequences=1, table=FP32, scale=None):
        generator = torch.Generator().manual_seed(seed)
        self.grid, self.g = ([math.prod(grid)] if dense else list(grid)), g
        self.scale = head_dim**-0.5 if scale is None else scale
        rows = g + math.prod(grid)
        made = tables(grid, head_dim, table if dtype != FP64 else FP64, dense)
        self.angles = Tables(*[tuple([t.contiguous() for t in ts]) for ts in made])
        made = [torch.randn(sequences, rows, n * HEADS, head_dim, generator=generator, dtype=FP64) for n in (3, 1)]
        self.qkv, self.grad = [t.to(dtype) for t in made]

    def turned(self, t, narrow=False):
        return rope_ref(t, self.angles, self.g, in_table_dtype=narrow)

    def by_autograd(self, wide=False, narrow=False):
        """Gradients of q, k and v by torch, in float64 or in their dtype."""
        qkv, angles = self.qkv.double() if wide else self.qkv, self.angles
        if wide:
            angles = Tables(*[[t.double() for t in ts] for ts in angles])
        qkv = qkv.requires_grad_()
        out = self_attention_ref(qkv, None, None, angles, self.g, self.scale, narrow)
        [found] = torch.autograd.grad(out, qkv, self.grad.to(qkv.dtype))
        self.qkv.requires_grad_(False)
        return dict(zip(("dq", "dk", "dv"), found.split(HEADS, 2)))

    def arguments(self, load="qk", back="qk", packed=True, precision="tf32x3", narrow=False):
        """Of the operation; what is not turned on load has been turned before."""
        q, k, v = self.qkv.split(HEADS, 2)
        load = on_load(load, q)
        turned = [self.turned(t, narrow) for t in (q, k)]
        out, lse = OP(*turned, v, self.scale, 0, [], [], [], "", False, True, precision)  # rounded as kernels round it
        q, k = [t if name in load else before for name, t, before in zip("qk", (q, k), turned)]
        held = (torch.cat([q, k, v], 2), None, None) if packed else [t.contiguous() for t in (q, k, v)]
        turns = (self.g, self.grid, *[list(ts) for ts in self.angles], load, back, narrow)
        return self.grad, *held, out, lse, self.scale, *turns, precision

    def by_kernels(self, **settings):
        with poisoned():
            found = BACKWARD(*self.arguments(**settings))
        found = found[0].split(HEADS, 2) if settings.get("packed", True) else found
        return dict(zip(("dq", "dk", "dv"), found))


def within_budget(dtype, grid, g, narrow=False, **settings):
    def compute(seed):
        made = Case(grid, g, dtype=dtype, seed=seed, **settings)
        return made.by_autograd(narrow=narrow), made.by_autograd(wide=True)

    exact, largest = reference_errors(compute, 4)
    check_all(Case(grid, g, dtype=dtype, **settings).by_kernels(narrow=narrow), exact, largest)


def close(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name, t in got.items():
        torch.testing.assert_close(t, expected[name], rtol=tolerance, atol=tolerance, msg=name)


SIZES = [  # rows: grid, globals
    ((1,), 0), ((1,), 1), ((5, 3), 0), ((3, 5), 1), ((4, 3), 5), ((4, 4), 5), ((2, 3, 5), 1), ((2, 13), 5), ((8, 4), 1),
    ((9, 7), 0), ((7, 9), 1), ((2, 6, 5), 5),
]  # fmt: skip
LONG = [((10, 25), 5), ((16, 16), 0), ((16, 16), 1), ((16, 16), 5), ((4, 8, 8), 1), ((267,), 5), ((15, 20), 0),
        ((2, 16, 16), 5)]  # fmt: skip
ALL = [*SIZES, *LONG]


@pytest.mark.parametrize(
    "grid, g", [pytest.param(*size, marks=[] if i in (0, 6) else DEAR) for i, size in enumerate(ALL)], ids=str
)
def test_float64(grid, g):
    made = Case(grid, g, dtype=FP64)
    close(made.by_kernels(), made.by_autograd(wide=True))


@DEAR
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("grid, g", ALL, ids=str)
def test_error_budget(grid, g, dtype):
    within_budget(dtype, grid, g)


HEAD_DIMS = [(80, FP16), (24, FP64), (8, FP32), (128, BF16), (96, FP32), (64, FP16), (40, BF16), (88, FP64), (72, FP16)]


@DEAR
@pytest.mark.parametrize("head_dim, dtype", HEAD_DIMS)
@pytest.mark.parametrize("grid, g", [((2, 3), 1), ((11, 6), 1)], ids=str)
def test_head_dims(head_dim, dtype, grid, g):
    if dtype == FP64:
        made = Case(grid, g, head_dim, FP64, scale=0.3)
        close(made.by_kernels(), made.by_autograd(wide=True))
    else:
        within_budget(dtype, grid, g, head_dim=head_dim)


@DEAR
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_other_products_of_float32(precision):
    made = Case((11, 6), 1)
    close(made.by_kernels(precision=precision), made.by_kernels(), 1e-5)


@DEAR
@pytest.mark.parametrize("grid, g", [((3, 4), 2), ((6, 11), 2)], ids=str)
@pytest.mark.parametrize("settings", [{"dense": True}, {"table": BF16}, {"table": BF16, "narrow": True}], ids=str)
def test_tables(grid, g, settings):
    within_budget(BF16 if settings.get("narrow") else FP32, grid, g, **settings)


@pytest.mark.parametrize("grid, g", [((2, 5), 2), pytest.param((5, 13), 2, marks=DEAR)], ids=str)
@pytest.mark.parametrize("load, back, packed", [("", "", False), ("", "qk", True), ("q", "q", False), ("q", "qk", True),
                                                ("qk", "", True), ("qk", "qk", False)])  # fmt: skip
def test_what_is_turned(grid, g, load, back, packed):
    """Gradients of what came turned are turned back if told so, and else are those of what came."""
    made = Case(grid, g, dtype=FP64, sequences=2 if packed else 1)
    q, k, v = made.qkv.split(HEADS, 2)
    q, k = [made.turned(t).requires_grad_() for t in (q, k)]
    of_turned = torch.autograd.grad(self_attention_ref(q, k, v), (q, k), made.grad)
    expected = made.by_autograd(wide=True)
    expected |= {f"d{name}": t for name, t in zip("qk", of_turned) if name not in back}
    close(made.by_kernels(load=load, back=back, packed=packed), expected)


def test_nothing_turns():
    made = Case((3, 4), 0, dtype=FP64)
    made.angles, made.grid = Tables([], []), []
    made.turned = lambda t, narrow=False: t
    qkv = made.qkv.requires_grad_()
    [expected] = torch.autograd.grad(self_attention_ref(qkv), qkv, made.grad)
    qkv.requires_grad_(False)
    close(made.by_kernels(load="", back=""), dict(zip(("dq", "dk", "dv"), expected.split(HEADS, 2))))


def spread(t):  # rows, heads and sequences apart, channels dense; an odd address
    larger = t.new_full([n + 3 for n in t.shape], float("nan"))
    return larger[1:-2, 1:-2, 1:-2, 1:-2].copy_(t)


@pytest.mark.parametrize("grid, g, dtype", [((2, 5), 2, FP32), pytest.param((5, 13), 2, BF16, marks=DEAR)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_strides(grid, g, dtype, packed):
    grad, q, k, v, *rest = Case(grid, g, 8, dtype, sequences=2).arguments(packed=packed)
    expected = BACKWARD(grad, q, k, v, *rest)
    apart = [None if t is None else spread(t) for t in (grad, q, k, v)]
    for got, found in zip(BACKWARD(*apart, *rest), expected):
        check_bits("spread", got, found)
    if not packed:
        flat = [t[:1].expand_as(t) for t in (grad, q, k, v)]  # of one sequence
        dense = [t.contiguous() for t in flat]
        for got, found in zip(BACKWARD(*flat, *rest), BACKWARD(*dense, *rest)):
            check_bits("expanded", got, found)


@pytest.mark.parametrize("grid, g", [((2, 5), 2), ((5, 13), 2)], ids=str)
def test_repeatable(grid, g):
    made = Case(grid, g, dtype=BF16)
    for (name, got), found in zip(made.by_kernels().items(), made.by_kernels().values()):
        check_bits(name, got, found)


@DEAR
@pytest.mark.parametrize("grid, g", [((4, 4), 5), ((11, 6), 1)], ids=str)
@pytest.mark.parametrize("dtype, precision", [(FP32, "tf32x3"), (FP32, "ieee"), (BF16, "ieee")])
@pytest.mark.parametrize("head_dim", [16, 72])
def test_declared_cost(grid, g, dtype, precision, head_dim):
    arguments = Case(grid, g, head_dim, dtype).arguments(precision=precision)
    with recording(UNCOUNTED, SPEC.once) as record, Traffic(ops={}) as beside:
        BACKWARD.body(*arguments)
    assert not beside.rows
    assert tuple(BACKWARD.cost(*arguments)) == (record.read, record.written, sum(record.launches.values()))
    for kernel, stored in record.stored.items():
        assert stored <= {"grad_q", "grad_k", "grad_v", "delta"}, kernel


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 5, 0, 16), (2, 70, 0, 16)])
def test_nothing_in_nothing_out(shape):
    n, rows, heads, head_dim = shape
    qkv, grad, lse = torch.empty(n, rows, 3 * heads, head_dim), torch.empty(shape), torch.empty(n, heads, rows)
    arguments = (grad, qkv, None, None, grad, lse, 1.0, 0, [], [], [], "", "", False, "ieee")
    assert BACKWARD(*arguments)[0].shape == qkv.shape and BACKWARD.cost(*arguments).launches == 0


def huge(n, g, grid, heads, head_dim, packed=True, load="qk", dtype=BF16):
    rows = g + math.prod(grid)
    by = [list(ts) for ts in tables(grid, head_dim, device="meta")]
    one = torch.empty(n, rows, heads, head_dim, dtype=dtype, device="meta")
    held = (torch.empty(n, rows, 3 * heads, head_dim, dtype=dtype, device="meta"), None, None)
    lse = torch.empty(n, heads, rows, device="meta")
    turns = (g, list(grid), *by, on_load(load, one), "qk", False, "tf32x3")
    return one, *(held if packed else [one] * 3), one, lse, 0.1, *turns


HUGE = {
    "100,000 sequences of 21 rows": lambda: huge(100_000, 5, (4, 4), 6, 64),
    "2^30 rows": lambda: huge(1, 5, (2**15, 2**14), 2, 64, load=""),
    "2^28 globals, three axes": lambda: huge(2, 2**28, (2**9, 2**9, 2**9), 1, 24, packed=False),
    "2^22 heads": lambda: huge(3, 1, (3, 3), 2**22, 128, packed=False, dtype=FP32),
    "2^20 heads of many rows": lambda: huge(3, 1, (9, 9), 2**20, 128),
}


@DEAR
@pytest.mark.parametrize("typed", [nullcontext, typed_by_inductor])
@pytest.mark.parametrize("name", HUGE)
def test_overflow(name, typed):
    arguments = HUGE[name]()
    with typed(), probing() as probe:
        BACKWARD.body(*arguments)
    assert probe.launches == BACKWARD.cost(*arguments).launches


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda: huge(1, 0, (2**15, 2**16), 1, 16), "2147483648 rows"),
        (lambda: huge(2**27, 0, (7, 10), 16, 16), "programs"),
        (lambda: huge(2**20, 0, (1, 1), 2**13, 16), "programs"),
        (lambda: huge(1, 0, (1, 1), 1, 256), "hd = 256"),
        (lambda: huge(1, 0, (1, 1), 2**31, 16), "2147483648 heads"),
    ],
)
def test_what_is_too_large_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"too large for backend 'triton': .*{message}.* expected at most"):
        BACKWARD.body(*arguments())
