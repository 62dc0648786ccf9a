"""What `accelerate` and accelerated models refuse."""

import pytest
import torch

import planecycle_fast as pcf

from .. import standins
from .test_accelerate import VOLUME


class Overriding(standins.DinoVisionTransformer):
    def forward_features_list(self, x_list, masks_list):
        return super().forward_features_list(x_list, masks_list)


class HalfOverriding(standins.DinoVisionTransformer):
    def _get_intermediate_layers_not_chunked(self, x, n):
        raise NotImplementedError


def cycling(plane):
    return standins.Converter(cycle_order=("HW", plane))(standins.DinoVisionTransformer("PlaneCycle"))


def patched():
    model = standins.DinoVisionTransformer("Slice2D")
    model.get_intermediate_layers = lambda x: x
    return model


def broken(block_type):
    model = standins.DinoVisionTransformer("Slice2D")
    model.block_type = block_type
    return model


def converted_slice2d():
    model = standins.Converter()(standins.DinoVisionTransformer("PlaneCycle"))
    model.block_type = "Slice2D"
    return model


REFUSED = {
    "no module": (lambda: "model", TypeError, "model must be a torch.nn.Module, got str"),
    "another class": (lambda: torch.nn.Linear(2, 2), ValueError, "got a Linear; use planecycle_fast.lift"),
    "stock": (standins.DinoVisionTransformer, ValueError, "must take volumes, got a stock DinoVisionTransformer"),
    "not converted": (
        lambda: standins.DinoVisionTransformer("PlaneCycle"),
        ValueError,
        "got 'PlaneCycle' with blocks that no PlaneCycleConverter wrapped",
    ),
    "converted Slice2D": (converted_slice2d, ValueError, "got 'Slice2D' with converted blocks"),
    "block type": (lambda: broken("Cube"), ValueError, "block_type must be one of .*, got 'Cube'"),
    "a plane of lift": (lambda: cycling("DHW"), ValueError, "cycle_order of planes HW, DW, DH, got 'DHW' for block 1"),
    "no plane": (lambda: cycling("dw"), ValueError, "cycle_order of planes HW, DW, DH, got 'dw' for block 1"),
    "half overriding": (lambda: HalfOverriding("Slice2D"), ValueError, "the _get_intermediate_layers_not_chunked of"),
    "subclass": (lambda: Overriding("Slice2D"), ValueError, "the forward_features_list of DinoVisionTransformer, got"),
    "patched": (
        patched,
        ValueError,
        "the get_intermediate_layers of DinoVisionTransformer, got one that",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    make, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        pcf.accelerate(make())


def test_bad_arguments(build):
    model, before = build(), dict(build().__dict__)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*, got 'gpu'"):
        pcf.accelerate(model, backend="gpu")
    with pytest.raises(ValueError, match="attention must be one of .*, got 'slow'"):
        pcf.accelerate(model, attention="slow")
    assert model.__dict__.keys() == before.keys()
    pcf.accelerate(model)
    for x, error, message in (
        (torch.randn(2, 3, 20, 12), ValueError, r"x must have shape \(B, 3, D, height, width\), got \(2, 3, 20, 12\)"),
        (torch.randn(2, 1, 3, 20, 12), ValueError, "repeat the one channel of a scan to three"),
        (torch.randn(VOLUME).tolist(), TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(VOLUME, dtype=torch.int64), TypeError, "x must have a floating-point dtype, got torch.int64"),
        (torch.randn(VOLUME).double(), ValueError, "x must have the model's dtype, torch.float32, got torch.float64"),
        (torch.randn(2, 3, 0, 20, 12), ValueError, "x must not be empty"),
        (torch.randn(2, 3, 3, 20, 3), ValueError, "x must have slices of at least one patch, 4 x 4 pixels"),
    ):
        with pytest.raises(error, match=message):
            model.get_intermediate_layers(x)
        if isinstance(x, torch.Tensor):
            with pytest.raises(error, match=message):
                model(x)
    volume = torch.randn(VOLUME)
    for n, message in (([7], "n must hold indices of the model's 5 layers"), ([1, 1], "n must not list a layer twice")):
        with pytest.raises(ValueError, match=message):
            model.get_intermediate_layers(volume, n=n)
    for masks in (torch.ones(6, 15), torch.ones(2, 45, dtype=torch.bool), [True]):
        with pytest.raises(ValueError, match=r"masks must be a bool tensor of shape \(6, 15\), got"):
            model(volume, masks=masks)
    for volumes, masks in (([volume] * 2, [None]), ([volume], None), ([], [])):
        with pytest.raises(ValueError, match="masks must (hold one mask|be lists of equal length)"):
            model.forward_features(volumes, masks)
