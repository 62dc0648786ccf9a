"""swiglu for the test bed: gate and value apart or packed in one tensor, awkward sizes, two dtypes."""

from functools import partial

import torch

from planecycle_fast.ops import swiglu, swiglu_ref
from planecycle_fast.ops.activations.swiglu_autograd import rows_of
from planecycle_fast.ops.activations.swiglu_triton import BACKWARD, INPLACE, OP

from ..kernelcheck.spec import Case, Spec


def case(rows, hidden, packed=False, narrower=None, name=""):
    """`rows` are the sizes of all axes but the last."""
    tensors = {"gate": (*rows, 2 * hidden)} if packed else {"gate": (*rows, hidden), "value": (*rows, hidden)}
    sizes = "x".join(str(n) for n in (*rows, hidden))
    return Case(tensors, {}, name or f"{sizes}{' packed' if packed else ''}", narrower or {})


def op_arguments(tensors, settings):
    """The calls of forward, backward, and in place: of a packed tensor, of its halves."""
    gate, value = [None if t is None else rows_of(t) for t in (tensors["gate"], tensors.get("value"))]
    fixed = [None if t is None else t.detach() for t in (gate, value)]  # what is not differentiated again
    halves = fixed if value is not None else fixed[0].chunk(2, dim=-1)
    dtype = torch.promote_types(halves[0].dtype, halves[1].dtype)
    grad = halves[0].new_ones(halves[0].shape, dtype=dtype)
    return [(OP, (gate, value)), (BACKWARD, (grad, *fixed)), (INPLACE, (halves[0].contiguous(), halves[1]))]


def groups(t, settings):
    """Halves, as gradients of gate and value in one tensor are of different sizes."""
    half = t.shape[-1] // 2
    return {"first half": t[..., :half], "second half": t[..., half:]}


def named_cases():
    for packed in (False, True):
        yield case((3,), 1, packed)
        yield case((2, 3), 7, packed)
        yield case((2, 3, 5), 8, packed)
        yield case((9,), 100, packed)
        yield case((3,), 1024 + 3, packed)
        yield case((700,), 8, packed)
        yield case((1,), 384, packed)
        yield case((), 40, packed)
    yield case((600,), 1, name="many rows of one channel")
    yield case((17, 1), 256, name="a row more than two tiles have")
    yield case((5,), 24, narrower={"value": torch.bfloat16}, name="value in bf16")
    yield case((5,), 20, narrower={"gate": torch.float16}, name="gate in fp16")


def huge_cases():
    for packed in (False, True):
        yield case((100_000, 21), 4096, packed)
        yield case((2**31 + 5,), 1, packed)
        yield case((3, 2**29), 100, packed)
        yield case((), 2**33, packed)
        yield case((5,), 2**31 + 7, packed)
    yield case((2**28,), 8192, name="2^41 elements")


def random_cases():
    from hypothesis import strategies as st

    return st.builds(
        case,
        st.lists(st.integers(1, 4), max_size=3),
        st.sampled_from([1, 2, 5, 8, 16, 33, 40, 64, 72]),
        st.booleans(),
        st.just({}) | st.just({"gate": torch.bfloat16}),
    )


SPEC = Spec(
    op=OP,
    fast=partial(swiglu, backend="triton"),
    reference=swiglu_ref,
    op_arguments=op_arguments,
    typical=case((2, 3), 16, name="typical"),
    plain=[case((4, 50), 64, packed) for packed in (False, True)],
    cases=list(named_cases()),
    small=[case((2,), 3), case((2, 2), 2, packed=True), case((), 8, packed=True)],
    empty=[case((0, 3), 4), case((0,), 4, packed=True), case((3,), 0), case((2,), 0, packed=True)],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    forward_mode=False,
    twice=False,
    factors={"hidden": [1536, 2048, 4096, 100], "packed": [False, True]},
    factors_case=lambda hidden, packed: case((8, 201), hidden, packed),
    wide=lambda choice: choice["hidden"] * choice["dtype"].itemsize % 16 == 0,
    any_strides=False,
    others=(BACKWARD, INPLACE),
    outputs={"swiglu_kernel": {"out"}, "swiglu_backward_kernel": {"grad_gate", "grad_value"}},
)
