"""A thousand passes forward and backward leave nothing behind."""

import gc
import resource
import sys
import weakref

import pytest
import torch

import planecycle_fast as pcf

from ..host_models import BY_NAME

PASSES = 1000
ALLOWED = 16 * 2**20  # bytes; a pass keeps about 1 MiB alive until it ends


def live_tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("name", ["timm-dinov3-s", pytest.param("facebook-stand-in", marks=pytest.mark.full)])
def test_memory_does_not_grow(name):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make(depth=2), cycle_order=("DW", "HW")), host.volume(batch=1, depth=3)

    def passes(count):
        for _ in range(count):
            lifted.zero_grad()
            lifted(volume).patches.square().mean().backward()

    passes(50)
    tensors, peak = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passes(PASSES)
    assert live_tensors() <= tensors  # what earlier tests left may have ended meanwhile
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * unit < ALLOWED


def test_a_leak_would_be_seen():
    host, kept = BY_NAME["timm-dinov3-s"], []
    lifted = pcf.lift(host.make(depth=2))
    lifted.blocks[1].register_forward_hook(lambda m, args, out: kept.append(out))
    before = live_tensors()
    for _ in range(3):
        lifted(host.volume(batch=1, depth=3))
    assert live_tensors() >= before + 9


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2", "facebook-stand-in"])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_keeps_a_volume_or_its_features(name, grad):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.set_grad_enabled(grad):
        features = lifted(volume)
    found = [weakref.ref(volume), *[weakref.ref(t) for t in features if t is not None]]
    del volume, features
    gc.collect()
    assert not any(ref() is not None for ref in found)


def test_nothing_of_an_accelerated_model_does(build):
    model, volume = pcf.accelerate(build()), torch.randn(1, 3, 3, 20, 12)
    out = model.forward_features(volume)
    found = [weakref.ref(volume), weakref.ref(out["x_prenorm"])]
    del volume, out
    gc.collect()
    assert not any(ref() is not None for ref in found)
