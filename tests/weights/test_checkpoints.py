"""`convert_state_dict`: the same network under other names, shown by what it computes."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import planecycle_fast as pcf

from .. import peers, standins
from ..host_models import BY_NAME, hf_dinov3, randomise, timm_dinov3

GATED = dict(use_gated_mlp=True, hidden_act="silu")
HOSTS = {
    "timm": lambda: timm_dinov3("small", "_qkvb", mlp_ratio=2)(),
    "hf": lambda: hf_dinov3(intermediate_size=128),
    "dinov3": lambda: standins.DinoVisionTransformer(patch_size=16),
    "timm swiglu": lambda: timm_dinov3("small_plus", "_qkvb", mlp_ratio=2)(),
    "hf swiglu": lambda: hf_dinov3(intermediate_size=128, **GATED),
    "dinov3 swiglu": lambda: standins.DinoVisionTransformer(patch_size=16, swiglu=True),
}
CYCLE = dict(cycle_order=("DH", "HW", "DW"), pool_method="PCm")
VOLUME = (2, 3, 4, 48, 80)


def theirs(real=False, **settings):
    """A model of the authors' code, or its stand-in, converted; and its plain 2D weights."""
    if real:
        model_class, converter = peers.authors()
        small = dict(embed_dim=64, num_heads=2, depth=5, n_storage_tokens=4, pos_embed_rope_dtype="fp32", ffn_ratio=2)
        if settings.pop("swiglu", False):
            settings |= dict(ffn_layer="swiglu", ffn_ratio=3)
        model = peers.randomise(model_class(layerscale_init=0.3, norm_layer="layernormbf16", **(small | settings)))
    else:
        model, converter = standins.DinoVisionTransformer("PlaneCycle", patch_size=16, **settings), standins.Converter
    plain = copy.deepcopy(model.state_dict())
    return converter(**CYCLE)(model).eval(), plain


SOURCES = [False, pytest.param(True, marks=peers.needs_planecycle)]
real_too = pytest.mark.parametrize("real", SOURCES, ids=["stand-in", "authors"])


