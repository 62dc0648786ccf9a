"""swiglu: silu(gate) * value, of two tensors or of one that holds both, in place or not."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from planecycle_fast.ops import swiglu, swiglu_ref

pytestmark = pytest.mark.usefixtures("on_reference")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("shape", [(4, 5, 12), (2,), (0, 6), (3, 0)])
def test_gate_and_value_in_one_tensor(shape):
    packed = torch.randn(shape)
    gate, value = packed.chunk(2, dim=-1)
    for out in (swiglu(packed), swiglu_ref(packed), swiglu(gate, value)):
        assert out.is_contiguous() and torch.equal(out, F.silu(gate) * value)


def test_two_dtypes():
    gate, value = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    out = swiglu(gate, value)
    assert out.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (gate, value))] == [gate.dtype, value.dtype]


def test_derivatives():
    gate, value = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for inputs in ((gate, value), (gate,)):
        assert torch.autograd.gradcheck(swiglu, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(swiglu, inputs)


def test_bad_input():
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="gate must be a floating-point tensor, got torch.int32"):
        swiglu(x.int(), x)
    with pytest.raises(TypeError, match="value must be a floating-point tensor, got str"):
        swiglu(x, "x")
    with pytest.raises(ValueError, match=r"gate must have shape \(..., hidden\), got \(\)"):
        swiglu(x.sum(), x.sum())
    with pytest.raises(ValueError, match=r"value must have the gate's shape, \(3, 4\), got \(3, 5\)"):
        swiglu(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"gate must have shape \(..., 2\*hidden\) without a value, got \(4, 3\)"):
        swiglu(x.T)
    with pytest.raises(ValueError, match="inplace must be False without a value, .* got True"):
        swiglu(x, inplace=True)
    with pytest.raises(ValueError, match="inplace must be False for a tensor value that needs a gradient"):
        swiglu(x, x.clone().requires_grad_(), inplace=True)
    with pytest.raises(ValueError, match="backend 'triton' is not usable"):
        swiglu(x, x, backend="triton")


@pytest.fixture
def compiler(monkeypatch):
    """`swiglu_triton`, and what shows the graphs that torch.compile makes of it for a GPU that is not there."""
    triton = pytest.importorskip("triton", reason="needs triton")
    from planecycle_fast.ops.activations.swiglu_triton import swiglu_triton

    from .test_custom_ops import NoGpu, graphs_of

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    return swiglu_triton, graphs_of


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compilers_see_the_kernels_and_nothing_else(compiler, packed, dynamic):
    swiglu_triton, graphs_of = compiler
    shapes = [(2, 9, 96)] if packed else [(2, 9, 48)] * 2
    tensors = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    graphs = graphs_of(lambda gate, value=None: swiglu_triton(gate, value, False), *tensors, dynamic=dynamic)
    assert len(graphs) == 2  # forward and backward
    for graph, copies in zip(graphs, (0, 1)):  # gradients of a sum are of stride 0: rows of them are a copy
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert len([call for call in calls if call.startswith("triton_kernel_wrapper")]) == 1, calls
        assert not [call for call in calls if "planecycle_fast" in call], calls
        assert len([call for call in calls if any(n in call for n in ("clone", "copy", "cat", "index"))]) <= copies


def test_a_fake_needs_no_gpu(compiler):
    swiglu_triton, _ = compiler
    with FakeTensorMode():
        x = torch.empty(2, 3, 96, device="cuda", dtype=torch.bfloat16)
        out, other = swiglu_triton(x, None, False), swiglu_triton(x, x.float(), False)
        assert swiglu_triton(x, x, True) is x
    assert out.shape == (2, 3, 48) and out.device.type == "cuda" and out.is_contiguous()
    assert other.shape == x.shape and other.dtype == torch.float32


def test_too_many_programs_are_refused(compiler):
    swiglu_triton, _ = compiler
    with pytest.raises(ValueError, match="gate is too large for backend 'triton': .* expected at most"):
        swiglu_triton(torch.empty(2**31, 3 * 512 + 2, device="meta"), None, False)
