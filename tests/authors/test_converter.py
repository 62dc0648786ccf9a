"""`PlaneCycleConverter`: the authors' arguments, keys, call and restore; stock dinov3 models too."""

import copy
import pickle

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from .. import peers, standins
from ..host_models import BY_NAME
from .test_accelerate import assert_same
from .test_accelerate_refused import Overriding

SOURCES = ["stand-in", pytest.param("authors", marks=peers.needs_planecycle)]
VOLUME = (2, 3, 3, 20, 12)


@pytest.fixture(params=SOURCES)
def code(request):
    """(a function that makes an unconverted model, the converter of the same source)"""
    if request.param == "stand-in":
        return lambda: standins.DinoVisionTransformer("PlaneCycle").eval(), standins.Converter
    model_class, converter = peers.authors()
    small = dict(embed_dim=64, num_heads=2, depth=5, patch_size=4, n_storage_tokens=4, pos_embed_rope_dtype="fp32")
    return lambda: peers.randomise(model_class(layerscale_init=0.3, **small)).eval(), converter


@pytest.mark.parametrize("keep_original", [False, True])
def test_keys_and_outputs_are_the_authors(code, keep_original):
    make, converter = code
    model, volume = make(), torch.randn(VOLUME)
    settings = dict(cycle_order=("DW", "HW", "DH"), pool_method="PCm", keep_original=keep_original)
    theirs = converter(**settings)(copy.deepcopy(model))
    ours = pcf.PlaneCycleConverter(**settings)(model)
    assert ours is model and type(ours) is type(theirs)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    assert "blocks.4.blk2d.attn.qkv.weight" in ours.state_dict()
    assert_same(ours(volume), theirs(volume))
    assert_same(pcf.restore(ours)(volume), theirs(volume))  # one block after another


def test_checkpoints_pass_between_the_two_converters(code):
    make, converter = code
    theirs, ours, volume = converter()(make()), pcf.PlaneCycleConverter()(make()), torch.randn(VOLUME)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours(volume), theirs(volume))


def test_restore_gives_the_original_back(code):
    make, _ = code
    model = make()
    before, keys, blocks = dict(model.__dict__), list(model.state_dict()), model.blocks
    converter = pcf.PlaneCycleConverter(keep_original=True)
    assert converter.restore(converter(model)) is model
    assert model.blocks is blocks and sorted(model.state_dict()) == sorted(keys)
    assert model.__dict__.keys() == before.keys()
    for error in (ValueError, RuntimeError):  # theirs is a RuntimeError
        with pytest.raises(error, match="keep_original=True to be restored, got one without _blocks_original"):
            converter.restore(model)
    with pytest.raises(TypeError, match="backbone must be a torch.nn.Module, got str"):
        converter.restore("model")
    converter(model)  # and once more


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_stock_models_take_volumes(pool_method):
    model, volume = standins.DinoVisionTransformer(untie_cls_and_patch_norms=True).eval(), torch.randn(VOLUME)
    kind, settings = type(model), dict(cycle_order=("HW", "DH"), pool_method=pool_method)
    lifted = pcf.lift(copy.deepcopy(model), **settings)
    expected = lifted(volume)
    converter = pcf.PlaneCycleConverter(keep_original=True, **settings)
    converted = converter(model)
    assert type(converted) is kind
    out = converted.forward_features(volume)
    assert_same(out["x_norm_patchtokens"], expected.patches.flatten(2, 3).flatten(0, 1))
    assert_same(out["x_norm_clstoken"], expected.cls.flatten(0, 1))
    assert_same(out["x_storage_tokens"], expected.registers.flatten(0, 1))
    assert_same(converted(volume), out["x_norm_clstoken"])  # the stock default
    assert_same(converted(volume, is_training=True), out)
    for norm in (True, False):
        maps = converted.get_intermediate_layers(volume, n=[1, 4], reshape=True, norm=norm)
        for got, features in zip(maps, lifted.intermediate(volume, [1, 4], norm=norm), strict=True):
            assert_same(got, features.patches.permute(0, 4, 1, 2, 3))
    masks = torch.rand(6, 15) < 0.5
    assert not torch.allclose(converted.forward_features(volume, masks)["x_prenorm"], out["x_prenorm"])
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, D, height, width\), got \(2, 3, 20, 12\)"):
        converted(torch.randn(2, 3, 20, 12))
    with pytest.raises(ValueError, match="model must be of the authors' code, got a stock dinov3 model"):
        pcf.restore(converted)
    images = volume.transpose(1, 2).flatten(0, 1)
    assert converter.restore(converted)(images).shape == (6, 64)


def test_converted_models_are_not_lifted():
    with pytest.raises(
        ValueError, match="model has blocks that a PlaneCycleConverter wrapped; use planecycle_fast.acc"
    ):
        pcf.lift(pcf.PlaneCycleConverter()(standins.DinoVisionTransformer()))


