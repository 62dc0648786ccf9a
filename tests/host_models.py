"""Small real models of every supported family, with weights that show every part.

Built by their own libraries; only sizes are reduced. `Host.tokens` are all tokens of slices after the
final norm, (N, g + L, C), by the library's own forward. For facebookresearch/dinov3 there are
stand-ins (tests/standins.py), and its own code where DINOV3_REPO names a checkout.
"""

import os
import re
from dataclasses import dataclass

import pytest
import timm
import torch
import transformers as tr

from . import peers, standins

GRID = (3, 5)  # patches of a slice


@dataclass
class Host:
    name: str
    build: object
    num_globals: int
    patch: int
    head_dim: int
    rope: bool = True
    normalize: str = "separate"
    forward: object = None  # (model, images) -> tokens, where `tokens` does not know how

    def make(self, **settings):
        model = self.build(**settings).eval()
        randomise(model)
        return model

    def volume(self, batch=2, depth=4, dtype=torch.float32, grid=GRID):
        return torch.randn(batch, 3, depth, grid[0] * self.patch, grid[1] * self.patch, dtype=dtype)

    def check_one_graph(self, lifted):
        """Compiled once, for volumes of any batch, depth, height and width."""
        volume = self.volume(grid=(4, 6))
        for axis in (0, 2, 3, 4):
            torch._dynamo.mark_dynamic(volume, axis)
        compiled = torch.compile(lifted, backend="eager", fullgraph=True)
        with torch.no_grad():
            for each in (volume, self.volume(3, 5, grid=(7, 2))):
                torch.testing.assert_close(compiled(each).patches, lifted(each).patches)

    def tokens(self, model, images):
        if self.forward is not None:
            return self.forward(model, images)
        if self.name.startswith("hf"):
            return model(images).last_hidden_state
        if self.name.startswith("facebook"):
            out = model.forward_features(images)
            front = torch.cat([out["x_norm_clstoken"][:, None], out["x_storage_tokens"]], 1)
            return torch.cat([front, out["x_norm_patchtokens"]], 1)
        return model.forward_features(images)


def randomise(model):
    for name, p in model.named_parameters():
        if any(part in name for part in ("gamma", "lambda", ".ls")):
            torch.nn.init.normal_(p, 0.3, 0.1)
        elif "bias" in name or "token" in name or "pos" in name:
            torch.nn.init.normal_(p, std=0.3)
    for name, b in model.named_buffers():
        assert "k_bias" not in name or not b.any()


def hf_dinov3(**settings):
    small = dict(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=5, intermediate_size=96, num_register_tokens=4
    )
    return tr.DINOv3ViTModel(tr.DINOv3ViTConfig(**(small | settings)))


def hf_dinov3_gated(**settings):
    return hf_dinov3(use_gated_mlp=True, hidden_act="silu", query_bias=False, num_register_tokens=0, **settings)


def hf_dinov2(**settings):
    small = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=5, image_size=56, patch_size=14)
    return tr.Dinov2Model(tr.Dinov2Config(**(small | settings)))


def hf_dinov2_swiglu(**settings):
    return hf_dinov2(use_swiglu_ffn=True, **settings)


def hf_dinov2_registers(**settings):
    small = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=5, image_size=56, patch_size=14)
    return tr.Dinov2WithRegistersModel(tr.Dinov2WithRegistersConfig(num_register_tokens=4, **(small | settings)))


def timm_model(name, **small):
    def build(**settings):
        return timm.create_model(name, pretrained=False, num_classes=0, **({"depth": 5} | small | settings))

    return build


def timm_dinov3(size, suffix="", **small):
    return timm_model(f"vit_{size}_patch16_dinov3{suffix}", embed_dim=64, num_heads=2, **small)


def timm_vit(**small):
    name, sizes = "vit_small_patch16_224", dict(img_size=64, embed_dim=64, num_heads=2)
    return timm_model(name, dynamic_img_size=True, **sizes, **small)


def timm_dinov2(size, **small):
    return timm_model(f"vit_{size}_dinov2", dynamic_img_size=True, img_size=56, embed_dim=64, num_heads=2, **small)


def facebook(**small):
    def build(**settings):
        return standins.DinoVisionTransformer(patch_size=16, **(small | settings))

    return build


