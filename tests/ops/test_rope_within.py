"""Queries and keys of a packed qkv turned where they are: the same numbers and gradients as out of place.

`tests/interpreted` runs this file once more, on Triton's kernels.
"""

import functools
import os

import pytest
import torch
from torch.utils import checkpoint

import planecycle_fast as pcf
from planecycle_fast.engine import branches
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, rope
from planecycle_fast.ops.rotary.rope_within import rope_within
from planecycle_fast.runtime import native

from ..host_models import BY_NAME

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
HEADS, GRID, GLOBALS = 2, (3, 4), 2

if BACKEND == "cpu" and not native.ready():
    pytest.skip(f"backend 'cpu' is not usable: {native.why_not_native()}", allow_module_level=True)


def case(dtype=torch.float32):
    """qkv (N, g + L, 3*heads, hd) as made of a leaf, the leaf, and angles."""
    leaf = torch.randn(2, GLOBALS + 12, 3 * HEADS, 16, dtype=dtype, requires_grad=True)
    return leaf * 1, leaf, Axial(Rope(make_periods(4, 100.0)), GRID)


def apart(qkv, angles):
    """The same by the operation out of place."""
    return rope(qkv, angles, GLOBALS, 2 * HEADS, backend=BACKEND).split(HEADS, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_outputs_and_gradients_to_the_bit(dtype):
    qkv, leaf, angles = case(dtype)
    grads = [torch.randn_like(t) for t in leaf.split(HEADS, 2)]
    expected = apart(qkv, angles)
    [wanted] = torch.autograd.grad(expected, leaf, grads, retain_graph=True)
    got = rope_within(qkv, angles, GLOBALS, False, BACKEND)
    [found] = torch.autograd.grad(got, leaf, grads)
    for ours, theirs in zip((*got, found), (*expected, wanted)):
        assert torch.equal(ours, theirs)
    assert [t.untyped_storage().data_ptr() for t in got] == [qkv.untyped_storage().data_ptr()] * 3


def test_gradients_of_some_outputs_alone():
    qkv, leaf, angles = case()
    [wanted] = torch.autograd.grad(apart(qkv, angles)[1].square().sum(), leaf, retain_graph=True)
    [found] = torch.autograd.grad(rope_within(qkv, angles, GLOBALS, False, BACKEND)[1].square().sum(), leaf)
    assert torch.equal(found, wanted) and found[:, :, HEADS : 2 * HEADS].abs().min() > 0


def test_second_derivatives():
    def function(leaf):
        return rope_within(leaf * 1, angles, GLOBALS, False, BACKEND)

    _, leaf, angles = case(torch.float64)
    assert torch.autograd.gradcheck(function, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (leaf,), fast_mode=True)


def test_whoever_kept_qkv_for_its_gradient_hears_of_it():
    qkv, _, angles = case()
    kept = qkv.square()
    rope_within(qkv, angles, GLOBALS, False, BACKEND)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_angles_that_need_a_gradient_are_refused():
    qkv, _, angles = case()
    angles.rope.periods.requires_grad_()
    with pytest.raises(ValueError, match="angles must not need a gradient"):
        rope_within(qkv, angles, GLOBALS, False, BACKEND)


@pytest.fixture
def within(monkeypatch):
    """How often a model turned queries and keys where they are."""
    calls = []

    def counted(*args):
        calls.append(args)
        return rope_within(*args)

    monkeypatch.setattr(branches, "rope_within", counted)
    return calls


def gradients(lifted, volume, around):
    """Of all parameters, with each block called as ``around(block, *arguments)``."""
    kept = [block.forward for block in lifted.blocks]
    for block in lifted.blocks:
        block.forward = functools.partial(around, block.forward)
    try:
        loss = lifted(volume).patches.square().sum()
        return torch.autograd.grad(loss, [p for p in lifted.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for block, forward in zip(lifted.blocks, kept):
            block.forward = forward


def saved(*operations):
    """Checkpointing that keeps the outputs of these operations of aten."""
    keep = [getattr(torch.ops.aten, name).default for name in operations]
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, keep)
    return lambda f, *args: checkpoint.checkpoint(f, *args, use_reentrant=False, context_fn=context)


WAYS = {
    "checkpointed": lambda f, *args: checkpoint.checkpoint(f, *args, use_reentrant=False),
    "products kept": saved("addmm", "mm"),
}


DEAR = [pytest.mark.full] if BACKEND == "triton" else []  # seconds in the interpreter


@pytest.mark.parametrize("way", ["checkpointed", pytest.param("products kept", marks=DEAR)])
def test_checkpointed_blocks(within, way):
    """What checkpointing keeps of a block is not changed under it."""
    host = BY_NAME["timm-dinov3-s-qkvb"]
    lifted, volume = pcf.lift(host.make(), backend=BACKEND), host.volume(depth=2, grid=(2, 3))
    expected = gradients(lifted, volume, lambda f, *args: f(*args))
    blocks = len(lifted.blocks)
    assert len(within) == blocks
    got = gradients(lifted, volume, WAYS[way])
    assert len(within) == (3 * blocks if way == "checkpointed" else blocks)
    for ours, theirs in zip(got, expected):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


def test_layers_that_may_keep_what_they_return(within):
    """The qkv of a subclass of Linear, which keeps it, is not changed."""

    class Keeps(torch.nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    host = BY_NAME["timm-dinov3-s-qkvb"]
    model = host.make()
    for block in model.blocks:
        block.attn.qkv.__class__ = Keeps
    seen = []
    model.blocks[0].attn.proj.register_forward_pre_hook(lambda *_: seen.append(model.blocks[0].attn.qkv.kept.clone()))
    pcf.lift(model, backend=BACKEND, strict=False)(host.volume(depth=2, grid=(2, 3)))
    assert not within and torch.equal(seen[0], model.blocks[0].attn.qkv.kept)
