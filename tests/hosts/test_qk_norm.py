"""The part that CONTRIBUTING shows how to add, norms of queries and keys: timm's ViTs with and without RoPE."""

import pytest
import timm
import torch
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME, randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "qk_norm": True}
RMS = {"norm_layer": lambda width, **place: nn.RMSNorm(width, eps=1e-6, **place)}
HOSTS = {
    "ViT": lambda: timm.models.VisionTransformer(**SMALL),
    "ViT, RMSNorm": lambda: timm.models.VisionTransformer(**SMALL, **RMS),
    "Eva": lambda: BY_NAME["timm-dinov3-s"].build(qk_norm=True),
}
VOLUME = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(name):
    model = HOSTS[name]().eval()
    randomise(model)
    for block in model.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            nn.init.normal_(norm.weight, 1.0, 0.5)
    return model


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", HOSTS)
def test_it_is_the_models_own(name, backend):
    """slice2d equals the 2D model; attention runs by operations, and no block goes to csrc as if it had no norms."""
    if pcf.backends()[backend] is not None:
        pytest.skip(f"backend {backend!r} is not usable: {pcf.backends()[backend]}")
    model = make(name)
    lifted = pcf.lift(model, mode="slice2d", backend=backend)
    with torch.no_grad():
        found = lifted(VOLUME).patches.flatten(0, 1).flatten(1, 2)
        expected = model.forward_features(VOLUME.transpose(1, 2).flatten(0, 1))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(found, expected)
    assert all(block.kept == {} and block.packed is None for block in lifted.descriptions())


@pytest.mark.parametrize("name", HOSTS)
def test_volumes_gradients_and_hooks(name):
    """Along all planes as the model's own attention computes them; a hook on a norm makes it run."""
    model = make(name)
    lifted = pcf.lift(model, strict=False)
    wanted = [p for n, p in model.named_parameters() if "q_norm" in n or "qkv" in n]

    def run():
        found = lifted(VOLUME).patches
        return found, torch.autograd.grad(found.square().sum(), wanted, allow_unused=True)

    (found, grads), calls = run(), []
    handles = [block.attn.q_norm.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    assert all("it has hooks" in block.kept["attention"] for block in lifted.descriptions())
    expected, theirs = run()
    assert len(calls) == len(handles)
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (lifted(VOLUME).patches - found).abs().max() < 0.1 * found.abs().max()


def test_unknown_norms_run_in_the_model():
    model = make("ViT")
    model.blocks[1].attn.k_norm = nn.Sequential(model.blocks[1].attn.k_norm)
    kept = [block.kept for block in pcf.lift(model).descriptions()]
    assert kept[::2] == [{}, {}] and "norm of queries or keys: torch.Sequential" in kept[1]["attention"]
