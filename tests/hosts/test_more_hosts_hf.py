"""More of Hugging Face's families: ViT, MAE, I-JEPA, CLIP, SigLIP, and backbones of DINOv2 and DINOv3."""

import copy

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast import use_backend

from .. import naive
from ..host_models import BY_NAME, MORE_HOSTS, SIGLIP, hf, randomise
from ..test_lift_parity import globals_of
from .test_hosts import all_tokens, gradients, host_features

HF_HOSTS = [host for host in MORE_HOSTS if host.name.startswith("hf")]
ACTIVATION = {"hf-clip": "QuickGELUActivation", "hf-siglip": "GELUTanh"}  # which no operation computes
every_host = pytest.mark.parametrize("host", HF_HOSTS, ids=lambda h: h.name)
OWN, OTHER, SMALL = (4, 4), (3, 5), (2, 2)  # patches of a slice: the trained size, and others


def core(model):
    """What holds embeddings and blocks: another module in transformers 5.0."""
    return getattr(model, "vision_model", model)


def last_norm(host, model):
    """What comes after the blocks, from reading the models."""
    if host.name.startswith("hf-clip"):
        return lambda tokens: tokens
    names = ("post_layernorm", "layernorm", "norm")
    return next(getattr(core(model), name) for name in names if hasattr(core(model), name))


def embedded(host, model, images):
    """Tokens before the first block, (N, g + L, C), by the model's own code."""
    seen = []
    first = pcf.lift(model).adapter.blocks[0]
    handle = first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    host.tokens(model, images)
    handle.remove()
    return seen[0]


def naive_features(host, model, volume, grid, settings):
    """The transcription around the model's own blocks: patches (B, D, h, w, C), globals (B, D, g, C)."""
    rope = naive.make_rope(host.head_dim, host.normalize) if host.rope else lambda *_: None

    def call(block):
        def run(tokens, sincos):
            if sincos is not None:
                sin, cos = (t.to(tokens.dtype) for t in sincos)
                return block(tokens, position_embeddings=(cos, sin))
            return block(tokens, None) if host.name.startswith(("hf-clip", "hf-siglip")) else block(tokens)

        return run

    tokens = embedded(host, model, volume.transpose(1, 2).flatten(0, 1))
    blocks = [call(block) for block in pcf.lift(model).adapter.blocks]
    *_, (x, g) = naive.run(tokens, (volume.shape[2], *grid), host.num_globals, blocks, *settings, rope)
    norm = last_norm(host, model)
    return norm(x), norm(g)


@pytest.mark.parametrize("grid", [OWN, OTHER, SMALL], ids=str)
@every_host
def test_slice2d_is_the_2d_model(host, grid, on_reference):
    model, volume = host.make(), host.volume(depth=2, grid=grid)
    with torch.no_grad():
        expected = host_features(host, model, volume)
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), expected)
        assert torch.equal(all_tokens(pcf.lift(model, cycle_order=("HW",))(volume)), expected)


@every_host
def test_slice2d_in_other_dtypes_and_under_autocast(host, on_reference):
    for dtype in (torch.bfloat16, torch.float64):
        model, volume = host.make().to(dtype), host.volume(depth=2, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume))
    model, volume = host.make(), host.volume(depth=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume))


FULL_MODES = [pytest.param(mode, marks=pytest.mark.full) for mode in ("PCm", "flatten3d")]


@pytest.mark.parametrize("mode", ["planecycle", *FULL_MODES])
@every_host
def test_the_naive_transcription_holds(host, mode):
    model, grid = host.make().double(), OTHER
    volume = host.volume(dtype=torch.float64, grid=grid)
    pooling = {"pool_method": "PCm", "globals_at": "plane"} if mode == "PCm" else {}
    lifted = pcf.lift(model, mode="planecycle" if mode == "PCm" else mode, **pooling)
    settings = pcf.lift(model).cycle_order, *(["PCm", "plane"] if mode == "PCm" else ["PCg", "depth"])
    if mode == "flatten3d":
        settings = ["DHW"], "PCg", "plane"
    with torch.no_grad():
        features, (patches, globals_) = lifted(volume), naive_features(host, model, volume, grid, settings)
    tolerance = dict(rtol=0, atol=1e-5 if host.rope else 1e-12)  # RoPE in float32, whatever the model's dtype
    torch.testing.assert_close(features.patches, patches, **tolerance)
    if host.num_globals:
        torch.testing.assert_close(globals_of(features), globals_, **tolerance)
    else:
        assert features.cls is None and features.registers is None
        torch.testing.assert_close(features.pooled(), patches.mean((1, 2, 3)), **tolerance)


