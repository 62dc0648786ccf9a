"""slice2d equals every host's own 2D model, slice by slice; full-size 7B on the meta device."""

import copy
import functools

import pytest
import timm
import torch
import transformers as tr

import planecycle_fast as pcf

from ..host_models import BY_NAME, HOSTS
from ..test_lift_parity import globals_of, naive_of_host

pytestmark = pytest.mark.usefixtures("on_reference")


def host_features(host, model, volume):
    batch, _, depth = volume.shape[:3]
    tokens = host.tokens(model, volume.transpose(1, 2).flatten(0, 1))
    return tokens.unflatten(0, (batch, depth))  # (B, D, g + L, C)


def all_tokens(features):
    """Back to (B, D, g + L, C)."""
    parts = (globals_of(features), features.patches.flatten(2, 3))
    return torch.cat([p for p in parts if p is not None], 2)


@pytest.mark.parametrize("settings", [{"mode": "slice2d"}, {"cycle_order": ("HW",)}], ids=["slice2d", "HW-PCg"])
@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_slice2d_is_the_2d_model(host, settings):
    model, volume = host.make(), host.volume()
    with torch.no_grad():
        got = all_tokens(pcf.lift(model, **settings)(volume))
        expected = host_features(host, model, volume)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_slice2d_in_other_dtypes(host, dtype):
    model, volume = host.make().to(dtype), host.volume(dtype=dtype)
    with torch.no_grad():
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume))


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_slice2d_under_autocast(host):
    model, volume = host.make(), host.volume()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume)
        assert torch.equal(got, expected)
        pcf.lift(model)(volume.bfloat16())  # the cast of the input is autocast's to make


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_slice2d_in_training_draws_as_the_host_does(host):
    settings = {"drop_path_rate": 0.5}
    if host.name == "hf-dinov3":
        settings |= {
            "pos_embed_shift": 0.3,
            "pos_embed_jitter": 1.4,
            "pos_embed_rescale": 2.0,
            "attention_dropout": 0.1,
        }
    elif host.name.startswith("timm"):
        settings |= {"proj_drop_rate": 0.1, "pos_drop_rate": 0.1}
    model, volume = host.make(**settings), host.volume()
    if host.name.startswith("timm") and host.rope:
        model.rope = timm.layers.RotaryEmbeddingDinoV3(host.head_dim, shift_coords=0.3, rescale_coords=2.0)
    model.train()
    torch.manual_seed(7)
    got = all_tokens(pcf.lift(model, mode="slice2d")(volume))
    torch.manual_seed(7)
    assert torch.equal(got, host_features(host, model, volume))
    assert not torch.equal(got, host_features(host, model, volume))  # another seed: it did draw


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_attributes_of_the_host_pass_through(host):
    model = host.make()
    lifted = pcf.lift(model)
    if host.name.startswith("hf"):
        assert lifted.config is model.config
    else:
        assert lifted.embed_dim == model.embed_dim and lifted.num_features == 64
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = lifted.no_such_thing


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_slice_size_of_every_host(host):
    lifted = pcf.lift(host.make())
    with torch.no_grad():
        for grid in ((1, 1), (2, 7)):
            features = lifted(host.volume(batch=1, depth=3, grid=grid))
            assert features.patches.shape == (1, 3, *grid, 64)


@pytest.mark.parametrize("name", ["timm-dinov3-s", "timm-dinov2-s", "hf-dinov3", "hf-dinov2"])
def test_the_hosts_gradient_checkpointing_is_kept(name):
    host = BY_NAME[name]
    model, volume = host.make().train(), host.volume()
    expected = gradients(model, volume)
    if name.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    part = pcf.lift(model).blocks[0].norm1
    part.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model, volume)
    assert len(calls) == 2  # forward, and once more in backward
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def gradients(model, volume):
    model.zero_grad()
    torch.manual_seed(0)
    pcf.lift(model)(volume).patches.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("host", [h for h in HOSTS if h.num_globals], ids=lambda h: h.name)
def test_planecycle_under_autocast_is_as_good_as_the_plain_code(host):
    model, volume, settings = host.make(), host.volume(depth=7), (("DW", "HW", "DH"), "PCg", "depth")
    sizes = (7, 3, 5)
    with torch.no_grad():
        exact = naive_of_host(host, model.double(), volume.double(), sizes, "planecycle", settings)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            features = pcf.lift(model, cycle_order=settings[0])(volume)
            plain = naive_of_host(host, model, volume, sizes, "planecycle", settings)
    for got, (theirs, truth) in zip((features.patches, globals_of(features)), zip(plain, exact)):
        assert (got - truth).abs().mean() < 1.1 * (theirs - truth).abs().mean()


