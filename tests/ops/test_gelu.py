"""gelu: exact, in place or not."""

import math

import pytest
import torch

from planecycle_fast.ops import gelu, gelu_ref


def test_it_is_the_exact_one():
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)
    expected = torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(gelu(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_in_place_is_the_same_to_the_bit(dtype):
    x = torch.randn(1000, dtype=dtype)
    expected = torch.nn.functional.gelu(x)
    assert torch.equal(gelu(x), expected) and torch.equal(gelu_ref(x), expected)
    before = x.clone()
    assert gelu(x, inplace=True) is x and torch.equal(x, expected)
    strided = torch.stack([before, before], -1)
    gelu(strided[:, 0], inplace=True)
    torch.testing.assert_close(strided[:, 0], expected)  # torch's scalar code differs from its vector code
    assert torch.equal(strided[:, 1], before)


def test_derivatives():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(gelu, x)


def test_bad_input():
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        gelu(torch.zeros(3).long())
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="inplace must be False for a tensor x that needs a gradient, got True"):
        gelu(leaf * 2, inplace=True)
    with torch.no_grad():
        gelu(leaf * 2, inplace=True)
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        gelu(torch.zeros(3), backend="triton")