@every_host
def test_what_is_taken_apart_and_what_it_computes(host):
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    reasons = [block.kept for block in lifted.descriptions()]
    if host.name in ACTIVATION:
        assert all(set(found) == {"mlp"} and ACTIVATION[host.name] in found["mlp"] for found in reasons)
    else:
        assert reasons == [{}] * 5
    with torch.no_grad():
        in_parts = lifted(volume)
        with use_backend("reference"):
            by_reference = lifted(volume)
        handles = [block.register_forward_hook(lambda *_: None) for block in lifted.adapter.blocks]
        assert all(block.whole == "it has hooks" for block in lifted.descriptions())
        as_a_whole = lifted(volume)
    for handle in handles:
        handle.remove()
    for got in (in_parts, by_reference):
        torch.testing.assert_close(got.patches, as_a_whole.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.pooled(), as_a_whole.pooled(), rtol=0, atol=1e-5)
    assert [block.kept for block in lifted.descriptions()] == reasons


@every_host
def test_layers_gradients_and_shared_weights(host):
    model, volume = host.make(), host.volume(batch=1, depth=2)
    lifted = pcf.lift(model)
    assert list(lifted.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        layers = lifted.intermediate(volume, [1, -1])
        torch.testing.assert_close(layers[1].patches, lifted(volume).patches, rtol=0, atol=1e-6)
    shallow = copy.deepcopy(model)
    blocks = pcf.lift(shallow).adapter.blocks
    del blocks[2:]
    with torch.no_grad():
        torch.testing.assert_close(layers[0].patches, pcf.lift(shallow)(volume).patches, rtol=0, atol=1e-6)

    fast = gradients(model, volume)
    with use_backend("reference"):
        for a, b in zip(fast, gradients(model, volume), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    unused = ("pooler", "mask_token", "head.", "post_layernorm" if "clip" in host.name else "head.")
    assert all(any(name in key for name in unused) for key in without), without


@every_host
def test_training_draws_as_the_host_does(host, on_reference):
    """Dropout of ViTs and of attention's weights, drop path of DINOs: in the order of the 2D model's own."""
    settings = {"drop_path_rate": 0.5} if "dino" in host.name else {"attention_dropout": 0.2}
    if host.name in ("hf-vit", "hf-mae", "hf-ijepa"):
        settings = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    model, volume = host.make(**settings).train(), host.volume(depth=2)
    lifted = pcf.lift(model, mode="slice2d")

    def draw(run):
        torch.manual_seed(7)
        return run()

    expected = draw(lambda: host_features(host, model, volume))
    if host.name == "hf-mae":  # which draws nothing for noise here
        assert model.config.mask_ratio == 0.75
    assert torch.equal(draw(lambda: all_tokens(lifted(volume))), expected)
    assert not torch.equal(all_tokens(lifted(volume)), expected)
    assert all(block.kept for block in lifted.descriptions())


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip-gelu"])
def test_the_hosts_gradient_checkpointing_is_kept(name):
    host = BY_NAME[name]
    model, volume = host.make().train(), host.volume(depth=2)
    expected = gradients(model, volume)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    norm = pcf.lift(model).adapter.blocks[0].get_submodule("layernorm_before" if name == "hf-vit" else "layer_norm1")
    norm.register_forward_hook(lambda *_: calls.append(1))
    for a, b in zip(gradients(model, volume), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 2  # forward, and once more in backward


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_a_mae_sees_all_patches_in_their_order(ratio, on_reference):
    host = BY_NAME["hf-mae"]
    model, volume = host.make(mask_ratio=ratio), host.volume(depth=2)
    with torch.no_grad():
        expected = host_features(host, model, volume)
        assert expected.shape[2] == 1 + 15
        lifted = pcf.lift(model, mode="slice2d")
        assert torch.equal(all_tokens(lifted(volume)), expected)
        calls = []
        model.embeddings.register_forward_hook(lambda *_: calls.append(1))  # now they are called as a whole
        assert torch.equal(all_tokens(lifted(volume)), expected)
        assert len(calls) == 1 and model.config.mask_ratio == ratio
        model.embeddings.patch_embeddings.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            lifted(volume)
        assert model.config.mask_ratio == ratio  # also after an error


def fail(*_):
    raise RuntimeError("on purpose")


def test_clips_class_token_as_it_is_pooled():
    host = BY_NAME["hf-clip"]
    model, volume = host.make(), host.volume(depth=2)
    randomise(core(model).post_layernorm)
    images = volume.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        expected = model(images, interpolate_pos_encoding=True).pooler_output
        cls = pcf.lift(model, mode="slice2d")(volume).cls
        torch.testing.assert_close(core(model).post_layernorm(cls).flatten(0, 1), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(cls.flatten(0, 1), expected, atol=1e-2)


def test_siglips_head_pools_what_lift_gives():
    host = BY_NAME["hf-siglip"]
    model, volume = host.make(), host.volume(depth=2, grid=OWN)
    with torch.no_grad():
        patches = pcf.lift(model, mode="slice2d")(volume).patches
        expected = model(volume.transpose(1, 2).flatten(0, 1)).pooler_output
        torch.testing.assert_close(core(model).head(patches.flatten(0, 1).flatten(1, 2)), expected, rtol=0, atol=1e-5)
    assert pcf.lift(hf(*SIGLIP, vision_use_head=False)())(volume).patches.shape == (2, 2, 4, 4, 64)


@pytest.mark.parametrize("layernorm", [True, False])
@pytest.mark.parametrize("name", ["hf-dinov2-backbone", "hf-dinov2-registers-backbone", "hf-dinov3-backbone"])
def test_maps_of_a_backbone(name, layernorm, on_reference):
    """Maps as they come by default; of several stages, with and without the norm, and a last layer not asked for."""
    host = BY_NAME[name]
    settings = dict(reshape_hidden_states=True, apply_layernorm=layernorm)
    model, volume = host.make(out_indices=[2, 4], **settings), host.volume(batch=1, depth=2)
    last = host.make(**settings)
    last.load_state_dict(model.state_dict())
    images = volume[0].transpose(0, 1)
    with torch.no_grad():
        stages = [m.permute(0, 2, 3, 1) for m in (*model(images).feature_maps, last(images).feature_maps[-1])]
        lifted = pcf.lift(model, mode="slice2d")
        got = [*lifted.intermediate(volume, [1, 3], norm=layernorm), lifted(volume)]
    for features, expected in zip(got, stages, strict=True):
        assert torch.equal(features.patches[0], expected)
    assert [block.kept for block in lifted.descriptions()] == [{}] * 5  # for all that transformers leaves behind


def test_what_transformers_hooks_for_outputs_is_no_reason_but_a_users_hook_is():
    host = BY_NAME["hf-vit"]
    model, volume = host.make(), host.volume(depth=2)
    lifted = pcf.lift(model)
    with torch.no_grad():
        assert len(model(volume[:, :, 0], interpolate_pos_encoding=True, output_hidden_states=True).hidden_states) == 6
        expected = lifted(volume)
        assert [block.kept for block in lifted.descriptions()] == [{}] * 5
        calls = []
        handle = lifted.adapter.blocks[2].register_forward_hook(lambda *_: calls.append(1))
        again = lifted(volume)
        assert [set(block.kept) for block in lifted.descriptions()] == [set(), set(), {"block"}, set(), set()]
        handle.remove()
        lifted(volume)
    assert calls == [1] and [block.kept for block in lifted.descriptions()] == [{}] * 5
    torch.testing.assert_close(again.patches, expected.patches, rtol=0, atol=1e-5)


def test_a_forward_that_was_put_back_is_not_patched():
    model = BY_NAME["hf-vit"].make()
    lifted, blocks = pcf.lift(model), pcf.lift(model).adapter.blocks
    blocks[1].attention.forward = blocks[1].attention.forward
    assert [block.kept for block in lifted.descriptions()] == [{}] * 5
    blocks[1].attention.forward = blocks[2].attention.forward  # another's
    blocks[3].attention.forward = lambda x: x
    patched = {"attention": f"{type(blocks[1].attention).__name__}: its forward is patched"}
    assert [block.kept for block in lifted.descriptions()] == [{}, patched, {}, patched, {}]


def test_slice_sizes():
    siglip = hf(*SIGLIP, image_size=70)()  # as so400m-patch14-384: the last 6 pixels are in no patch
    volume = torch.randn(1, 3, 2, 70, 70)
    with torch.no_grad(), use_backend("reference"):
        got = pcf.lift(siglip, mode="slice2d")(volume).patches
        assert torch.equal(got[0].flatten(1, 2), siglip(volume[0].transpose(0, 1)).last_hidden_state)
    for size in ((72, 70), (71, 71)):
        with pytest.raises(ValueError, match=r"must be a multiple of the patch, 16 x 16 pixels, got 7\d x 7\d"):
            pcf.lift(siglip)(torch.randn(1, 3, 2, *size))


@pytest.mark.parametrize(
    "settings", [{"image_size": (32, 64)}, {"image_size": (32, 128)}, {"patch_size": (16, 8)}, {"patch_size": (16, 16)}]
)
@pytest.mark.parametrize("name", ["hf-vit", "hf-mae", "hf-ijepa"])
def test_a_model_that_was_not_made_for_squares(name, settings, on_reference):
    """At its own size as it is. transformers takes 2 x 8 positions for 4 x 4 ones, and 2 x 4 ones raise within it."""
    host = BY_NAME[name]
    model = host.make(**settings)
    height, width = settings.get("image_size", (64, 64))
    volume = torch.randn(1, 3, 2, height, width)
    lifted = pcf.lift(model, mode="slice2d")
    if name != "hf-mae":  # hf_unmasked counts patches of 16 x 16
        with torch.no_grad():
            assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))
    assert lifted(volume).patches.isfinite().all()
    with pytest.raises(ValueError, match=rf"must have the model's own size, {height} x {width} pixels, got 64 x 96"):
        lifted(torch.randn(1, 3, 2, 64, 96))


def test_dinov2_that_was_not_made_for_squares():
    model = BY_NAME["hf-dinov2"].make(image_size=(28, 70))
    with pytest.raises(ValueError, match="must have the model's own size, 28 x 70 pixels, .* it is 2 x 5, 14"):
        pcf.lift(model)(torch.randn(1, 3, 2, 28, 28))
