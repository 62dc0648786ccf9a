"""swiglu: silu(gate) * value, in place or not."""

import pytest
import torch
import torch.nn.functional as F

from planecycle_fast.ops import swiglu, swiglu_ref


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_in_place_is_the_same_to_the_bit(dtype):
    gate, value = torch.randn(2, 7, 30, dtype=dtype)
    expected = F.silu(gate) * value
    assert torch.equal(swiglu(gate, value), expected) and torch.equal(swiglu_ref(gate, value), expected)
    before = value.clone()
    assert swiglu(gate, value, inplace=True) is gate
    assert torch.equal(gate, expected) and torch.equal(value, before)


def test_it_is_the_formula():
    gate, value = torch.randn(2, 50, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, value), gate / (1 + (-gate).exp()) * value, rtol=0, atol=1e-14)


def test_halves_of_a_packed_layer():
    packed = torch.randn(4, 5, 12)
    gate, value = packed.chunk(2, dim=-1)
    out = swiglu(gate, value)
    assert out.is_contiguous() and torch.equal(out, F.silu(gate) * value)


def test_derivatives():
    gate, value = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, value), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(swiglu, (gate, value))


def test_bad_input():
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="gate must be a floating-point tensor, got torch.int32"):
        swiglu(x.int(), x)
    with pytest.raises(TypeError, match="value must be a floating-point tensor, got NoneType"):
        swiglu(x, None)
    with pytest.raises(ValueError, match=r"value must have the gate's shape, \(3, 4\), got \(3, 5\)"):
        swiglu(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="inplace must be False for a tensor value that needs a gradient"):
        swiglu(x, x.clone().requires_grad_(), inplace=True)
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        swiglu(x, x, backend="triton")
