"""The reference on a GPU: the same results, and a clear error for a volume elsewhere."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm and transformers, whose models it compares with")
pytest.importorskip("transformers", reason="needs timm and transformers, whose models it compares with")

import planecycle_fast as pcf
from planecycle_fast.scans import extraction as extract

from ..host_models import BY_NAME, HOSTS
from ..toy import PATCH, ToyViT, toy_lift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("globals_at", ["depth", "plane"])
@pytest.mark.parametrize("mode", ["planecycle", "slice2d", "flatten3d"])
def test_cuda_equals_cpu(mode, globals_at, pool_method):
    model = ToyViT().double()
    volume = torch.randn(2, 3, 5, 3 * PATCH, 4 * PATCH, dtype=torch.float64)
    lifted = toy_lift(model, mode=mode, globals_at=globals_at, pool_method=pool_method)
    expected = lifted(volume)
    got = lifted.cuda()(volume.cuda())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_slice2d_is_the_2d_model_on_cuda(host):
    model, volume = host.make().cuda(), host.volume().cuda()
    with torch.no_grad():
        got = pcf.lift(model, mode="slice2d")(volume).patches.flatten(2, 3)
        tokens = host.tokens(model, volume.transpose(1, 2).flatten(0, 1))[:, host.num_globals :]
    torch.testing.assert_close(got.flatten(0, 1), tokens, rtol=0, atol=1e-4)


def test_a_volume_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="volume must be on the model's device, cuda:0, got cpu"):
        toy_lift(ToyViT()).cuda()(torch.zeros(1, 3, 2, 4, 6))


@pytest.mark.parametrize("block_type", ["PlaneCycle", "Slice2D", "Flatten3D"])
def test_accelerated_models_on_cuda_are_those_of_the_cpu(build, block_type):
    model, volume = build(block_type).double(), torch.randn(2, 3, 3, 20, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = model(volume)
        got = pcf.accelerate(model.cuda())(volume.cuda())
    for name in ("x_norm_patchtokens", "x_norm_clstoken", "x_storage_tokens", "x_prenorm"):
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=0, atol=1e-5)  # RoPE tables are float32


def test_features_are_computed_on_cuda_where_there_is_one():
    assert extract.usable_device("auto").type == "cuda"
    lifted = pcf.lift(BY_NAME["hf-dinov3"].make().cuda())
    _, tensors = extract.compute(lifted, torch.randn(1, 3, 3, 48, 80))
    assert tensors["patches"].device.type == "cpu" and tensors["patches"].shape == (1, 3, 3, 5, 64)
