"""The examples of adapting a model of one's own, in `Adapter`'s docstring and in docs/lifting.md, run as they stand."""

import inspect
import textwrap

import timm
import torch

import planecycle_fast as pcf

from ..pages import block_with
from ..toy import ToyAdapter, ToyViT


def test_the_docstrings_adapter_lifts_a_model():
    text = inspect.getdoc(pcf.Adapter)
    code = textwrap.dedent(text[text.index("    class MyViT") :])
    model = ToyViT(num_globals=1, rope=False, patch=16).double()
    names = {"pcf": pcf, "model": model}
    exec(code, names)
    volume = torch.randn(1, 3, 3, 32, 48, dtype=torch.float64)
    expected = pcf.lift(model, adapter=ToyAdapter)(volume)
    got = names["lifted"](volume)
    assert torch.equal(got.patches, expected.patches) and torch.equal(got.cls, expected.cls)


def test_the_adapter_in_docs_works(monkeypatch):
    code = block_with("pcf.Adapter")
    assert len(code.splitlines()) < 40
    create = timm.create_model

    def without_weights(name, pretrained, **settings):
        return create(name, pretrained=False, depth=3, embed_dim=96, num_heads=2, **settings)

    monkeypatch.setattr(timm, "create_model", without_weights)
    names = {"volume": torch.randn(2, 3, 3, 48, 80)}
    with torch.no_grad():
        exec(code, names)
        features, model, volume = names["features"], names["model"], names["volume"]
        assert features.patches.shape == (2, 3, 3, 5, 512) and features.cls.shape == (2, 3, 512)
        expected = model.head(model.forward_features(volume[:, :, 1]))
        slices = pcf.lift(model, mode="slice2d", adapter=names["ClipInTextSpace"])(volume)
        assert torch.equal(slices.patches[:, 1].flatten(1, 2), expected[:, 1:])
        torch.testing.assert_close(slices.cls[:, 1], model(volume[:, :, 1]))  # CLIP's image vector