def facebook_real(**small):
    def build(**settings):
        sizes = dict(embed_dim=64, num_heads=2, depth=5, pos_embed_rope_dtype="fp32", layerscale_init=0.3)
        training = dict(pos_embed_rope_rescale_coords=2.0, pos_embed_rope_shift_coords=0.3)
        return peers.randomise(peers.dinov3()[0](**(sizes | training | small | settings)))

    return build


HOSTS = [
    Host("hf-dinov3", hf_dinov3, 5, 16, 32),
    Host("hf-dinov3-gated", hf_dinov3_gated, 1, 16, 32),
    Host("hf-dinov2", hf_dinov2, 1, 14, 32, rope=False),
    Host("hf-dinov2-swiglu", hf_dinov2_swiglu, 1, 14, 32, rope=False),
    Host("hf-dinov2-registers", hf_dinov2_registers, 5, 14, 32, rope=False),
    Host("timm-dinov3-s", timm_dinov3("small"), 5, 16, 32),
    Host("timm-dinov3-s-qkvb", timm_dinov3("small", "_qkvb"), 5, 16, 32),
    Host("timm-dinov3-s+", timm_dinov3("small_plus"), 5, 16, 32),
    Host("timm-dinov3-b", timm_dinov3("base"), 5, 16, 32),
    Host("timm-dinov3-l-qkvb", timm_dinov3("large", "_qkvb"), 5, 16, 32),
    Host("timm-dinov3-h+", timm_dinov3("huge_plus"), 5, 16, 32),
    Host("timm-dinov3-7b", timm_dinov3("7b", depth=2), 5, 16, 32),
    Host("timm-dinov2-s", timm_dinov2("small_patch14"), 1, 14, 32, rope=False),
    Host("timm-dinov2-s-reg4", timm_dinov2("small_patch14_reg4"), 5, 14, 32, rope=False),
    Host("timm-dinov3-no-globals", timm_dinov3("small", class_token=False, num_reg_tokens=0), 0, 16, 32),
    Host("timm-dinov3-registers-only", timm_dinov3("small", class_token=False), 4, 16, 32),
    Host("timm-vit-no-globals", timm_vit(class_token=False, global_pool="avg"), 0, 16, 32, rope=False),
    Host("timm-dinov2-g", timm_dinov2("giant_patch14", mlp_ratio=4), 1, 14, 32, rope=False),
]
UNTIED = dict(n_storage_tokens=0, swiglu=True, untie_cls_and_patch_norms=True, normalize="max")
HOSTS += [
    Host("facebook-stand-in", facebook(), 5, 16, 32),
    Host("facebook-stand-in-untied", facebook(**UNTIED), 1, 16, 32, normalize="max"),
]
if "DINOV3_REPO" in os.environ:
    HOSTS += [
        Host("facebook-mlp", facebook_real(n_storage_tokens=4, mask_k_bias=True), 5, 16, 32),
        Host("facebook-swiglu", facebook_real(ffn_layer="swiglu", untie_cls_and_patch_norms=True), 1, 16, 32),
    ]

# Those that tests for every host leave out: `tests/test_more_hosts_*.py` are theirs.
MORE_HOSTS = []

# Hugging Face: more families
HF_SMALL = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=5, intermediate_size=96, patch_size=16)


def hf(model, config, **small):
    def build(**settings):
        return getattr(tr, model)(getattr(tr, config)(**(HF_SMALL | {"image_size": 64} | small | settings)))

    return build


def hf_interpolated(model, images, **settings):
    """Of a model that has positions for one size, and interpolates them if it is asked to."""
    trained = model.config.image_size
    trained = tuple(trained) if isinstance(trained, (tuple, list)) else (trained, trained)
    settings["interpolate_pos_encoding"] = tuple(images.shape[2:]) != trained
    return model(images, **settings).last_hidden_state


def hf_unmasked(model, images):
    """Of a MAE: nothing masked, nothing shuffled."""
    patches = images.shape[2] // 16 * (images.shape[3] // 16)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]  # PEFT copies some
    ratio = model.config.mask_ratio
    for config in configs:
        config.mask_ratio = 0.0
    rising = torch.linspace(0, 1, patches, device=images.device).expand(len(images), -1)
    tokens = hf_interpolated(model, images, noise=rising)
    for config in configs:
        config.mask_ratio = ratio
    return tokens


def hf_stage(model, images):
    """Of a backbone with reshape_hidden_states=False: all tokens of its last stage. DINOv3's maps hold patches only."""
    normed = []
    handle = getattr(model, "norm", model).register_forward_hook(lambda _, args, out: normed.append(out))
    stage = model(images).feature_maps[-1]
    handle.remove()
    if not isinstance(model, tr.DINOv3ViTBackbone):
        return stage
    assert torch.equal(normed[-1][:, -stage.shape[1] :], stage)
    return normed[-1]


