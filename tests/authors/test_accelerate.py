"""`accelerate`: nothing changes from outside, on stand-ins here and on the authors' code where it is there."""

import copy
import io
import pickle

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.ops.choice import Choice

from .. import standins

BLOCK_TYPES = ("PlaneCycle", "Slice2D", "Flatten3D")


def outputs(model, *arguments, seed=3, **options):
    torch.manual_seed(seed)
    return model(*arguments, **options)


def assert_same(got, expected, tolerance=2e-5):
    """Same structure, tensors within the tolerance."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            assert_same(a, b, tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    else:
        assert got == expected


VOLUME = (2, 3, 3, 20, 12)  # 3 x 5 x 3 tokens


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_the_output_dictionary(build, block_type, pool_method):
    model, volume = build(block_type, pool_method=pool_method, n_storage_tokens=4), torch.randn(VOLUME)
    expected = outputs(model, volume)
    assert pcf.accelerate(model) is model
    got = outputs(model, volume)
    assert_same(got, expected)
    assert got["masks"] is None and got["x_prenorm"].shape[-1] == 64


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_masks(build, block_type):
    model, volume = build(block_type), torch.randn(VOLUME)
    masks = torch.rand(*((2, 45) if block_type == "Flatten3D" else (6, 15))) < 0.4
    expected = outputs(model, volume, masks=masks)
    got = outputs(pcf.accelerate(model), volume, masks=masks)
    assert_same(got, expected)
    assert got["masks"] is masks
    unmasked = outputs(model, volume)
    assert not torch.allclose(got["x_prenorm"], unmasked["x_prenorm"])


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_intermediate_layers_with_all_options(build, block_type):
    model, volume = build(block_type, untie_cls_and_patch_norms=True), torch.randn(VOLUME)
    fast = pcf.accelerate(copy.deepcopy(model))
    for number in range(16):
        options = {
            name: bool(number >> bit & 1)
            for bit, name in enumerate(("reshape", "return_class_token", "return_extra_tokens", "norm"))
        }
        for n in (1, 3, [0, 2], (4,), range(2, 4)):
            expected = model.get_intermediate_layers(volume, n=n, **options)
            assert_same(fast.get_intermediate_layers(volume, n=n, **options), expected)
    assert_same(fast.get_intermediate_layers(volume), model.get_intermediate_layers(volume))
    assert_same(fast.get_intermediate_layers(volume, n=[-1]), model.get_intermediate_layers(volume))


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_the_class_token_alone(build, block_type):
    model, volume = build(block_type), torch.randn(VOLUME)
    expected = outputs(model, volume, is_training=False)
    assert isinstance(expected, torch.Tensor)
    assert_same(outputs(pcf.accelerate(model), volume, is_training=False), expected)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_lists_of_volumes(build, block_type):
    model = build(block_type, untie_global_and_local_cls_norm=True, drop_path_rate=0.4).train()
    volumes = [torch.randn(VOLUME), torch.randn(2, 3, 5, 8, 16)]
    torch.manual_seed(0)
    expected = model.forward_features(volumes, [None, None])
    torch.manual_seed(0)
    got = pcf.accelerate(model).forward_features(volumes, [None, None])
    assert_same(got[: len(expected)], expected)  # the authors' PlaneCycle drops all volumes but the first
    assert len(got) == 2 and got[1]["x_norm_patchtokens"].isfinite().all()


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_training_draws_the_same(build, block_type):
    model, volume = build(block_type, drop_path_rate=0.4).train(), torch.randn(VOLUME)
    fast = pcf.accelerate(copy.deepcopy(model))
    expected, got = outputs(model, volume), outputs(fast, volume)
    assert_same(got, expected)
    assert not torch.allclose(outputs(fast, volume, seed=4)["x_prenorm"], expected["x_prenorm"])
    for out in (expected, got):
        sum(out[k].square().mean() for k in out if k != "masks").backward()
    for (name, a), b in zip(fast.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_class_keys_and_identity_stay(build, block_type):
    model = build(block_type)
    kind, keys, ids = type(model), list(model.state_dict()), [id(p) for p in model.parameters()]
    names = [name for name, _ in model.named_modules()]
    pcf.accelerate(model)
    assert type(model) is kind and list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == ids and [name for name, _ in model.named_modules()] == names


def test_restore(build):
    model, volume = build(), torch.randn(VOLUME)
    before, expected = dict(model.__dict__), outputs(model, volume)
    assert pcf.restore(pcf.accelerate(pcf.accelerate(model))) is model
    assert model.__dict__ == before
    assert torch.equal(outputs(model, volume)["x_prenorm"], expected["x_prenorm"])
    with pytest.raises(ValueError, match="model must be accelerated to be restored, got a DinoVisionTransformer that"):
        pcf.restore(model)
    with pytest.raises(ValueError, match="got a Linear that is not"):
        pcf.restore(torch.nn.Linear(1, 1))


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    yield torch.load(stored, weights_only=False)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_copies_are_accelerated_and_independent(build, block_type):
    model, volume = pcf.accelerate(build(block_type)), torch.randn(VOLUME)
    expected = outputs(model, volume)
    for each in copies(model):
        assert each.forward_features_list.model is each and each.get_intermediate_layers.model is each
        assert_same(outputs(each, volume), expected, 0)
        with torch.no_grad():
            each.cls_token.add_(1)
        assert not torch.allclose(outputs(each, volume)["x_prenorm"], expected["x_prenorm"])
        assert_same(outputs(model, volume), expected, 0)
        pcf.restore(each)
        assert "forward_features_list" in model.__dict__


def test_settings_are_read_when_the_model_runs(build):
    model, volume = pcf.accelerate(build()), torch.randn(VOLUME)
    first = outputs(model, volume)
    for block in model.blocks:
        block.cycle_order = ("DH", "DW")
    second = outputs(model, volume)
    assert not torch.allclose(first["x_prenorm"], second["x_prenorm"])
    assert_same(second, outputs(pcf.restore(model), volume))
    for block in model.blocks:
        block.rope_embed = None
    assert_same(outputs(pcf.accelerate(model), volume), outputs(pcf.restore(model), volume))


def test_a_plane_that_a_block_cannot_have_is_refused_also_later(build):
    model, volume = pcf.accelerate(build()), torch.randn(VOLUME)
    model.blocks[2].cycle_order = ("HW", "DHW", "DHW")
    with pytest.raises(ValueError, match="cycle_order of planes HW, DW, DH, got 'DHW' for block 2"):
        model(volume)


def test_blocks_know_their_place(build):
    model, volume = build(), torch.randn(VOLUME)
    model.blocks = model.blocks[1:4]  # their planes stay those of blocks 1 to 3
    expected = outputs(model, volume)
    assert_same(outputs(pcf.accelerate(model), volume), expected)


def test_every_block_has_its_own_rope(build):
    model, volume = build(), torch.randn(VOLUME)
    model.blocks[2].rope_embed = copy.deepcopy(model.rope_embed)
    model.blocks[2].rope_embed.periods.mul_(0.5)
    expected = outputs(model, volume)
    assert_same(outputs(pcf.accelerate(model), volume), expected)


def test_norms_of_local_crops(build):
    """Of the second volume only, in training only."""
    volumes = [torch.randn(VOLUME) for _ in range(3)]
    for block_type in ("PlaneCycle", "Slice2D"):
        model = build(block_type, untie_global_and_local_cls_norm=True)
        with torch.no_grad():
            model.local_cls_norm.weight.add_(1)
        fast = pcf.accelerate(copy.deepcopy(model))
        for training in (True, False):
            model.train(training), fast.train(training)
            model.rope_embed.eval(), fast.rope_embed.eval()
            got = fast.forward_features(volumes, [None] * 3)
            for i in range(3):  # by the norms themselves: the authors' PlaneCycle has no second volume
                norm = model.local_cls_norm if training and i == 1 else model.norm
                assert_same(got[i]["x_norm_clstoken"], norm(got[i]["x_prenorm"][:, 0]))
            assert_same(fast.get_intermediate_layers(volumes[1]), model.get_intermediate_layers(volumes[1]))


@pytest.mark.parametrize("n", [1, [0, 2]])
def test_maps_are_contiguous_and_no_layer_runs_in_vain(build, n):
    model, volume = pcf.accelerate(build()), torch.randn(VOLUME)
    calls = []
    for block in model.blocks:
        block.blk2d.register_forward_hook(lambda *_: calls.append(1))
    maps = model.get_intermediate_layers(volume, n=n, reshape=True)
    assert all(m.is_contiguous() for m in maps) and len(calls) == (5 if n == 1 else 3)


def test_tables_are_made_once_per_plane_but_for_every_block_that_may_draw(build):
    for training, expected in ((False, 3), (True, 5)):
        model, calls = pcf.accelerate(build()).train(training), []
        model.rope_embed.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        outputs(model, torch.randn(VOLUME))
        assert len(calls) == expected


def test_the_backend_is_passed_on(build, monkeypatch):
    seen, of = [], Choice.of
    monkeypatch.setattr(Choice, "of", lambda *a: (seen.append(a[0]), of(*a))[1])
    model = pcf.accelerate(build(), backend="reference")
    outputs(model, torch.randn(VOLUME))
    assert set(seen) == {"reference"}
    outputs(pcf.accelerate(model), torch.randn(VOLUME))
    assert set(seen) == {"reference", "auto"}


def test_sizes_that_are_no_multiple_of_the_patch_lose_their_rest_as_before(build):
    model, volume = build(), torch.randn(1, 3, 3, 22, 15)
    expected = outputs(model, volume)
    assert_same(outputs(pcf.accelerate(model), volume), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(build, dtype):
    model, volume = build().to(dtype), torch.randn(VOLUME, dtype=dtype)
    expected = outputs(model, volume)
    got = outputs(pcf.accelerate(model), volume)
    assert got["x_prenorm"].dtype == dtype
    assert_same(got, expected, 1e-12 if dtype == torch.float64 else 0.1)


def test_under_torch_compile():
    model, volume = pcf.accelerate(standins.Converter()(standins.DinoVisionTransformer("PlaneCycle")).eval()), VOLUME
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same(compiled(torch.ones(volume)), model(torch.ones(volume)))
