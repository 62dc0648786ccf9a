"""add_norm: the sum and its norm, rounded where eager models round."""

import pytest
import torch
import torch.nn.functional as F

from planecycle_fast.ops import Norm, add_norm, add_norm_ref

pytestmark = pytest.mark.usefixtures("on_reference")

N, ROWS, C = 3, 5, 8


def make(dtype=torch.float64, bias=True):
    x, branch = torch.randn(N, ROWS, C, dtype=dtype), torch.randn(N, ROWS, C, dtype=dtype)
    weight, scale = torch.randn(C, dtype=dtype), torch.randn(C, dtype=dtype)
    return x, branch, scale, Norm(weight, torch.randn(C, dtype=dtype) if bias else None, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_the_formula(bias):
    x, branch, scale, norm = make(bias=bias)
    total, normed = add_norm(x, branch, scale, norm)
    expected = x + scale * branch
    centred = expected - expected.mean(-1, keepdim=True)
    expected_norm = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(normed, expected_norm + (norm.bias if bias else 0), rtol=0, atol=1e-12)


def test_rms_norm_is_the_formula():
    x, branch, scale, norm = make(bias=False)
    total, normed = add_norm(x, branch, scale, norm._replace(rms=True))
    expected = norm.weight * total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rounded_sum_is_normalised(dtype):
    x, branch, scale, norm = make(dtype)
    total, normed = add_norm(x, branch, scale, norm)
    assert torch.equal(total, x + branch * scale) and total.dtype == dtype
    assert torch.equal(normed, F.layer_norm(total, (C,), norm.weight, norm.bias, norm.eps))


def test_a_branch_and_its_scale_can_be_left_out():
    x, branch, _, norm = make()
    total, normed = add_norm(x, None, None, norm)
    assert total is x and torch.equal(normed, F.layer_norm(x, (C,), norm.weight, norm.bias, norm.eps))
    assert torch.equal(add_norm(x, branch, None, norm)[0], x + branch)


def test_inputs_stay_as_they_are():
    x, branch, scale, norm = make()
    copies = [t.clone() for t in (x, branch, scale, norm.weight, norm.bias)]
    with torch.inference_mode():
        add_norm(x, branch, scale, norm)
    assert all(torch.equal(a, b) for a, b in zip((x, branch, scale, norm.weight, norm.bias), copies))


def test_the_residual_stays_float32_under_autocast():
    x, _, scale, norm = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = add_norm(x, torch.randn(N, ROWS, C).bfloat16(), scale, norm)
    assert total.dtype == normed.dtype == torch.float32


@pytest.mark.parametrize("rms", [False, True])
def test_derivatives(rms):
    x, branch, scale, norm = make(bias=not rms)
    tensors = [t.requires_grad_() for t in (x, branch, scale, norm.weight, *([] if rms else [norm.bias]))]

    def call(x, branch, scale, weight, bias=None):
        return add_norm(x, branch, scale, Norm(weight, bias, 1e-5, rms))

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_reference_has_the_same_signature():
    arguments = make()
    assert all(torch.equal(a, b) for a, b in zip(add_norm(*arguments), add_norm_ref(*arguments)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(3, 5, 8).int()}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ({"x": None}, TypeError, "x must be a floating-point tensor, got NoneType"),
        ({"branch": torch.zeros(3, 4, 8)}, ValueError, r"branch must have x's shape, \(3, 5, 8\), got \(3, 4, 8\)"),
        ({"branch": 1.0}, TypeError, "branch must be a floating-point tensor or None, got float"),
        ({"branch": None}, ValueError, "scale must be None without a branch to scale, got a tensor"),
        ({"scale": torch.zeros(7)}, ValueError, r"scale must have shape \(8,\), got \(7,\)"),
        ({"scale": 0.1}, TypeError, "scale must be a floating-point tensor or None, got float"),
        ({"norm": Norm(torch.zeros(9), None, 1e-5)}, ValueError, r"norm.weight must have shape \(8,\), got \(9,\)"),
        ({"norm": Norm(None, torch.zeros(8, 1), 1e-5)}, ValueError, r"norm.bias must have shape \(8,\), got \(8, 1\)"),
        ({"norm": torch.nn.LayerNorm(8)}, TypeError, "norm must be an ops.Norm, got LayerNorm"),
        ({"norm": None}, TypeError, "norm must be an ops.Norm, got NoneType"),
        ({"backend": "triton"}, ValueError, "backend 'triton' is not usable: .*; usable: (cpu, )?reference"),
        ({"backend": "metal"}, ValueError, "backend must be 'auto' or one of triton, cpu, reference, got 'metal'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input(change, error, message):
    x = torch.zeros(3, 5, 8)
    arguments = {"x": x, "branch": x, "scale": torch.zeros(8), "norm": Norm(None, None, 1e-5)} | change
    with pytest.raises(error, match=message):
        add_norm(**arguments)
