"""linear_gelu for the test bed: ends of tiles along every axis, with bias and without, weights as layers have them."""

from dataclasses import dataclass

import torch

from planecycle_fast.ops import linear_gelu, linear_gelu_ref
from planecycle_fast.ops.activations.linear_gelu_triton import OP, rows_of

from ..kernelcheck.spec import Case, Spec


@dataclass(frozen=True)
class Layer(Case):
    """What goes into GELU is about standard normal, so that all of its bend is seen."""

    def make(self, dtype, seed=0, device="cpu"):
        made = super().make(dtype, seed, device)
        if device != "meta":
            made["weight"].mul_(max(1, made["weight"].shape[1]) ** -0.5)
        return made


def case(rows, channels, hidden, bias=True, name=""):
    """`rows` are the sizes of all axes of x but the last."""
    tensors = {"x": (*rows, channels), "weight": (hidden, channels)} | ({"bias": (hidden,)} if bias else {})
    sizes = f"{'x'.join(str(n) for n in rows)}, {channels} to {hidden}"
    return Layer(tensors, {}, name or f"{sizes}{'' if bias else ' without bias'}")


def fast(x, weight, bias=None):
    """For inference: without gradients."""
    with torch.no_grad():
        return linear_gelu(*_dense(x, weight, bias), backend="triton")


def reference(x, weight, bias=None):
    with torch.no_grad():
        return linear_gelu_ref(x, weight, bias)


def _dense(x, weight, bias):
    """Copies: the operation makes none, and refuses what does not lie as its kernel needs it."""
    return [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in (x, weight, bias)]


def op_arguments(tensors, settings):
    """Of the one call."""
    x, weight, bias = _dense(tensors["x"], tensors["weight"], tensors.get("bias"))
    return [(OP, (rows_of(x), weight, bias))]


def groups(t, settings):
    """Channels within the first tile and beyond: ends are in the second."""
    return {"first channels": t[..., :256], "other channels": t[..., 256:]}


def named_cases():
    yield case((1,), 8, 8)
    yield case((2, 3), 64, 256)
    yield case((129,), 64, 128)
    yield case((128,), 72, 136, bias=False)
    yield case((2, 65), 128, 392)
    yield case((3,), 264, 520)
    yield case((1, 2, 130), 16, 384)
    yield case((257,), 56, 264, bias=False)
    yield case((128 * 132 + 1,), 8, 8, name="more tiles than programs")


def huge_cases():
    yield case((100_000, 21), 4096, 1024)
    yield case((2**30,), 384, 1536, name="as many rows as it takes")
    yield case((2**20, 2**10), 8, 8, bias=False)
    yield case((3,), 2**16, 2**17)


def random_cases():
    from hypothesis import strategies as st

    sizes = st.sampled_from([8, 16, 40, 64, 72, 128, 136, 200])
    hidden = st.sampled_from([8, 24, 128, 136, 256, 264, 384, 392])
    return st.builds(case, st.sampled_from([(1,), (2, 3), (127,), (129,), (2, 1, 40)]), sizes, hidden, st.booleans())


SPEC = Spec(
    op=OP,
    fast=fast,
    reference=reference,
    op_arguments=op_arguments,
    typical=case((2, 3), 16, 24, name="typical"),
    plain=[case((4, 50), 64, 128), case((4, 50), 64, 256)],
    cases=list(named_cases()),
    small=[case((2,), 8, 8), case((2, 2), 16, 8, bias=False)],
    empty=[case((0, 3), 8, 8)],
    huge=list(huge_cases()),
    strategy=random_cases,
    groups=groups,
    forward_mode=False,
    twice=False,
    factors={"width": [384, 768, 1024], "hidden": [4, 1], "bias": [True, False]},
    factors_case=lambda width, hidden, bias: case((8, 201), width, hidden * width + (hidden == 1) * 8, bias),
    tensor_cores=True,
    any_strides=False,
    dtypes=(torch.bfloat16, torch.float16),
    differentiable=False,
    cancels=True,  # torch's GELU of an infinity is NaN on a CPU, but for float16
    opaque=True,
    architectures=(90, 100),
    uncounted=frozenset({"weight", "bias"}),
    once=frozenset({"x"}),
    outputs={"linear_gelu_kernel": {"out"}},
)