def assert_same_network(lifted, model, volume):
    with torch.no_grad():
        features, expected = lifted(volume), model(volume)
    for got, want in (
        (features.patches.flatten(0, 3), expected["x_norm_patchtokens"].flatten(0, 1)),
        (features.cls.flatten(0, 1), expected["x_norm_clstoken"]),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@real_too
@pytest.mark.parametrize("host", HOSTS)
def test_a_fine_tuned_checkpoint_into_every_lifted_host_and_back(tmp_path, host, real):
    swiglu = "swiglu" in host
    model, _ = theirs(real, swiglu=swiglu, mask_k_bias=True)
    volume = torch.randn(VOLUME)
    lifted = pcf.lift(HOSTS[host]().eval(), **CYCLE)
    converted = pcf.convert_state_dict(model.state_dict(), model=lifted)
    save_file(converted, tmp_path / "host.safetensors")
    lifted.load_state_dict(load_file(tmp_path / "host.safetensors"), strict=True)
    assert_same_network(lifted, model, volume)

    fresh, _ = theirs(real, swiglu=swiglu, mask_k_bias=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_network(lifted, fresh, volume)
    back = pcf.convert_state_dict(lifted.state_dict(), to="planecycle", model=fresh)
    masks = [t for key, t in back.items() if key.endswith("bias_mask")]
    assert len(masks) == 5 and all(mask.tolist() == [1] * 64 + [0] * 64 + [1] * 64 for mask in masks)
    save_file(back, tmp_path / "theirs.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "theirs.safetensors"), strict=True)
    assert_same_network(lifted, fresh, volume)


@real_too
def test_without_a_model_it_is_a_matter_of_names(real):
    model, plain = theirs(real)
    host = pcf.convert_state_dict(model.state_dict())
    assert list(host) and {k: v.shape for k, v in host.items()} == {k: v.shape for k, v in plain.items()}
    assert all(torch.equal(host[k], plain[k]) for k in plain)
    back = pcf.convert_state_dict(host, to="planecycle")
    expected = model.state_dict()
    assert sorted(back) == sorted(expected) and all(torch.equal(back[k], expected[k]) for k in back)
    again = pcf.convert_state_dict(back, to="planecycle")
    assert sorted(again) == sorted(back)


def test_tensors_have_memory_of_their_own():
    model, _ = theirs()
    for to in ("host", "planecycle"):
        converted = pcf.convert_state_dict(model.state_dict(), to=to)
        addresses = [t.data_ptr() for t in converted.values()]
        assert len(set(addresses)) == len(addresses)
        assert not set(addresses) & {t.data_ptr() for t in model.state_dict().values()}
        assert all(t.is_contiguous() and not t.requires_grad for t in converted.values())


def test_views_and_parameters_become_plain_tensors():
    model, _ = theirs()
    weights = model.state_dict(keep_vars=True)
    key = "blocks.0.blk2d.attn.proj.weight"
    weights[key] = weights[key].T.clone().T  # not contiguous
    for converted in (pcf.convert_state_dict(weights), pcf.convert_state_dict(weights, model=HOSTS["hf"]())):
        assert all(t.is_contiguous() and not t.requires_grad and t.grad_fn is None for t in converted.values())


def test_order_of_keys_is_that_of_the_model():
    timm_model = HOSTS["timm"]()
    first, second = (pcf.convert_state_dict(HOSTS["hf"]().state_dict(), model=timm_model) for _ in range(2))
    assert list(first) == list(second)


def test_released_periods_are_rounded_to_bfloat16():
    weights = {key: t.bfloat16().float() if "periods" in key else t for key, t in state().items()}
    for host in ("timm", "hf"):
        assert pcf.convert_state_dict(weights, model=HOSTS[host]())


def test_a_bias_on_a_model_without_one_and_masks():
    """dinov3 to dinov3: a mask is made, or its effect kept, or a bias of zeros left out."""
    weights = standins.DinoVisionTransformer(patch_size=16, mask_k_bias=False).state_dict()
    converted = pcf.convert_state_dict(weights, model=HOSTS["dinov3"]())
    assert all(t.all() for key, t in converted.items() if key.endswith("bias_mask"))  # its key bias counts
    zeros = {key: t * 0 if key.endswith("qkv.bias") else t for key, t in weights.items()}
    converted = pcf.convert_state_dict(zeros, model=HOSTS["dinov3"]())
    assert all(not t[64:128].any() for key, t in converted.items() if key.endswith("bias_mask"))
    assert not any(key.endswith("qkv.bias") for key in pcf.convert_state_dict(zeros, model=without_biases()))
    plain = pcf.convert_state_dict(zeros, model=without_biases())
    again = pcf.convert_state_dict(plain, model=HOSTS["dinov3"]())
    assert not any(t.any() for key, t in again.items() if key.endswith("qkv.bias"))
    assert (
        pcf.convert_state_dict(weights, model=HOSTS["dinov3"]().to("meta")).keys()
        == HOSTS["dinov3"]().state_dict().keys()
    )


def test_a_prefix_is_taken_off_once():
    weights = {f"cls_{key}": t for key, t in state().items()}
    assert pcf.convert_state_dict(weights, prefix="cls_").keys() == pcf.convert_state_dict(state()).keys()


def test_a_backbone_inside_a_classifier():
    model, plain = theirs()
    classifier = torch.nn.ModuleDict({"backbone": model, "linear_head": torch.nn.Linear(64, 3)})
    converted = pcf.convert_state_dict(classifier.state_dict(), prefix="backbone.")
    assert converted.keys() == plain.keys()
    with pytest.raises(ValueError, match=r"the prefix '', got keys like backbone.cls_token, .*prefix='backbone.'"):
        pcf.convert_state_dict(classifier.state_dict())


def test_kept_originals():
    model = pcf.PlaneCycleConverter(keep_original=True)(standins.DinoVisionTransformer("PlaneCycle"))
    plain = standins.DinoVisionTransformer("PlaneCycle").state_dict()
    converted = pcf.convert_state_dict(model.state_dict())
    assert converted.keys() == plain.keys()
    fresh = pcf.PlaneCycleConverter(keep_original=True)(standins.DinoVisionTransformer("PlaneCycle"))
    fresh.load_state_dict(pcf.convert_state_dict(converted, to="planecycle", model=fresh), strict=True)
    assert torch.equal(fresh.blocks[2].blk2d.attn.qkv.weight, model.blocks[2].blk2d.attn.qkv.weight)


@pytest.mark.parametrize("block_type", ["Slice2D", "Flatten3D"])
def test_the_authors_unconverted_models(block_type):
    model = standins.DinoVisionTransformer(block_type, patch_size=16).eval()
    lifted = pcf.lift(HOSTS["timm"]().eval(), mode={"Slice2D": "slice2d", "Flatten3D": "flatten3d"}[block_type])
    lifted.load_state_dict(pcf.convert_state_dict(model.state_dict(), model=lifted))
    volume = torch.randn(VOLUME)
    with torch.no_grad():
        torch.testing.assert_close(
            lifted(volume).cls.flatten(0, 1), model(volume)["x_norm_clstoken"], rtol=0, atol=1e-4
        )
    back = pcf.convert_state_dict(lifted.state_dict(), model=model)  # a host too, by its keys
    model.load_state_dict(back, strict=True)


def test_key_biases():
    model, _ = theirs(mask_k_bias=False)  # a key bias that counts
    for host in ("timm", "hf"):
        with pytest.raises(ValueError, match=r"model must have a k bias to hold blocks.0.attn.qkv.bias"):
            pcf.convert_state_dict(model.state_dict(), model=HOSTS[host]())
    lifted = pcf.lift(hf_dinov3(intermediate_size=128, key_bias=True).eval(), **CYCLE)
    lifted.load_state_dict(pcf.convert_state_dict(model.state_dict(), model=lifted))
    assert_same_network(lifted, model, torch.randn(VOLUME))
    fresh, _ = theirs(mask_k_bias=True)
    fresh.load_state_dict(pcf.convert_state_dict(lifted.state_dict(), to="planecycle", model=fresh))
    assert_same_network(lifted, fresh, torch.randn(VOLUME))
    masked, _ = theirs(mask_k_bias=True)
    plain, _ = theirs(mask_k_bias=False)
    plain.load_state_dict(pcf.convert_state_dict(masked.state_dict(), to="planecycle", model=plain))
    torch.testing.assert_close(plain(torch.ones(VOLUME)), masked(torch.ones(VOLUME)), rtol=0, atol=1e-5)


def test_models_without_biases():
    model, _ = theirs()
    no_biases = timm_dinov3("small", mlp_ratio=2)()
    with pytest.raises(ValueError, match="must have a q bias .* timm's models with biases end in _qkvb"):
        pcf.convert_state_dict(model.state_dict(), model=no_biases)
    with torch.no_grad():
        for block in model.blocks:
            block.blk2d.attn.qkv.bias.zero_()
    lifted = pcf.lift(no_biases.eval(), **CYCLE)
    lifted.load_state_dict(pcf.convert_state_dict(model.state_dict(), model=lifted))
    assert_same_network(lifted, model, torch.randn(VOLUME))
    fresh, _ = theirs()
    fresh.load_state_dict(pcf.convert_state_dict(lifted.state_dict(), to="planecycle", model=fresh))
    assert_same_network(lifted, fresh, torch.randn(VOLUME))


def test_hosts_among_themselves():
    """timm to Hugging Face and back, which no one asked for but the keys allow."""
    timm_model, hf_model = BY_NAME["timm-dinov3-s-qkvb"].make(mlp_ratio=2), HOSTS["hf"]().eval()
    randomise(timm_model)
    hf_model.load_state_dict(pcf.convert_state_dict(timm_model.state_dict(), model=hf_model))
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = timm_model.forward_features(images)
        torch.testing.assert_close(hf_model(images).last_hidden_state, expected, rtol=0, atol=1e-4)
    state = timm_model.state_dict()
    back = pcf.convert_state_dict(hf_model.state_dict(), model=timm_model)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in back)


def test_models_without_registers():
    model, _ = theirs(n_storage_tokens=0)
    lifted = pcf.lift(hf_dinov3(intermediate_size=128, num_register_tokens=0).eval(), **CYCLE)
    lifted.load_state_dict(pcf.convert_state_dict(model.state_dict(), model=lifted))
    assert_same_network(lifted, model, torch.randn(VOLUME))
    fresh, _ = theirs(n_storage_tokens=0)
    fresh.load_state_dict(pcf.convert_state_dict(lifted.state_dict(), to="planecycle", model=fresh))


def test_norms_of_training_are_dropped_and_untied_ones_are_not():
    local, _ = theirs(untie_global_and_local_cls_norm=True)
    timm_model = HOSTS["timm"]()
    converted = pcf.convert_state_dict(local.state_dict(), model=timm_model)
    fresh, _ = theirs(untie_global_and_local_cls_norm=True)
    own = fresh.local_cls_norm.weight.clone()
    fresh.load_state_dict(pcf.convert_state_dict(converted, to="planecycle", model=fresh), strict=True)
    assert torch.equal(fresh.local_cls_norm.weight, own) and torch.equal(fresh.norm.weight, local.norm.weight)
    untied, _ = theirs(untie_cls_and_patch_norms=True)
    with pytest.raises(ValueError, match="got a Eva with no place for 2 of them, cls_norm.weight, cls_norm.bias"):
        pcf.convert_state_dict(untied.state_dict(), model=timm_model)


def state(**settings):
    return theirs(**settings)[0].state_dict()


def without_biases():
    model = HOSTS["dinov3"]()
    for block in model.blocks:
        block.attn.qkv = torch.nn.Linear(64, 192, bias=False)
    return model
