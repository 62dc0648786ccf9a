"""Parity with the authors' code and with facebookresearch/dinov3: outputs and all gradients, within 2e-5 in float32."""

import copy

import pytest
import torch

import planecycle_fast as pcf

from .. import peers

TOLERANCE = 2e-5
NUM_MODELS = 34  # of each kind


def run(model, volume, call, seed=5):
    """Outputs of call(model, volume), and the gradients of a loss that weighs every element differently."""
    model.zero_grad()
    volume = volume.clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = [t for t in call(model, volume) if t is not None and t.numel()]
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() / t.numel() ** 0.5 for t in outputs)
    loss.backward()
    return outputs, {"volume": volume.grad} | {name: p.grad for name, p in model.named_parameters()}


def worst(got, expected):
    """The largest difference, of tensors that must exist in both."""
    differences = [0.0]
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            assert a.isfinite().all()
            differences.append(float((a - b).detach().abs().max()))
    return max(differences)


def assert_parity(record, got, expected):
    differences = worst(got[0], expected[0]), worst(got[1].values(), expected[1].values())
    record("output", differences[0])
    record("gradient", differences[1])
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("seed", range(NUM_MODELS))
@pytest.mark.parametrize("block_type", ["PlaneCycle", "Slice2D", "Flatten3D"])
@peers.needs_planecycle
def test_accelerated_is_the_authors_code(record_property, block_type, seed):
    model_class, converter = peers.authors()
    settings, conversion, size = peers.random_settings(seed, block_type)
    torch.manual_seed(seed)
    model, volume = peers.randomise(model_class(block_type=block_type, **settings)), torch.randn(2, 3, *size)
    if block_type == "PlaneCycle":
        model = converter(**conversion)(model)
    model.train(seed % 2 == 1)
    fast = pcf.accelerate(copy.deepcopy(model))
    expected = run(model, volume, lambda m, v: m(v).values())
    assert_parity(record_property, run(fast, volume, lambda m, v: m(v).values()), expected)


@pytest.mark.parametrize("seed", range(NUM_MODELS))
@peers.needs_planecycle
def test_our_converter_is_the_authors(record_property, seed):
    model_class, converter = peers.authors()
    settings, conversion, size = peers.random_settings(100 + seed)
    torch.manual_seed(seed)
    model, volume = peers.randomise(model_class(**settings)), torch.randn(2, 3, *size)
    model.train(seed % 2 == 1)
    expected = run(converter(**conversion)(copy.deepcopy(model)), volume, lambda m, v: m(v).values())
    ours = pcf.PlaneCycleConverter(**conversion)(model)
    assert_parity(record_property, run(ours, volume, lambda m, v: m(v).values()), expected)


def canonical(features):
    """What the authors' dictionary holds under the final norm, of VolumeFeatures."""
    registers = None if features.registers is None else features.registers.flatten(0, 1)
    return features.patches.flatten(2, 3).flatten(0, 1), features.cls.flatten(0, 1), registers


def of_dictionary(out):
    return out["x_norm_patchtokens"].flatten(0, 1), out["x_norm_clstoken"], out["x_storage_tokens"]


MODES = {"PlaneCycle": "planecycle", "Slice2D": "slice2d", "Flatten3D": "flatten3d"}