def test_converted_models_copy_and_pickle():
    volume = torch.randn(VOLUME)
    model = pcf.PlaneCycleConverter()(standins.DinoVisionTransformer().eval())
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(each(volume), model(volume), 0)
        assert each.blocks[0].rope_embed is each.rope_embed  # still shared


def modes(model):
    return {name.replace(".blk2d", ""): module.training for name, module in model.named_modules()}


def test_training_modes_are_kept_also_of_frozen_parts(code):
    make, _ = code
    for training in (True, False):
        model = make().train(training)
        for part in (model.blocks[0], model.rope_embed, model.blocks[2].mlp):
            part.train(not training)
        before = modes(model)
        assert modes(pcf.PlaneCycleConverter()(model)).items() >= before.items()


class Backbone(nn.Module):
    """Neither DINOv3 nor anything known: it only keeps the converter's contract."""

    def __init__(self, n_storage_tokens):
        super().__init__()
        if n_storage_tokens:
            self.n_storage_tokens = n_storage_tokens
        self.layers = nn.ModuleList([standins.SelfAttentionBlock(16, 2, False, False, 0) for _ in range(4)])

    def forward(self, x, shape):
        for layer in self.layers:
            x = layer(x, shape)
        return x


@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_any_backbone_that_calls_blocks_with_a_shape(pool_method, registers):
    backbone, shape = Backbone(registers), (2, 3, 4, 5, 16)
    x = torch.randn(6, 1 + registers + 20, 16)
    expected = x
    for i, layer in enumerate(backbone.layers):
        block = standins.PlaneCycleBlock(layer, None, 1 + registers, i, ("DW", "DH", "HW"), pool_method)
        expected = block(expected, shape)
    converter = pcf.PlaneCycleConverter(blocks_attr="layers", cycle_order="DW,DH,HW", pool_method=pool_method)
    assert_same(converter(backbone)(x, shape), expected)


def converted():
    return pcf.PlaneCycleConverter()(standins.DinoVisionTransformer())


class NoBlocks(nn.Module):
    blocks = None


REFUSED = {
    "no module": (lambda: "model", {}, TypeError, "backbone must be a torch.nn.Module, got str"),
    "timm": (BY_NAME["timm-dinov3-s"].make, {}, ValueError, "got a Eva; use planecycle_fast.lift"),
    "hf": (BY_NAME["hf-dinov3"].make, {"blocks_attr": "layer"}, ValueError, "DINOv3ViTModel; use planecycle_fast.lift"),
    "converted": (converted, {}, ValueError, "must not be converted yet, got blocks of class PlaneCycleBlock"),
    "Slice2D": (
        lambda: standins.DinoVisionTransformer("Slice2D"),
        {},
        ValueError,
        "must have block_type 'PlaneCycle', got 'Slice2D'",
    ),
    "attribute": (lambda: nn.Linear(1, 1), {}, ValueError, "must have the attribute 'blocks', got a Linear without it"),
    "overriding": (
        lambda: Overriding("PlaneCycle"),
        {"keep_original": True},
        ValueError,
        "got one that is overridden",
    ),
    "none": (NoBlocks, {}, ValueError, "must have the attribute 'blocks', got a NoBlocks without it"),
    "no list": (
        lambda: nn.Sequential(nn.Linear(1, 1)),
        {"blocks_attr": "0"},
        TypeError,
        "must be a ModuleList, got Linear",
    ),
    "empty": (lambda: nn.Sequential(nn.ModuleList()), {"blocks_attr": "0"}, ValueError, "got an empty ModuleList"),
    "other attribute": (
        standins.DinoVisionTransformer,
        {"blocks_attr": "layers"},
        ValueError,
        "blocks_attr must be 'blocks' for a DinoVisionTransformer, got 'layers'",
    ),
    "DHW": (None, {"cycle_order": ("HW", "DHW")}, ValueError, "cycle_order must name planes HW, DW, DH, got"),
    "plane": (None, {"cycle_order": ("HW", "WH")}, ValueError, r"cycle_order\[1\] must be one of .* got 'WH'"),
    "pooling": (None, {"pool_method": "max"}, ValueError, "pool_method must be one of PCg, PCm, got 'max'"),
    "keep": (None, {"keep_original": "no"}, TypeError, "keep_original must be True or False, got 'no'"),
    "name": (None, {"blocks_attr": 3}, TypeError, "blocks_attr must be the name of an attribute, got int"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    make, settings, error, message = REFUSED[kind]
    model = make() if make else None
    before = copy.copy(model.__dict__) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        pcf.PlaneCycleConverter(**settings)(model)
    assert before is None or model.__dict__ == before
