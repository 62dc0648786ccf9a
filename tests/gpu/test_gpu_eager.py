"""Eager passes past torch's dispatcher on a real GPU: the bits of the registered operations, by plans and by blocks
that are repeated; other streams; no growth."""

import copy

import pytest
import torch

pytest.importorskip("timm", reason="needs timm and transformers, whose models it runs")
pytest.importorskip("transformers", reason="needs timm and transformers, whose models it runs")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]
pytest.importorskip("triton", reason="needs triton")

from planecycle_fast.engine import block as block_module
from planecycle_fast.ops.eager import EagerOp
from planecycle_fast.ops.launch_plans import LaunchPlan

from ..specs import SPECS
from .test_gpu_models import lifted_on_gpu

NAMES = ["timm-dinov3-s", "timm-dinov3-s+", "hf-dinov3", "timm-dinov2-s", "facebook-stand-in"]


def features(lifted, volume):
    with torch.no_grad():
        return [lifted(volume).patches]


def gradients(lifted, volume):
    lifted.zero_grad()
    patches = lifted(volume).patches
    patches.square().sum().backward()
    return [patches.detach(), *[p.grad for p in lifted.parameters()]]


def same(found, expected):
    return all([(a is b is None) or torch.equal(a, b) for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.opaque], ids=lambda spec: spec.op.name)
def test_plans_have_the_bits_of_the_registered_operation(spec):
    for c in (spec.typical, *spec.small):
        tensors = {name: t.cuda() for name, t in c.make(torch.float32).items()}
        settings = {name: value.to("cuda") if hasattr(value, "to") else value for name, value in c.settings.items()}
        for op, args in spec.op_arguments(tensors, settings):
            if not all([t.is_cuda for t in args if isinstance(t, torch.Tensor)]):
                continue  # angles that the case has on the CPU
            with torch.no_grad():
                expected = op.overload(*copy.deepcopy(args))
                for _ in range(3):
                    found = op(*copy.deepcopy(args))
            outs = [[out] if isinstance(out, torch.Tensor) else list(out or []) for out in (found, expected)]
            assert all([torch.equal(a, b) for a, b in zip(*outs, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["triton", "auto", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [features, gradients])
def test_repeated_blocks_have_the_bits_of_others(monkeypatch, run, name, attention, dtype):
    lifted, volume = lifted_on_gpu(name, dtype=dtype, attention=attention, strict=False)
    run(lifted, volume)  # cuDNN's attention comes with the second volume of a size
    with monkeypatch.context() as patch:
        patch.setattr(block_module, "preparation", lambda *_: None)
        patch.setattr(EagerOp, "__call__", lambda self, args: NotImplemented)
        expected = run(lifted, volume)
    for _ in range(3):
        assert same(run(lifted, volume), expected)


def test_another_stream_and_many_passes():
    lifted, volume = lifted_on_gpu()
    expected = features(lifted, volume)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [features(lifted, volume) for _ in range(3)]
    torch.cuda.synchronize()
    assert all([same(each, expected) for each in found])
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        features(lifted, volume)
    assert torch.cuda.memory_allocated() == before


def test_profilers_see_launches():
    """With a hook on launches triton launches by itself."""
    from triton import knobs

    lifted, volume = lifted_on_gpu(attention="triton")
    expected, seen = features(lifted, volume), []
    features(lifted, volume)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        assert same(features(lifted, volume), expected)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) >= 3 * len(lifted.blocks)


def test_operations_are_planned():
    from planecycle_fast.ops.registration import OPS

    lifted, volume = lifted_on_gpu(attention="triton")
    for _ in range(2):
        gradients(lifted, volume)
    for name in ("add_norm", "add_norm_backward", "self_attention", "self_attention_backward"):
        assert any([isinstance(plan, LaunchPlan) for plan in OPS[name].eager._plans.values()])