@pytest.mark.parametrize("seed", range(NUM_MODELS))
@pytest.mark.parametrize("block_type", MODES)
@peers.needs_planecycle
@peers.needs_dinov3
def test_lifted_dinov3_is_the_authors_code(record_property, block_type, seed):
    """The same weights: facebook's model, lifted, and the authors' model, converted where need be."""
    model_class, converter = peers.authors()
    settings, conversion, size = peers.random_settings(200 + seed, block_type)
    torch.manual_seed(seed)
    theirs, volume = peers.randomise(model_class(block_type=block_type, **settings)), torch.randn(2, 3, *size)
    stock = peers.dinov3()[0](**settings)
    stock.init_weights()
    stock.load_state_dict(theirs.state_dict(), strict=block_type != "Flatten3D")
    lifted = pcf.lift(stock, mode=MODES[block_type], **(conversion if block_type == "PlaneCycle" else {}))
    same = pcf.lift(copy.deepcopy(theirs), mode=MODES[block_type], **(conversion if block_type == "PlaneCycle" else {}))
    if block_type == "PlaneCycle":
        theirs = converter(**conversion)(theirs)
    for model in (stock, theirs, same):
        model.train(seed % 2 == 1)

    def lifted_call(m, v):
        features = m(v)
        patches, *rest = canonical(features)
        return patches.reshape(-1, patches.shape[-1]), *rest

    def their_call(m, v):
        patches, *rest = of_dictionary(m(v))
        return patches.reshape(-1, patches.shape[-1]), *rest

    expected = run(theirs, volume, their_call)
    for model in (lifted, same):
        outputs, gradients = run(model, volume, lifted_call)
        renamed = {name.replace(".blk2d", ""): g for name, g in expected[1].items()}
        assert_parity(record_property, (outputs, gradients), (expected[0], renamed))
        assert gradients.keys() == renamed.keys()


SIZES = ["vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"]


@pytest.fixture
def small(monkeypatch):
    """Facebook's hub functions, with their own settings but the width and the depth."""

    def make(name, **more):
        model_class, backbones = peers.dinov3()
        module = __import__(model_class.__module__, fromlist=["x"])

        def smaller(**settings):
            return model_class(**(settings | dict(embed_dim=128, num_heads=2, depth=4) | more))

        monkeypatch.setattr(module, "DinoVisionTransformer", smaller)
        model = getattr(backbones, f"dinov3_{name}")(pretrained=False)
        monkeypatch.undo()
        return peers.randomise(model)

    return make


@pytest.mark.parametrize("name", SIZES)
@peers.needs_dinov3
@pytest.mark.usefixtures("on_reference")
def test_lift_of_every_size(small, name):
    model, volume = small(name).eval(), torch.randn(2, 3, 3, 48, 80)
    images = volume.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        features, expected = pcf.lift(model, mode="slice2d")(volume), model.forward_features(images)
    assert torch.equal(features.patches.flatten(0, 1).flatten(1, 2), expected["x_norm_patchtokens"])
    assert torch.equal(features.cls.flatten(0, 1), expected["x_norm_clstoken"])
    assert torch.equal(features.registers.flatten(0, 1), expected["x_storage_tokens"])
    for settings in ({}, {"mode": "flatten3d"}, {"pool_method": "PCm", "globals_at": "plane"}):
        assert pcf.lift(model, **settings)(volume).patches.isfinite().all()


@pytest.mark.parametrize("name", SIZES)
@peers.needs_dinov3
@pytest.mark.usefixtures("on_reference")
def test_training_of_every_size_draws_as_facebook_does(small, name):
    model, volume = small(name, drop_path_rate=0.4).train(), torch.randn(2, 3, 3, 48, 80)
    torch.manual_seed(1)
    got = pcf.lift(model, mode="slice2d")(volume)
    torch.manual_seed(1)
    expected = model.forward_features(volume.transpose(1, 2).flatten(0, 1))
    assert torch.equal(got.patches.flatten(0, 1).flatten(1, 2), expected["x_norm_patchtokens"])
    assert torch.equal(got.cls.flatten(0, 1), expected["x_norm_clstoken"])


@peers.needs_dinov3
def test_our_converter_takes_stock_models(small):
    model, volume = small("vitl16").eval(), torch.randn(2, 3, 3, 48, 80)
    with torch.no_grad():
        expected = pcf.lift(copy.deepcopy(model), pool_method="PCm")(volume)
        converted = pcf.PlaneCycleConverter(pool_method="PCm")(model)
        got = converted.forward_features(volume)
    for a, b in zip(of_dictionary(got), canonical(expected)):
        torch.testing.assert_close(a.flatten(0, -2), b.flatten(0, -2), rtol=0, atol=TOLERANCE)
