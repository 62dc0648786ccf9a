"""Loops that others run: lightning's Trainer and accelerate's Accelerator, on one process."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import planecycle_fast as pcf

from ..host_models import BY_NAME

HOST = BY_NAME["timm-dinov2-s-reg4"]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning_resumes_to_the_bit(precision, checkpointed, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning, of the extra integrations")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            model = HOST.make().train()
            model.set_grad_checkpointing(checkpointed)
            self.backbone, self.head = pcf.lift(model), torch.nn.Linear(64, 2)

        def training_step(self, batch, i):
            return torch.nn.functional.cross_entropy(self.head(self.backbone(batch[0]).pooled()), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    data = DataLoader(TensorDataset(HOST.volume(4), torch.tensor([0, 1, 1, 0])), batch_size=1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    how = {"accelerator": "cpu", "precision": precision, "accumulate_grad_batches": 2, "default_root_dir": tmp_path}

    def fit(epochs, resumed=None):
        task, trainer = Task(), lightning.Trainer(max_epochs=epochs, **how, **quiet)
        trainer.fit(task, data, ckpt_path=resumed)
        return task, trainer

    whole, first = fit(2)[0], fit(1)
    first[1].save_checkpoint(tmp_path / "first.ckpt")
    again = fit(2, tmp_path / "first.ckpt")[0]
    assert whole.state_dict().keys() == {f"backbone.{k}" for k in HOST.make().state_dict()} | {
        "head.weight",
        "head.bias",
    }
    changed = 0
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        changed += not torch.equal(first[0].state_dict()[name], value)
    assert changed > 10


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator(precision, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate, of the extra integrations")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    lifted, volume = pcf.lift(HOST.make().train()), HOST.volume(1)
    before = {name: value.clone() for name, value in lifted.state_dict().items()}
    prepared, optimizer = accelerator.prepare(lifted, torch.optim.SGD(lifted.parameters(), 0.1))
    for _ in range(2):
        with accelerator.accumulate(prepared):
            features = prepared(volume)
            assert isinstance(features, pcf.VolumeFeatures)
            accelerator.backward(features.pooled().square().mean())
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(prepared)
    assert state.keys() == before.keys() and not all(torch.equal(state[name], before[name]) for name in before)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        expected = prepared(volume)
        lifted.load_state_dict(before)
        accelerator.load_state(tmp_path)
        torch.testing.assert_close(prepared(volume), expected, rtol=0, atol=0)
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert isinstance(bare, pcf.LiftedModel)
        assert bare.attention_maps(volume)[0].cls.isfinite().all()
    accelerate.state.AcceleratorState._reset_state(True)
