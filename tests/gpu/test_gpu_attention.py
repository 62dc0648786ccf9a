"""Every attention that is installed on a GPU, against float64; lifted models with each."""

import pytest
import torch

from planecycle_fast.ops import attention
from planecycle_fast.ops.choice import Choice
from planecycle_fast.runtime import sizes_seen
from planecycle_fast.runtime.attention_table import choose_attention
from planecycle_fast.runtime.attentions import ATTENTIONS, AttentionCall, why_not_attention, why_not_for

from ..kernelcheck.attention import check_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]
SHAPES = [(64, 21, 6, 64), (32, 261, 6, 64), (4, 1029, 12, 64), (3, 77, 2, 128)]  # N, rows, heads, hd


def usable(name):
    reason = why_not_attention(name)
    if reason is not None:
        pytest.skip(reason)


def taken(name, *tensors):
    """Skips for what an attention says it does not take; any other error fails."""
    reason = why_not_for(name, *tensors)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_within_twice_the_error_of_torchs_plain_operations(name, shape, dtype):
    """Outputs and gradients, of views of a packed qkv."""
    usable(name)
    n, rows, heads, head_dim = shape
    packed = torch.randn(n, rows, 3, heads, head_dim, dtype=dtype, device="cuda")
    taken(name, *packed.unbind(2))
    assert attention(*packed.unbind(2), attention=name).is_contiguous()
    check_attention(lambda q, k, v: attention(q, k, v, attention=name), shape, dtype, "cuda")


@pytest.mark.parametrize("pixels", [256, 512])  # 261 rows of a sequence, and 1029: keys in a pass of their own
@pytest.mark.parametrize("name", ATTENTIONS)
def test_lifted_models(name, pixels):
    timm = pytest.importorskip("timm", reason="needs timm, for a model")
    import planecycle_fast as pcf

    usable(name)
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=4).cuda().bfloat16().eval()
    volume = torch.randn(1, 3, 16, pixels, pixels, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = pcf.lift(model.double(), attention="reference")(volume.double()).patches
        plain = pcf.lift(model.bfloat16(), attention="reference")(volume).patches
        taken(name, *torch.zeros(1, 8, 3, 6, 64, device="cuda", dtype=torch.bfloat16).unbind(2))
        got = pcf.lift(model, attention=name)(volume).patches
    assert (got - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 21, 69, 261, 517, 1029])
def test_what_the_table_chooses_runs(rows, dtype, backward):
    q, k, v = torch.randn(8, rows, 3, 6, 64, dtype=dtype, device="cuda", requires_grad=backward).unbind(2)
    for repeats in (False, True):
        name = choose_attention(q.device, AttentionCall.of(q, k, v), repeats).attention
        assert why_not_for(name, q, k, v) is None
        out = attention(q, k, v, attention=name)
        assert out.isfinite().all()
        if backward:
            out.sum().backward()


def test_torchs_switches_hold():
    q = torch.randn(8, 261, 6, 64, dtype=torch.bfloat16, device="cuda")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert choose_attention(q.device, AttentionCall.of(q, q, q), True, own=False).attention in ("flash3", "sdpa")
        with pytest.raises(ValueError, match="turned it off"):
            attention(q, q, q, attention="flash")


@pytest.mark.parametrize("around", ["nothing", "blocks", "the model"])
def test_training_steps_of_volumes_of_the_same_size(around):
    """The second takes cuDNN where that is here; what is checkpointed takes the same both times, or torch raises."""
    timm = pytest.importorskip("timm", reason="needs timm, for a model")
    import planecycle_fast as pcf

    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=4).cuda().bfloat16()
    model.set_grad_checkpointing(around == "blocks")
    lifted, gradients = pcf.lift(model.train()), []
    volume = torch.randn(1, 3, 16, 256, 256, device="cuda", dtype=torch.bfloat16)
    sizes_seen._seen.clear()
    for _ in range(3):
        model.zero_grad()
        if around == "the model":
            out = torch.utils.checkpoint.checkpoint(lambda x: lifted(x).patches, volume, use_reentrant=False)
        else:
            out = lifted(volume).patches
        out.float().square().mean().backward()
        gradients.append(model.patch_embed.proj.weight.grad.float().clone())
    assert (gradients[0] - gradients[2]).norm() <= 0.05 * gradients[0].norm()
    assert sizes_seen.seen_before(volume.shape) == (around != "the model")
    assert Choice.of("auto", "auto", True, volume.device, volume.shape).repeats
