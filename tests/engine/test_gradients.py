"""Gradients of lifted models."""

import pytest
import torch

from ..toy import ToyViT, toy_lift


@pytest.mark.parametrize("globals_at", ["depth", "plane"])
@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("mode", ["planecycle", "slice2d", "flatten3d"])
def test_gradcheck_of_a_tiny_vit(mode, pool_method, globals_at):
    model = ToyViT(num_globals=2, depth=3, heads=1, head_dim=16, patch=1).double()
    for block in model.blocks:  # fewer entries to differentiate numerically
        block.fc1, block.fc2 = torch.nn.Linear(16, 2).double(), torch.nn.Linear(2, 16).double()
    settings = dict(cycle_order=("DW", "HW", "DH"), pool_method=pool_method, globals_at=globals_at)
    lifted = toy_lift(model, mode=mode, **settings)
    volume = torch.randn(1, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    block = model.blocks[1]
    parameters = (model.tokens, model.stem.weight, block.ls1, block.qkv.bias, block.norm1.weight, model.norm.bias)

    def call(volume, *_):  # gradcheck moves the parameters in place
        features = lifted(volume)
        return features.patches, features.cls, features.registers

    assert torch.autograd.gradcheck(call, (volume, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(call, (volume, model.tokens))


def test_no_gradient_is_lost_or_shared_between_volumes():
    model = ToyViT().double()
    lifted = toy_lift(model)
    volume = torch.randn(3, 3, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    lifted(volume).patches[1].sum().backward()
    assert volume.grad[1].abs().min() > 0
    assert not volume.grad[0].any() and not volume.grad[2].any()
    assert all(p.grad is not None for p in model.parameters())
