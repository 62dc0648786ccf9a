"""The example in `Adapter`'s docstring runs as it stands."""

import inspect
import textwrap

import torch

import planecycle_fast as pcf

from .toy import ToyAdapter, ToyViT


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
