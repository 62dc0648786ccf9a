"""attention: the same by every implementation, no copies on the way, and a reason for each that does not run."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from planecycle_fast.cost.traffic import Traffic
from planecycle_fast.ops import attention, attention_ref
from planecycle_fast.runtime import attentions

from ..kernelcheck.attention import check_attention
from ..kernelcheck.budget import BudgetError

FLASH = ("flash2", "flash3", "flash4")


def make(n=3, rows=7, heads=2, head_dim=16, dtype=torch.float32, device="cpu"):
    """q, k, v (N, rows, heads, hd) as views of a packed linear layer's output."""
    return torch.randn(n, rows, 3, heads, head_dim, dtype=dtype, device=device).unbind(2)


def test_reference_is_the_formula():
    q, k, v = make(dtype=torch.float64)
    out = attention_ref(q, k, v)
    for n, row, head in ((0, 0, 0), (2, 6, 1)):
        scores = torch.stack([(q[n, row, head] * k[n, other, head]).sum() / 4 for other in range(7)])
        weights = scores.exp() / scores.exp().sum()
        expected = sum(w * v[n, other, head] for other, w in enumerate(weights))
        torch.testing.assert_close(out[n, row, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_all_on_this_machine_agree(name, scale):
    q, k, v = make(dtype=torch.float64)
    out = attention(q, k, v, scale, name)
    assert out.shape == q.shape and out.is_contiguous()
    torch.testing.assert_close(out, attention_ref(q, k, v, scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sdpa_is_torchs_to_the_bit(dtype):
    q, k, v = make(dtype=dtype)
    expected = F.scaled_dot_product_attention(*[t.transpose(1, 2).contiguous() for t in (q, k, v)])
    assert torch.equal(attention(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 21, 6, 64), pytest.param((3, 77, 2, 128), marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_within_the_budget(name, shape, dtype):
    """What `test_gpu_attention` checks of every attention."""
    check_attention(lambda q, k, v: attention(q, k, v, attention=name), shape, dtype)


def faulty(q, k, v, fault):
    scores = torch.einsum("nihd,njhd->nhij", q, k) * q.shape[3] ** -0.5
    if fault == "a scale that is 1% off":
        scores = scores * 1.01
    if fault == "a key that is left out":
        scores = torch.cat([scores[..., :-1], scores[..., -1:] - 1e4], -1)
    weights = scores.softmax(-1)
    if fault == "probabilities in bfloat16":
        weights = weights.bfloat16().to(q.dtype)
    if fault == "no gradient through the softmax's sum":
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True).detach()
    return torch.einsum("nhij,njhd->nihd", weights, v)


FAULTS = ["a scale that is 1% off", "a key that is left out", "probabilities in bfloat16",
          "no gradient through the softmax's sum"]  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 21, 6, 64), (3, 77, 2, 128)], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_attentions_are_not_within_the_budget(fault, shape):
    check_attention(lambda *qkv: faulty(*qkv, None), shape, torch.float32)
    with pytest.raises(BudgetError, match="gradient at" if "gradient" in fault else "output at"):
        check_attention(lambda *qkv: faulty(*qkv, fault), shape, torch.float32)


def test_no_copies():
    for tensors in (make(), [t.contiguous() for t in make()]):
        with Traffic() as traffic:
            attention(*tensors)
        assert not traffic.copies and traffic.launches == 1


def test_derivatives_of_the_reference():
    tensors = [t.clone().requires_grad_() for t in make(1, 3, 2, 4, torch.float64)]
    assert torch.autograd.gradcheck(attention_ref, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention_ref, tensors)


@pytest.fixture
def flash(monkeypatch):
    """Stand-ins for the three FlashAttentions, and for a GPU; what they are called with."""
    calls, capability = [], [9, 0]

    def function(q, k, v, **settings):
        calls.append((q, k, v, settings))
        return attention_ref(q, k, v, settings["softmax_scale"])

    def install(name, returns=lambda out: out):
        module = types.ModuleType(name)
        module.flash_attn_func = lambda *args, **settings: returns(function(*args, **settings))
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("flash_attn", "flash_attn_interface"):
        install(name)
    install("flash_attn.cute", lambda out: (out, None))
    monkeypatch.setattr(attentions, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(capability))
    return types.SimpleNamespace(calls=calls, capability=capability, install=install)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def on_gpu(*tensors):
    return [t.as_subclass(OnGpu) for t in tensors]


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_gets_the_views_as_they_are(flash, name):
    tensors = on_gpu(*make(dtype=torch.bfloat16))
    assert attentions.why_not_attention(name) is None
    out = attention(*tensors, scale=0.25, attention=name)
    ((*got, settings),) = flash.calls
    assert settings == {"softmax_scale": 0.25}
    for theirs, ours in zip(got, tensors):
        assert theirs is ours and not theirs.is_contiguous()
    assert torch.equal(out, attention_ref(*tensors, 0.25)) and out.shape == tensors[0].shape


REASONS = [
    ("flash2", {}, [7, 5], "does not run on compute capability 7.x"),
    ("flash3", {}, [8, 0], "does not run on compute capability 8.x"),
    ("flash2", {"dtype": torch.float32}, [9, 0], "needs float16 or bfloat16, got float32"),
    ("flash3", {"head_dim": 20}, [9, 0], "multiple of 8 and at most 256, got 20"),
    ("flash4", {"head_dim": 136}, [10, 0], "multiple of 8 and at most 128, got 136"),
    ("flash2", {"rows": 0}, [9, 0], "needs at least one token, got 3 sequences of 0 rows"),
]


@pytest.mark.parametrize("name, settings, capability, message", REASONS, ids=str)
def test_what_flash_attention_does_not_take(flash, name, settings, capability, message):
    flash.capability[:] = capability
    tensors = on_gpu(*make(**({"dtype": torch.bfloat16} | settings)))
    with pytest.raises(ValueError, match=f"attention '{name}' does not take these tensors: .*{message}.*; use 'auto'"):
        attention(*tensors, attention=name)
    assert not flash.calls


def test_a_head_dimension_that_only_hopper_takes(flash):
    tensors = on_gpu(*make(head_dim=192, dtype=torch.bfloat16))
    attention(*tensors, attention="flash4")
    assert flash.calls


def test_alignment(flash):
    wide = torch.randn(3, 7, 2, 17, dtype=torch.bfloat16)
    odd = on_gpu(wide[..., 1:], wide[..., 1:], wide[..., 1:])
    attention(*odd, attention="flash2")
    for name in ("flash3", "flash4"):
        with pytest.raises(ValueError, match="rows of q that start at multiples of 16 bytes"):
            attention(*odd, attention=name)
    strided = on_gpu(*[torch.randn(3, 7, 16, 2, dtype=torch.bfloat16).transpose(2, 3)] * 3)
    with pytest.raises(ValueError, match="channels next to each other, got a stride of 2 in q"):
        attention(*strided, attention="flash2")


def test_no_backward(flash, monkeypatch):
    flash.capability[:] = [8, 0]
    q, k, v = on_gpu(*make(dtype=torch.bfloat16))
    attention(q, k, v, attention="flash4")
    q.requires_grad_()
    with pytest.raises(ValueError, match=r"flash_attn.cute has no backward on compute capability 8.x"):
        attention(q, k, v, attention="flash4")
    flash.capability[:] = [9, 0]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    flash.install("fa3_fwd_interface")
    attentions._loaded.clear()
    with pytest.raises(ValueError, match="fa3_fwd_interface has no backward"):
        attention(q, k, v, attention="flash3")
    with torch.no_grad():
        attention(q, k, v, attention="flash3")
    with pytest.raises(ValueError, match="needs bfloat16, got float16"), torch.no_grad():
        attention(*[t.half() for t in (q, k, v)], attention="flash3")


def test_flash2s_backward_counts_in_32_bits(flash):
    q = torch.empty(1, 1, 1, 16, dtype=torch.bfloat16).expand(2**15, 1025, 2, 16)  # 1152 * 32 * 2^16 > 2^31
    (q,) = on_gpu(q)
    assert attentions.too_long_for_backward(q) and not attentions.too_long_for_backward(q[:100])
    assert attentions.why_not_for("flash2", q, q, q) is None
    needs = q.detach().requires_grad_()
    assert "its backward counts in 32 bits" in attentions.why_not_for("flash2", needs, q, q)


def test_tensors_elsewhere(flash):
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        attention(*make(dtype=torch.bfloat16), attention="flash2")


@pytest.mark.parametrize("name", FLASH)
def test_not_installed_or_broken(flash, monkeypatch, name):
    for module in attentions.MODULES[name]:
        monkeypatch.setitem(sys.modules, module, None)
    reason = attentions.why_not_attention(name)
    assert all(f"{module} is not installed" in reason for module in attentions.MODULES[name])
    attentions._loaded.clear()
    for module in attentions.MODULES[name]:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    reason = attentions.why_not_attention(name)
    assert all(f"{module} has no flash_attn_func" in reason for module in attentions.MODULES[name])
    with pytest.raises(ValueError, match=f"attention '{name}' is not usable: .*; usable: auto, .*sdpa, reference"):
        attention(*make(), attention=name)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(3, 7, 2, 16).int()}, TypeError, "q must be a floating-point tensor, got torch.int32"),
        ({"k": None}, TypeError, "k must be a floating-point tensor, got NoneType"),
        ({"q": torch.zeros(3, 7, 16)}, ValueError, r"q must have shape \(N, rows, heads, hd\), got \(3, 7, 16\)"),
        ({"v": torch.zeros(3, 8, 2, 16)}, ValueError, r"v must have q's shape, \(3, 7, 2, 16\), got \(3, 8, 2, 16\)"),
        ({"attention": "flash1"}, ValueError, "attention must be one of auto, triton, .*, got 'flash1'"),
        ({"attention": "triton"}, ValueError, "attention 'triton' is not usable: no CUDA device was found"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input(change, error, message):
    q = torch.zeros(3, 7, 2, 16)
    with pytest.raises(error, match=message):
        attention(**({"q": q, "k": q, "v": q} | change))
