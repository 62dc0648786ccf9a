"""Buffers that a host computes are what its configuration gives, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import planecycle_fast as pcf
from planecycle_fast.hosts.buffers import Computed

from ..host_models import BY_NAME, EVERY_HOST
from ..toy import ToyAdapter, ToyViT

MORE = [
    pytest.param(name, marks=pytest.mark.full) for name in ("hf-siglip", "timm-pe", "timm-beitv2", "hf-dinov3-backbone")
]
NAMES = [
    "hf-dinov3",
    "timm-dinov3-s",
    "facebook-stand-in",
    "timm-eva02-s",
    "timm-eva02-b",
    "timm-beit",
    "hf-clip",
    *MORE,
]


@pytest.mark.parametrize("host", EVERY_HOST)
@torch.no_grad()
def test_buffers_of_every_host_are_what_they_should_be(host):
    """Also where a model has been rounded to 16 bits, and back."""
    for change in (lambda m: m, lambda m: m.bfloat16().float(), lambda m: m.half().float(), lambda m: m.double()):
        model = change(host.make())
        found = pcf.lift(model).adapter.computed_buffers()
        assert [each.why_not() for each in found] == [None] * len(found)
        buffers = {id(b) for b in model.buffers()}
        assert all(id(getattr(each.module, each.name)) in buffers for each in found)


def spoiled(t, how):
    if how == "memory":
        return torch.full_like(t, 7)
    if how == "a factor":
        return t * 2 + (0 if t.is_floating_point() else 1)
    return torch.full_like(t, how) if t.is_floating_point() else t.flip(0) if len(t) > 1 else t.flip(1)


@pytest.mark.parametrize("how", ["memory", "a factor", float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_other_values_are_refused_by_name(name, how):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1, depth=2)
    lifted(volume)
    for each in lifted.adapter.computed_buffers():
        buffer = getattr(each.module, each.name)
        kept, path = buffer.clone(), next(n for n, b in pcf.unlift(lifted).named_buffers() if b is buffer)
        buffer.copy_(spoiled(buffer, how))
        for model in (lifted, pcf.lift(pcf.unlift(lifted)), copy.deepcopy(lifted)):
            with pytest.raises(ValueError, match=f"{path} (has other values|must be finite).*got .*: a buffer that"):
                model(volume)
        buffer.copy_(kept)
        lifted(volume)


@torch.no_grad()
def test_buffers_are_checked_once(monkeypatch):
    calls, why_not = [], Computed.why_not
    monkeypatch.setattr(Computed, "why_not", lambda self: calls.append(self.name) or why_not(self))
    host = BY_NAME["hf-dinov3"]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1, depth=2)
    lifted(volume), lifted(volume), lifted.intermediate(volume, 2)
    assert calls == ["inv_freq"]
    lifted.rope_embeddings.inv_freq = lifted.rope_embeddings.inv_freq.clone()
    lifted(volume), lifted(volume)
    assert calls == ["inv_freq"] * 2


@torch.no_grad()
def test_buffers_without_data_are_not_read():
    host = BY_NAME["timm-dinov3-s"]
    lifted = pcf.lift(host.make(depth=2)).to("meta")
    assert lifted(host.volume().to("meta")).patches.device.type == "meta"
    fresh = pcf.lift(host.make(depth=2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh(torch.randn(1, 3, 2, 16, 32))
    lifted = lifted.to_empty(device="cpu")
    lifted.load_state_dict(host.make(depth=2).state_dict())
    lifted.rope.periods.fill_(3)
    with pytest.raises(ValueError, match="rope.periods has other values"):
        lifted(host.volume())
    for module in lifted.modules():  # as frameworks do after to_empty
        if hasattr(module, "reset_parameters") and hasattr(module, "periods"):
            module.reset_parameters()
    if hasattr(lifted.rope, "reset_parameters"):  # not in older timm
        lifted(host.volume())


def test_other_buffers_must_be_finite():
    model = ToyViT(rope=False)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model.register_buffer("min_val", torch.tensor(torch.inf))  # as of an observer that has seen nothing
    model.blocks[1].register_buffer("mean", torch.tensor([0.0, torch.nan]))
    volume = torch.randn(1, 3, 2, 4, 6)
    with pytest.raises(ValueError, match=r"blocks.1.mean must be finite, got 0, nan: a buffer"):
        pcf.lift(model, adapter=ToyAdapter)(volume)
    model.blocks[1].mean = torch.zeros(2)
    pcf.lift(model, adapter=ToyAdapter)(volume)


def test_learned_frequencies_are_free():
    host = BY_NAME["timm-rope-mixed"]
    model = host.make()
    with torch.no_grad():
        model.rope.freqs.mul_(3)
        pcf.lift(model)(host.volume())
    assert isinstance(model.rope.freqs, nn.Parameter)
