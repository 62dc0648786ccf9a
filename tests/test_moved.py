"""Old names of modules, and files pickled with them: tests/data was written before modules lay in packages."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.moved import MOVED, new_name

DATA = Path(__file__).parent / "data"
# All that pickles of lifted and accelerated models named then, of every host in tests/host_models.py.
PICKLED = """
accelerated ForwardFeatures
accelerated IntermediateLayers
accelerated Replicate
accelerated Report
adapters.dinov3 FacebookBlock
adapters.dinov3 FacebookDINOv3
adapters.huggingface_clip HuggingFaceCLIP
adapters.huggingface_clip HuggingFaceSiglip
adapters.huggingface_dino HuggingFaceDINOv3
adapters.huggingface_dino HuggingFaceDinov2
adapters.huggingface_dino HuggingFaceDinov2Backbone
adapters.huggingface_parts ClipBlock
adapters.huggingface_parts DinoBlock
adapters.huggingface_parts FirstViTBlock
adapters.huggingface_parts ViTBlock
adapters.huggingface_vit HuggingFaceIJepa
adapters.huggingface_vit HuggingFaceMAE
adapters.huggingface_vit HuggingFaceViT
adapters.timm TimmBlock
adapters.timm TimmVisionTransformer
adapters.timm_beit TimmBeit
adapters.timm_eva TimmDINOv3
adapters.timm_eva TimmEva
adapters.timm_eva TimmEvaBlock
blocks LiftedBlock
buffers BufferCheck
converter PlaneCycleBlock
features VolumeFeatures
framework_class _empty
lifted LiftedModel
module_tree LiftedTree
module_tree Tree
planes Plane
reading Reading
"""


@pytest.mark.parametrize("kind", ["lifted", "accelerated", "converted"])
def test_models_pickled_before_load_and_compute_the_same(kind):
    saved = torch.load(DATA / f"{kind}.pt", weights_only=False)
    model, volume = saved["model"], saved["volume"]
    with torch.no_grad():
        if kind == "lifted":
            found = model(volume).patches
        else:
            found = model.forward_features(volume)["x_norm_patchtokens"]
    torch.testing.assert_close(found, saved["expected"])
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}


@pytest.mark.parametrize("line", PICKLED.split("\n")[1:-1])
def test_what_pickles_name_is_there(line):
    module, name = line.split()
    found = getattr(importlib.import_module(f"planecycle_fast.{module}"), name)
    assert found.__name__ == name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_same_module(old):
    new = importlib.import_module(new_name(f"planecycle_fast.{old}"))
    spec = new.__spec__
    assert importlib.import_module(f"planecycle_fast.{old}") is new
    assert new.__spec__ is spec and new.__name__ == spec.name  # reload, pickle and tracebacks say where it is
    assert getattr(pcf, old.partition(".")[0]) is importlib.import_module(f"planecycle_fast.{old.partition('.')[0]}")


def test_no_function_of_ours_is_hidden_by_an_old_name():
    hidden = {old.partition(".")[0] for old in MOVED} & set(pcf.__all__)
    assert all(isinstance(getattr(pcf, name), ModuleType) for name in hidden)


def test_what_was_never_there_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="planecycle_fast.plains"):
        importlib.import_module("planecycle_fast.plains")
    with pytest.raises(AttributeError, match="planecycle_fast.*no attribute 'plains'"):
        pcf.plains  # noqa: B018
