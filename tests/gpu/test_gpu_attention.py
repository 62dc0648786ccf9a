"""Every attention that is installed on a GPU, against float64; lifted models with each."""

import pytest
import torch

from planecycle_fast.ops import attention
from planecycle_fast.runtime.attentions import ATTENTIONS, why_not_attention, why_not_for

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
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name not in ("auto", "triton")])
def test_within_twice_the_error_of_torchs_plain_operations(name, shape, dtype):
    """Outputs and gradients, of views of a packed qkv."""
    usable(name)
    n, rows, heads, head_dim = shape
    packed = torch.randn(n, rows, 3, heads, head_dim, dtype=dtype, device="cuda")
    taken(name, *packed.unbind(2))
    assert attention(*packed.unbind(2), attention=name).is_contiguous()
    check_attention(lambda q, k, v: attention(q, k, v, attention=name), shape, dtype, "cuda")


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name not in ("auto", "triton")])
def test_lifted_models(name):
    timm = pytest.importorskip("timm", reason="needs timm, for a model")
    import planecycle_fast as pcf

    usable(name)
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=4).cuda().bfloat16().eval()
    volume = torch.randn(1, 3, 16, 256, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = pcf.lift(model.double(), attention="reference")(volume.double()).patches
        plain = pcf.lift(model.bfloat16(), attention="reference")(volume).patches
        taken(name, *torch.zeros(1, 8, 3, 6, 64, device="cuda", dtype=torch.bfloat16).unbind(2))
        got = pcf.lift(model, attention=name)(volume).patches
    assert (got - exact).abs().mean() <= 2 * (plain - exact).abs().mean()
