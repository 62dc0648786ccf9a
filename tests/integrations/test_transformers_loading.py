"""Lifted models within transformers' own: what `from_pretrained` initialises, and what it asks of its parts."""

import copy
import pickle

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME

transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra 'hf'")


class Around(transformers.PreTrainedModel):
    """A model of somebody that holds a lifted one, somewhere within."""

    config_class = transformers.DINOv3ViTConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config, name="hf-dinov3", lift=pcf.lift):
        super().__init__(config)
        self.body = nn.ModuleDict({"backbone": lift(BY_NAME[name].build())})
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, volume):
        return self.body["backbone"](volume).patches


HOSTS = ["hf-dinov3", "hf-clip", "hf-dinov2"]
MORE = ["hf-dinov3-gated", "hf-dinov3-backbone", "hf-siglip"]
HOSTS += [pytest.param(name, marks=pytest.mark.full) for name in MORE]


def again(model, folder, **settings):
    model.save_pretrained(folder)
    return Around.from_pretrained(folder, **settings).eval()


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_from_pretrained(name, tmp_path):
    host, config = BY_NAME[name], transformers.DINOv3ViTConfig()
    model, volume = Around(config, name).eval(), host.volume()
    expected = model(volume)
    loaded = again(model, tmp_path, name=name)
    assert torch.equal(loaded(volume), expected)
    backbone = loaded.body["backbone"]
    assert isinstance(backbone, pcf.LiftedModel) and isinstance(backbone, transformers.PreTrainedModel)
    for (key, buffer), other in zip(backbone.named_buffers(), model.body["backbone"].buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert backbone.get_input_embeddings() is pcf.unlift(backbone).get_input_embeddings()


def test_what_is_asked_of_a_part():
    host = BY_NAME["hf-dinov2"]
    model, volume = Around(transformers.DINOv3ViTConfig(), "hf-dinov2"), host.volume()
    backbone = model.body["backbone"]
    assert {*backbone._no_split_modules} == {*pcf.unlift(backbone)._no_split_modules} - {"Dinov2Layer"} | {
        "LiftedBlock"
    }
    assert {type(block).__name__ for block in backbone.blocks} == {"LiftedBlock"}
    blocks = [block.host for block in backbone.lifted_blocks]
    model.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in blocks)
    assert all(backbone.adapter.checkpoint(block) is not None for block in blocks)
    model.train()
    model(volume).square().mean().backward()
    assert all(p.grad is not None for p in backbone.blocks.parameters())
    model.gradient_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in blocks)


@pytest.mark.parametrize("name", ["hf-dinov3", "hf-dinov2"])
def test_a_lifted_model_is_still_its_own(name):
    """What transformers' class defines is the host's; what torch's defines is not overridden."""
    host = BY_NAME[name]
    model = host.make()
    lifted = pcf.lift(model)
    assert lifted.config is model.config and lifted.device == model.device and lifted.base_model is model.base_model
    assert lifted.double() is lifted and lifted.float() is lifted and lifted.to("cpu") is lifted
    assert type(lifted).__name__ == "LiftedModel" and type(pcf.lift(model)) is type(lifted)
    assert not isinstance(pcf.lift(BY_NAME["timm-dinov3-s"].make()), transformers.PreTrainedModel)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lifted.nothing


def test_copies_are_of_its_class():
    """And leave out what torch leaves out: `compile` in place."""
    host = BY_NAME["hf-dinov2"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    expected = lifted(volume).patches
    lifted.compile(backend="eager")
    for copied in (copy.copy(lifted), copy.deepcopy(lifted), pickle.loads(pickle.dumps(lifted))):
        assert type(copied) is type(lifted) and isinstance(copied, transformers.PreTrainedModel)
        assert copied._compiled_call_impl is None and torch.equal(copied(volume).patches, expected)


def test_accelerates_empty_weights_and_dispatch(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate, from the extra 'integrations'")
    host = BY_NAME["hf-dinov2"]
    source, volume = host.make(), host.volume()
    torch.save(source.state_dict(), tmp_path / "weights.bin")
    with accelerate.init_empty_weights():
        lifted = pcf.lift(host.build())
    names = lifted._no_split_modules
    loaded = accelerate.load_checkpoint_and_dispatch(
        lifted, str(tmp_path / "weights.bin"), device_map={"": "cpu"}, no_split_module_classes=names
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(volume).patches, pcf.lift(source)(volume).patches)


def test_loading_into_a_model_without_data():
    host = BY_NAME["hf-dinov2"]
    source, volume = host.make(), host.volume()
    with torch.device("meta"):
        lifted = pcf.lift(host.build()).eval()
    assert lifted.load_state_dict(source.state_dict(), assign=True) == ([], [])
    with torch.no_grad():
        assert torch.equal(lifted(volume).patches, pcf.lift(source)(volume).patches)
