"""Captum on a lifted model: the layer is `LiftedModel.tap`, the input a volume."""

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME, GRID

pytest.importorskip("captum", reason="needs captum, extra integrations")
from captum.attr import IntegratedGradients, LayerActivation, LayerGradCam, LayerIntegratedGradients

VOLUME = dict(batch=2, depth=3)


class Classifier(nn.Module):
    def __init__(self, host):
        super().__init__()
        self.lifted = pcf.lift(host.make(**({"num_hidden_layers": 3} if host.name.startswith("hf") else {"depth": 3})))
        self.head = nn.Linear(64, 4)

    def forward(self, volume):
        return self.head(self.lifted(volume).patches.mean((1, 2, 3)))


@pytest.fixture(params=["timm-dinov3-s", "hf-dinov2"])
def built(request):
    host = BY_NAME[request.param]
    return Classifier(host), host.volume(**VOLUME)


def test_layer_activation(built):
    model, volume = built
    maps = LayerActivation(model, model.lifted.tap(1)).attribute(volume)
    with torch.no_grad():
        [wanted] = model.lifted.intermediate(volume, [1], norm=False)
    torch.testing.assert_close(maps, wanted.maps, rtol=1e-4, atol=1e-4)
    assert not model.lifted.tap(1)._forward_hooks


@pytest.mark.parametrize("layer", [0, -1])
def test_layer_grad_cam(built, layer):
    model, volume = built
    found = LayerGradCam(model, model.lifted.tap(layer)).attribute(volume, target=torch.tensor([1, 3]))
    assert found.shape == (2, 1, 3, *GRID)
    kept = []
    handle = model.lifted.tap(layer).register_forward_hook(lambda tap, args, maps: kept.append(maps))
    scores = model(volume)
    handle.remove()
    [gradients] = torch.autograd.grad(scores[0, 1] + scores[1, 3], kept)
    wanted = (gradients.mean((2, 3, 4), keepdim=True) * kept[0]).sum(1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert found.abs().max() > 0


def test_integrated_gradients_of_a_layer_and_of_the_volume(built):
    """Completeness, for as many steps as a test may take: attributions add up to the difference of the scores."""
    model, volume = built
    model.eval().double()
    volume = 0.1 * volume.double()
    with torch.no_grad():
        difference = (model(volume) - model(torch.zeros_like(volume)))[:, 2]
    methods = (IntegratedGradients(model), LayerIntegratedGradients(model, model.lifted.tap(1)))
    for method, shape in zip(methods, [volume.shape, (2, 64, 3, *GRID)]):
        found = method.attribute(volume, target=2, n_steps=24, internal_batch_size=8)
        assert found.shape == shape
        torch.testing.assert_close(found.sum((1, 2, 3, 4)), difference, rtol=0.2, atol=0.02)