CLIP, SIGLIP = ("CLIPVisionModel", "CLIPVisionConfig"), ("SiglipVisionModel", "SiglipVisionConfig")
AS_TOKENS = dict(reshape_hidden_states=False)
MORE_HOSTS += [
    Host("hf-vit", hf("ViTModel", "ViTConfig"), 1, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-mae", hf("ViTMAEModel", "ViTMAEConfig"), 1, 16, 32, rope=False, forward=hf_unmasked),
    Host("hf-ijepa", hf("IJepaModel", "IJepaConfig"), 0, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-clip", hf(*CLIP), 1, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-clip-gelu", hf(*CLIP, hidden_act="gelu"), 1, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-siglip", hf(*SIGLIP), 0, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-siglip-gelu", hf(*SIGLIP, hidden_act="gelu"), 0, 16, 32, rope=False, forward=hf_interpolated),
    Host("hf-dinov2-backbone", hf("Dinov2Backbone", "Dinov2Config", **AS_TOKENS), 1, 16, 32, rope=False,
         forward=hf_stage),
    Host("hf-dinov2-registers-backbone",
         hf("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", **AS_TOKENS), 5, 16, 32, rope=False,
         forward=hf_stage),
    Host("hf-dinov3-backbone", hf("DINOv3ViTBackbone", "DINOv3ViTConfig", num_register_tokens=4, **AS_TOKENS),
         5, 16, 32, forward=hf_stage),
]  # fmt: skip
# End of Hugging Face


# timm: more families
def timm_other(name, **small):
    return timm_model(name, **({"embed_dim": 64, "num_heads": 2, "depth": 3} | small))


TIMM_16, TIMM_14 = dict(img_size=(48, 80)), dict(img_size=(42, 70))  # of GRID
MORE_TIMM_HOSTS = [
    Host("timm-siglip", timm_other("vit_base_patch16_siglip_224", **TIMM_16), 0, 16, 32, rope=False),
    Host("timm-deit3", timm_other("deit3_small_patch16_224", **TIMM_16), 1, 16, 32, rope=False),
    Host("timm-deit-distilled", timm_other("deit_tiny_distilled_patch16_224", **TIMM_16), 2, 16, 32, rope=False),
    Host("timm-eva", timm_other("eva_giant_patch14_224", mlp_ratio=4, **TIMM_14), 1, 14, 32, rope=False),
    Host("timm-eva02-s", timm_other("eva02_small_patch14_224", **TIMM_14), 1, 14, 32),
    Host("timm-eva02-b", timm_other("eva02_base_patch14_224", dynamic_img_size=True, img_size=56), 1, 14, 32),
    Host("timm-eva02-clip", timm_other("eva02_base_patch16_clip_224", **TIMM_16), 1, 16, 32),
    Host("timm-pe", timm_other("vit_pe_core_tiny_patch16_384", **TIMM_16), 1, 16, 32),
    Host("timm-rope-mixed", timm_other("vit_small_patch16_rope_mixed_224", **TIMM_16), 1, 16, 32),
    Host("timm-beit", timm_other("beit_base_patch16_224", **TIMM_16), 1, 16, 32, rope=False),
    Host(
        "timm-beit-shared",
        timm_other("beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **TIMM_16),
        *(1, 16, 32, False),
    ),
    Host("timm-beitv2", timm_other("beitv2_base_patch16_224", swiglu_mlp=True, **TIMM_16), 1, 16, 32, rope=False),
]
TIMM = tuple(int(n) for n in re.findall(r"\d+", timm.__version__)[:3])
if TIMM > (1, 0, 20):  # which cannot build it itself
    post_norm = timm_other("eva02_enormous_patch14_clip_224", mlp_ratio=4, **TIMM_14)
    MORE_TIMM_HOSTS.append(Host("timm-eva02-e", post_norm, 1, 14, 32, rope=False))
MORE_HOSTS += MORE_TIMM_HOSTS
# End of timm

BY_NAME = {host.name: host for host in [*HOSTS, *MORE_HOSTS]}
EVERY_HOST = [pytest.param(host, id=host.name, marks=pytest.mark.full if host in MORE_HOSTS else ())
              for host in [*HOSTS, *MORE_HOSTS]]  # fmt: skip
