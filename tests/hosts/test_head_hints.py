"""A model with a head is refused, and the error names its backbone; a subclass of its own is not taken for its base."""

import pytest
import torch
import transformers as tr
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME, HF_SMALL, MORE_HOSTS


def inner(hint):
    """From "...; model.a.b is supported: lift that...": "a.b"."""
    return str(hint.value).split("; model.")[1].split(" is supported")[0]


def vision(config, **more):
    return config(**(HF_SMALL | {"image_size": 64} | more)).to_dict()


TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, vocab_size=64,
            bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
DINOV2 = dict(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
DPT = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_hidden_size=64)
HEADS = {  # class, its configuration: the attribute that the error names, in any version of transformers
    "ViTForImageClassification": (lambda: tr.ViTConfig(**HF_SMALL), "vit"),
    "ViTForMaskedImageModeling": (lambda: tr.ViTConfig(**HF_SMALL), "vit"),
    "ViTMAEForPreTraining": (lambda: tr.ViTMAEConfig(**HF_SMALL), "vit"),
    "IJepaForImageClassification": (lambda: tr.IJepaConfig(**HF_SMALL), "ijepa"),
    "Dinov2ForImageClassification": (lambda: tr.Dinov2Config(**HF_SMALL), "dinov2"),
    "Dinov2WithRegistersForImageClassification": (
        lambda: tr.Dinov2WithRegistersConfig(**HF_SMALL),
        "dinov2_with_registers",
    ),
    "CLIPModel": (
        lambda: tr.CLIPConfig(text_config=TEXT, vision_config=vision(tr.CLIPVisionConfig)),
        "vision_model",
    ),
    "CLIPVisionModelWithProjection": (lambda: tr.CLIPVisionConfig(**HF_SMALL), "vision_model"),
    "CLIPForImageClassification": (
        lambda: tr.CLIPConfig(text_config=TEXT, vision_config=vision(tr.CLIPVisionConfig)),
        "vision_model",
    ),
    "SiglipModel": (
        lambda: tr.SiglipConfig(text_config=TEXT, vision_config=vision(tr.SiglipVisionConfig)),
        "vision_model",
    ),
    "SiglipForImageClassification": (
        lambda: tr.SiglipConfig(text_config=TEXT, vision_config=vision(tr.SiglipVisionConfig)),
        "vision_model",
    ),
    "LlavaForConditionalGeneration": (
        lambda: tr.LlavaConfig(
            vision_config=tr.CLIPVisionConfig(image_size=64, **HF_SMALL),
            text_config=tr.LlamaConfig(**TEXT, num_key_value_heads=1),
            image_token_index=2,
        ),
        "model.vision_tower",
    ),
    "DPTForDepthEstimation": (
        lambda: tr.DPTConfig(backbone_config=tr.Dinov2Config(**HF_SMALL, **DINOV2), **DPT),
        "backbone",
    ),
    "DepthAnythingForDepthEstimation": (
        lambda: tr.DepthAnythingConfig(backbone_config=tr.Dinov2Config(**HF_SMALL, **DINOV2), **DPT, patch_size=16),
        "backbone",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_error_for_a_model_with_a_head_names_its_backbone(name):
    config, expected = HEADS[name]
    model = getattr(tr, name)(config()).eval()
    with pytest.raises(ValueError, match=f"got transformers.*{name}; model.* is supported: lift that") as error:
        pcf.lift(model)
    assert inner(error) == expected
    lifted = pcf.lift(model.get_submodule(expected))
    with torch.no_grad():
        assert lifted(torch.randn(1, 3, 2, 64, 64)).patches.shape == (1, 2, 4, 4, 64)


def test_of_two_backbones_both_are_named():
    both = nn.ModuleDict({"eye": BY_NAME["hf-siglip"].make(), "other": BY_NAME["hf-dinov2"].make()})
    with pytest.raises(ValueError, match="; model.eye and model.other are supported: lift one of them; "):
        pcf.lift(both)


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip", "hf-dinov3-backbone", "hf-dinov2"])
def test_a_subclass_that_computes_something_else_is_not_taken_for_its_base(name):
    model = BY_NAME[name].make()
    base = type(model)
    model.__class__ = type("Sharded" + base.__name__, (base,), {})  # as FSDP2 makes them
    pcf.lift(model)

    def doubled(self, images):
        return 2 * base.forward(self, images).last_hidden_state

    model.__class__ = type(base.__name__, (base,), {"forward": doubled})
    with pytest.raises(ValueError, match="model must be of a supported class, got tests.hosts.test_head_hints"):
        pcf.lift(model)
    with torch.no_grad():  # by name it can be
        pcf.lift(model, adapter=next(a for a in pcf.adapters.ADAPTERS if base.__name__ in getattr(a, "names", ())))


def test_messages_name_what_is_supported():
    with pytest.raises(ValueError) as error:
        pcf.lift(nn.Linear(1, 1))
    names = [type(host.build()).__name__ for host in MORE_HOSTS if host.name.startswith("hf")]
    names += ["DINOv3ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"]
    assert all(name in str(error.value) for name in names)
