"""transformers' Trainer: checkpoints that it writes, resumes from and takes the best of."""

import copy

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME

transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra 'hf'")
pytest.importorskip("accelerate", reason="needs accelerate, from the extra 'integrations'")

HOSTS = ["hf-dinov3"]
MORE = ["hf-dinov2", "hf-vit", "hf-clip", "timm-dinov3-s", "facebook-stand-in"]
HOSTS += [pytest.param(name, marks=pytest.mark.full) for name in MORE]


class Head(nn.Module):
    def __init__(self, lifted):
        super().__init__()
        self.backbone, self.head = lifted, nn.Linear(64, 2)

    def forward(self, volume, labels):
        logits = self.head(self.backbone(volume).pooled())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Settings(transformers.PretrainedConfig):
    model_type = "around-lifted"  # of its own: transformers saves those of its own models under other keys


class Pretrained(transformers.PreTrainedModel):
    config_class = Settings
    _supports_sdpa = True

    def __init__(self, lifted):
        super().__init__(self.config_class())
        self.inner = Head(lifted)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, volume, labels):
        return self.inner(volume, labels)


class Trainer(transformers.Trainer):
    """Also of a lifted model by itself, which knows no loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        if not isinstance(self.model, pcf.LiftedModel):
            return super().compute_loss(model, inputs, return_outputs)
        features = model(inputs["volume"]).pooled()
        loss = nn.functional.cross_entropy(features, inputs["labels"])
        return (loss, {"logits": features}) if return_outputs else loss

    def prediction_step(self, model, inputs, *_, **__):
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


MODELS = {"itself": lambda lifted: lifted, "in a module": Head, "in a PreTrainedModel": Pretrained}


def trainer(model, volumes, folder, **settings):
    settings = dict(max_steps=3, save_steps=2, save_strategy="steps", learning_rate=1e-2, seed=0) | settings
    arguments = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **settings
    )
    data = [{"volume": volume, "labels": i % 2} for i, volume in enumerate(volumes)]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("around", MODELS)
@pytest.mark.parametrize("name", HOSTS)
def test_resumed_from_a_checkpoint(name, around, tmp_path):
    host = BY_NAME[name]
    model, volumes = MODELS[around](pcf.lift(host.make(), pool_method="PCm")), host.volume(depth=2)
    fresh = copy.deepcopy(model)
    trainer(model, volumes, tmp_path).train()
    trained = state_of(model)
    trainer(fresh, volumes, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(state_of(fresh), trained, rtol=0, atol=1e-4)  # a step changes weights by 1e-2
    if around == "itself" and name.startswith("hf"):
        back = pcf.from_pretrained(tmp_path / "checkpoint-3")
        assert back.pool_method == "PCm" and all([torch.equal(t, trained[k]) for k, t in back.state_dict().items()])
        plain = transformers.AutoModel.from_pretrained(tmp_path / "checkpoint-3")
        assert all([torch.equal(t, trained[k]) for k, t in plain.state_dict().items()])


@pytest.mark.parametrize("name", ["hf-dinov3", pytest.param("hf-dinov2", marks=pytest.mark.full)])
def test_the_best_checkpoint_is_loaded(name, tmp_path):
    host = BY_NAME[name]
    lifted, volumes = pcf.lift(host.make()), host.volume(depth=2)
    best = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, learning_rate=0.3)
    found = trainer(lifted, volumes, tmp_path, **best, gradient_checkpointing=True)
    found.train()
    step = int(found.state.best_model_checkpoint.rpartition("-")[2])
    expected = pcf.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
    torch.testing.assert_close(lifted.state_dict(), expected, rtol=0, atol=0)
