"""A model of the authors' code, in place and lifted: ``PLANECYCLE_REPO=... python examples/authors_model.py``.

PLANECYCLE_REPO names a checkout of github.com/HINTLab/PlaneCycle. Without one the second half runs: the same weights
in two libraries. Random weights, small sizes, seconds on a CPU; needs timm and transformers.
"""

import os
import sys

import torch

import planecycle_fast as pcf


def timm_model() -> torch.nn.Module:
    import timm

    sizes = dict(embed_dim=64, depth=4, num_heads=2, num_classes=0)
    return timm.create_model("vit_small_patch16_dinov3_qkvb", **sizes).eval()


def their_model() -> torch.nn.Module:
    sys.path.insert(0, os.environ["PLANECYCLE_REPO"])
    from models.vision_transformer import DinoVisionTransformer
    from planecycle.converters.converter import PlaneCycleConverter  # or that of planecycle_fast, which accelerates

    sizes = dict(embed_dim=64, depth=4, num_heads=2, patch_size=16, n_storage_tokens=4, layerscale_init=0.1)
    sizes |= dict(norm_layer="layernormbf16", mask_k_bias=True, pos_embed_rope_dtype="fp32")  # as in released weights
    model = DinoVisionTransformer(block_type="PlaneCycle", **sizes)
    model.init_weights()
    return PlaneCycleConverter(cycle_order=("HW", "DW", "DH", "HW"), pool_method="PCg")(model).eval()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    volume = torch.randn(1, 3, 6, 64, 96)  # (B, 3, D, height, width)
    if "PLANECYCLE_REPO" in os.environ:
        model = their_model()
        before = model.forward_features(volume)["x_norm_patchtokens"]
        after = pcf.accelerate(model).forward_features(volume)["x_norm_patchtokens"]
        print(f"accelerated, in place: at most {(after - before).abs().max():.1e} from their code")
        lifted = pcf.lift(timm_model())
        lifted.load_state_dict(pcf.convert_state_dict(model.state_dict(), model=lifted))
        patches = lifted(volume).patches.reshape(before.shape)
        print(f"their weights in timm's model, lifted: at most {(patches - before).abs().max():.1e}")
    else:
        print("PLANECYCLE_REPO names no checkout of the authors' code: two libraries that are installed instead")

    import transformers

    sizes = dict(hidden_size=64, num_attention_heads=2, num_hidden_layers=4, intermediate_size=256)
    config = transformers.DINOv3ViTConfig(num_register_tokens=4, layer_norm_eps=1e-5, **sizes)
    first, second = pcf.lift(transformers.DINOv3ViTModel(config).eval()), pcf.lift(timm_model())
    second.load_state_dict(pcf.convert_state_dict(first.state_dict(), model=second))
    difference = (first(volume).patches - second(volume).patches).abs().max()
    print(f"transformers' weights in timm's model, both lifted: at most {difference:.1e}")


if __name__ == "__main__":
    main()
