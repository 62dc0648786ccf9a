"""A small operation, out = a * x + y by rows, and versions of it with one fault each: what the checks must catch."""

import torch
import triton
import triton.language as tl
from hypothesis import strategies as st

from planecycle_fast.ops.registry import Cost, CustomOp

from ..kernelcheck.spec import Case, Spec


@triton.jit
def axpy_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask).to(ACC) * scale + tl.load(y + i, mask=mask).to(ACC)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def narrow_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask).to(ACC) * scale + tl.load(y + i, mask=mask).to(ACC)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def truncating_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask).to(ACC) * scale + tl.load(y + i, mask=mask).to(ACC)
    if out.dtype.element_ty == tl.bfloat16:  # keeps the upper half of the bits: rounds toward zero
        total = (total.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def coarse_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask).to(tl.float16) * scale + tl.load(y + i, mask=mask).to(tl.float16)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def bf16_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask), mask=mask)


@triton.jit
def forgetful_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n - 1  # the last element is never written
    total = tl.load(x + i, mask=mask).to(ACC) * scale + tl.load(y + i, mask=mask).to(ACC)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def masked_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    a = tl.load(x + i, mask=mask).to(ACC)
    rest = tl.sum(a, 0) * 0  # takes in lanes that were not loaded
    total = a * scale + tl.load(y + i, mask=mask).to(ACC) + rest
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def silent_kernel(x, y, out, scale, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    total = tl.load(x + i, mask=mask).to(ACC) * scale + tl.load(y + i, mask=mask).to(ACC)
    total = tl.where(total == total, total, 0)  # swallows NaN
    tl.store(out + i, total.to(out.dtype.element_ty), mask=mask)


SCALE = 1.6875  # the same in float32, which is what a kernel is given


def reference(x, y):
    return x * SCALE + y


def make(name, kernel=axpy_kernel, body=None, fake=None, backward=None, cost=None, tangents=True):
    """The `Spec` of the operation, registered as ``faults::<name>``, with what is given in place of what is right."""

    def run(x, y):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            acc = tl.float64 if x.dtype == torch.float64 else tl.float32
            kernel[(triton.cdiv(x.numel(), 64),)](x, y, out, SCALE, x.numel(), ACC=acc, BLOCK=64)
        return out

    def contiguous_body(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return run(x.contiguous(), y.contiguous())

    def honest_cost(x, y):
        size = x.numel() * x.element_size()
        copied = sum(size for t in (x, y) if not t.is_contiguous())
        return Cost(2 * size + copied, size + copied, 1 if size else 0)

    body = body(run) if body else contiguous_body
    definition = torch.library.custom_op(f"faults::{name}", body, mutates_args=())
    definition.register_fake(fake or (lambda x, y: torch.empty(x.shape, dtype=x.dtype, device=x.device)))
    definition.register_autograd(backward or (lambda ctx, g: (g * SCALE, g * 1)))
    op = CustomOp(name, body, cost or honest_cost, getattr(torch.ops.faults, name).default)

    def fast(x, y):
        if not tangents or torch.autograd.forward_ad._current_level < 0:
            return op(x, y)
        (a, da), (b, db) = (torch.autograd.forward_ad.unpack_dual(t) for t in (x, y))
        da, db = (torch.zeros_like(t) if d is None else d for t, d in ((a, da), (b, db)))
        return torch.autograd.forward_ad.make_dual(op(a, b), op(da, db))

    def case(*shape):
        return Case({"x": shape, "y": shape}, {}, name=str(shape))

    return Spec(
        op=op,
        fast=fast,
        reference=reference,
        op_arguments=lambda tensors, settings: [(op, (tensors["x"], tensors["y"]))],
        typical=case(2, 3, 4),
        plain=[case(4, 4, 4)],
        cases=[case(3, 5, 7), case(2, 40, 32)],
        small=[case(1, 3, 2)],
        empty=[case(0, 3, 2)],
        huge=[case(100_000, 2**10, 32)],
        strategy=lambda: st.builds(case, *[st.integers(1, 9)] * 3),
        groups=lambda t, settings: {"rows": t},
        outputs={kernel.__name__: {"out"}},
    )
