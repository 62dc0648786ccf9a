"""Self-attention of a packed qkv that is turned where it is: the same context and gradients as step by step."""

import pytest
import torch
from torch.autograd import forward_ad

from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial
from planecycle_fast.ops.multihead_attention.self_attention import self_attention_ref
from planecycle_fast.ops.multihead_attention.self_attention_within import self_attention_within

from ..kernelcheck.observers import observing
from .test_self_attention import Seen

HEADS, GLOBALS = 2, 2


def case(grid=(3, 4), dtype=torch.float64, sequences=2):
    """qkv (N, g + L, 3*heads, hd) as made of a leaf, the leaf, and angles."""
    rows = GLOBALS + grid[0] * grid[1]
    leaf = torch.randn(sequences, rows, 3 * HEADS, 16, dtype=dtype, requires_grad=True)
    wide = {"coord_dtype": torch.float64} if dtype == torch.float64 else {}
    return leaf * 1, leaf, Axial(Rope(make_periods(4, 100.0, dtype=dtype), **wide), grid)


def within(qkv, angles, scale=0.2):
    return self_attention_within(qkv, angles, angles.tables(), GLOBALS, scale, False)


def in_steps(qkv, angles, scale=0.2):
    return self_attention_ref(qkv, None, None, angles, GLOBALS, scale)


@pytest.mark.parametrize("grid, dtype", [((3, 4), torch.float64), ((5, 13), torch.float32)])
def test_outputs_and_gradients(grid, dtype):
    qkv, leaf, angles = case(grid, dtype)
    expected = in_steps(qkv, angles)
    upstream = torch.randn_like(expected)
    [wanted] = torch.autograd.grad(expected, leaf, upstream, retain_graph=True)
    got = within(qkv, angles)
    [found] = torch.autograd.grad(got, leaf, upstream)
    near = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, expected, **near)
    torch.testing.assert_close(found, wanted, **near)


def test_an_incoming_gradient_of_any_strides():
    qkv, leaf, angles = case()
    [wanted] = torch.autograd.grad(in_steps(qkv, angles).sum(), leaf, retain_graph=True)
    [found] = torch.autograd.grad(within(qkv, angles).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_an_incoming_gradient_that_starts_anywhere_is_read_in_16_bytes():
    qkv, leaf, angles = case()
    out = within(qkv, angles)
    grad = torch.randn(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    with observing(Seen()) as seen:
        torch.autograd.grad(out, leaf, grad)
    assert ("self_attention_tile_backward_kernel", 2) in seen.launches


def test_qkv_is_turned_where_it_is_and_keeps_its_values():
    qkv, _, angles = case()
    before = qkv.detach().clone()
    within(qkv, angles)
    changed = (qkv != before).any(-1)
    assert changed[:, GLOBALS:, : 2 * HEADS].all() and not changed[:, :, 2 * HEADS :].any()
    assert not changed[:, :GLOBALS].any()


def test_whoever_kept_qkv_for_its_gradient_hears_of_it():
    qkv, _, angles = case()
    kept = qkv.square()
    within(qkv, angles)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@pytest.mark.parametrize("constant", [True, False])
def test_a_second_derivative_is_refused(constant):
    """Of an incoming gradient that has one, and of a constant, where it hangs on what was kept alone."""
    qkv, leaf, angles = case()
    out = within(qkv, angles)
    [grad] = torch.autograd.grad(out.sum() if constant else out.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        grad.square().sum().backward()


def test_what_is_refused():
    qkv, leaf, angles = case()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        within(forward_ad.make_dual(qkv, qkv), angles)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda x: within(x * 1, angles).sum())(leaf.detach())
    angles.rope.periods.requires_grad_()
    with pytest.raises(ValueError, match="angles must not need a gradient"):
        within(qkv, angles)
