"""torch.compile takes a lifted model as one graph and changes nothing."""

import pytest
import torch

import planecycle_fast as pcf

from .hosts import BY_NAME

ONE_GRAPH = ["hf-dinov3", "hf-dinov2", "timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov2-s-reg4", "facebook-stand-in"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_forward(name):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make()), host.volume()
    compiled = torch.compile(lifted, backend="eager", fullgraph=True)
    with torch.no_grad():
        for got, expected in zip(compiled(volume), lifted(volume)):
            assert got is expected is None or torch.equal(got, expected)


def test_blocks_that_are_compiled_already():
    host = BY_NAME["timm-dinov3-s-qkvb"]
    model, volume = host.make(), host.volume()
    with torch.no_grad():
        expected = pcf.lift(model)(volume).patches
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")
        assert torch.equal(pcf.lift(model)(volume).patches, expected)


def test_gradients():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), pool_method="PCm"), host.volume()

    def gradients(model):
        lifted.zero_grad()
        features = model(volume)
        (features.patches.square().mean() + features.pooled().square().mean()).backward()
        return {name: p.grad for name, p in lifted.named_parameters()}

    expected = gradients(lifted)
    got = gradients(torch.compile(lifted, backend="aot_eager", fullgraph=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_a_compiled_model_follows_use_backend():
    host = BY_NAME["hf-dinov2"]
    compiled = torch.compile(pcf.lift(host.make()), backend="eager")
    with torch.no_grad():
        compiled(host.volume())
        with pcf.use_backend("reference"):
            compiled(host.volume())
        with pytest.raises(ValueError, match="backend 'triton' is not usable"), pcf.use_backend("triton"):
            compiled(host.volume())
