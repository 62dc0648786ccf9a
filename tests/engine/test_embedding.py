"""Slices are embedded a few at a time on backend "cpu", for inference."""

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.engine import embedding
from planecycle_fast.runtime import native

from ..host_models import BY_NAME
from ..toy import PATCH, ToyAdapter, ToyViT

pytestmark = pytest.mark.skipif(not native.ready(), reason="backend 'cpu' is not usable")


@pytest.mark.parametrize(
    "name", ["timm-dinov3-s", "timm-dinov2-s", "hf-dinov2-registers", "hf-dinov3", "facebook-stand-in"]
)
@pytest.mark.parametrize("slices", [1, 2, 7])
@torch.no_grad()
def test_embedding_a_few_slices_at_a_time(monkeypatch, name, slices):
    host, calls = BY_NAME[name], []
    lifted, volume = pcf.lift(host.make(), backend="cpu"), host.volume(batch=1, depth=7)
    expected = lifted(volume)
    length = volume.shape[3] // host.patch * volume.shape[4] // host.patch
    monkeypatch.setattr(embedding, "ROWS", slices * length)
    parts = type(lifted.adapter).embed_parts
    monkeypatch.setattr(type(lifted.adapter), "embed_parts", lambda self, x: calls.append(len(x)) or parts(self, x))
    for a, b in zip(lifted(volume), expected):
        assert a is b or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert calls == {1: [1] * 7, 2: [2, 2, 2, 1], 7: [7]}[slices]


@pytest.mark.parametrize("rows", [1, 30])
@torch.no_grad()
def test_globals_that_depend_on_the_slice(monkeypatch, rows):
    """Of an adapter of one's own."""
    model, volume = ToyViT().double(), torch.randn(1, 3, 5, 3 * PATCH, 4 * PATCH, dtype=torch.float64)

    class Adapter(ToyAdapter):
        def embed(self, images):
            tokens = super().embed(images)
            tokens[:, :2] += images.mean((1, 2, 3))[:, None, None]
            return tokens

    expected = pcf.lift(model, adapter=Adapter, backend="reference")(volume)
    monkeypatch.setattr(embedding, "ROWS", rows)
    for a, b in zip(pcf.lift(model, adapter=Adapter, backend="cpu")(volume), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("why", ["a hook", "training", "reference", "gradients"])
def test_embedding_all_slices_at_once(monkeypatch, why):
    monkeypatch.setattr(embedding, "ROWS", 1)
    host, seen = BY_NAME["timm-dinov3-s"], []
    lifted = pcf.lift(host.make(), backend="reference" if why == "reference" else "cpu")
    parts = type(lifted.adapter).embed_parts
    monkeypatch.setattr(type(lifted.adapter), "embed_parts", lambda self, x: seen.append(len(x)) or parts(self, x))
    lifted.train(why == "training")
    if why == "a hook":
        lifted.patch_embed.proj.register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(why == "gradients"):
        lifted(host.volume(batch=1, depth=4))
    assert seen == [4]