def test_qkvb_calls_qkv_only_where_it_is_more_than_a_linear_layer():
    host = BY_NAME["timm-dinov3-s-qkvb"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.no_grad():
        plain = lifted(volume).patches
        calls = []
        handle = lifted.blocks[1].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        hooked = lifted(volume).patches
        handle.remove()
    assert calls == [1]
    torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-5)
    assert not any(block.attn.qkv_bias_separate for block in lifted.blocks)


def test_settings_of_timms_rope_are_read():
    base = timm.create_model("vit_small_patch16_dinov3", num_classes=0, embed_dim=64, num_heads=2, depth=1)
    volume = torch.randn(2, 3, 3, 32, 80)
    for settings in (
        {"jitter_coords": 1.7},
        {"shift_coords": 0.3, "rescale_coords": 1.5},
        {"normalize_coords": "max"},
        {"normalize_coords": "min"},
        {"min_period": 0.7, "max_period": 30.0},
    ):
        base.rope = timm.layers.RotaryEmbeddingDinoV3(32, **settings)
        base.train()
        torch.manual_seed(5)
        expected = base.forward_features(volume.transpose(1, 2).flatten(0, 1))
        torch.manual_seed(5)
        assert torch.equal(all_tokens(pcf.lift(base, mode="slice2d")(volume)).flatten(0, 1), expected), settings
        three = pcf.lift(base, mode="flatten3d").adapter.rope(torch.float32).axis_periods(3)
        first = settings.get("min_period", 1.0)
        last = settings.get("max_period", 100 ** (5 / 6))
        for periods in three[1:]:
            torch.testing.assert_close(periods[[0, -1]], torch.tensor([first, last]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_periods_that_are_cast_with_a_timm_model(dtype):
    """As timm does up to 1.0.30: angles have the precision that the host's have."""
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make().to(dtype), host.volume(dtype=dtype)
    with torch.no_grad():
        for periods, cast in ((model.rope.periods.float(), False), (model.rope.periods.to(dtype), True)):
            model.rope.periods = periods
            expected = host_features(host, model, volume)
            assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), expected)
            assert pcf.lift(model).adapter.rope(dtype).narrows == cast


@functools.cache
def timm_7b():
    """Forty copies of a block that was built on a CPU: timm 1.0.20 builds no Eva on the meta device."""
    with torch.device("cpu"):
        model = timm.create_model("vit_7b_patch16_dinov3", num_classes=0, depth=1)
    model.to("meta").blocks.extend([copy.deepcopy(model.blocks[0]) for _ in range(39)])
    return model


META_7B = {
    "timm": timm_7b,
    "hf": lambda: tr.DINOv3ViTModel(
        tr.DINOv3ViTConfig(
            hidden_size=4096,
            num_attention_heads=32,
            num_hidden_layers=40,
            intermediate_size=8192,
            use_gated_mlp=True,
            hidden_act="silu",
            num_register_tokens=4,
            query_bias=False,
            value_bias=False,
        )
    ),
}


@pytest.mark.parametrize("mode", ["planecycle", "slice2d", "flatten3d"])
@pytest.mark.parametrize("library", META_7B)
def test_7b_full_size_on_the_meta_device(library, mode):
    with torch.device("meta"):
        model = META_7B[library]()
        volume = torch.empty(1, 3, 64, 256, 256)
    assert 6.6e9 < sum(p.numel() for p in model.parameters()) < 6.8e9
    features = pcf.lift(model, mode=mode)(volume)
    slices = 1 if mode == "flatten3d" else 64
    assert features.patches.shape == (1, 64, 16, 16, 4096)
    assert features.cls.shape == (1, slices, 4096) and features.registers.shape == (1, slices, 4, 4096)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_timms_fixed_size_models(name):
    model = timm.create_model(name, num_classes=0, depth=2, img_size=64 if "16" in name else 56, dynamic_img_size=False)
    size = model.patch_embed.img_size[0]
    volume = torch.randn(1, 3, 3, size, size)
    with torch.no_grad():
        features = pcf.lift(model, mode="slice2d")(volume)
        expected = model.forward_features(volume[0].transpose(0, 1))[:, model.num_prefix_tokens :]
    assert torch.equal(features.patches[0].flatten(1, 2), expected)
    for wrong in ((size * 2, size), (size, size * 2)):
        with pytest.raises(ValueError, match=r"fixed size, .* got .*; build the model with dynamic_img_size=True"):
            pcf.lift(model)(torch.randn(1, 3, 3, *wrong))
