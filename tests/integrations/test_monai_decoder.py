"""MONAI's UNETR decoder on a pyramid of a lifted model's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME

pytest.importorskip("monai", reason="needs monai, extra monai")
from monai.networks.blocks import UnetOutBlock, UnetrUpBlock


class Unetr(nn.Module):
    """Scores (B, classes, D, 4*H, 4*W): levels of 1/2, 1, 2 and 4 cells per patch, coarse to fine."""

    def __init__(self, lifted, channels, classes):
        super().__init__()
        self.lifted = lifted
        self.sides = nn.ModuleList([nn.Conv3d(channels, width, 1) for width in (4, 8, 8, 16)])
        ups = [(16, 8), (8, 8), (8, 4)]
        self.ups = nn.ModuleList([UnetrUpBlock(3, a, b, 3, (1, 2, 2), "instance", res_block=True) for a, b in ups])
        self.out = UnetOutBlock(3, 4, classes)

    def forward(self, volume):
        levels = pcf.pyramid(self.lifted.intermediate(volume, 4))  # the first layer fine, the last one coarse
        *skips, x = [side(level) for side, level in zip(self.sides, levels)]
        for up, skip in zip(self.ups, skips[::-1]):
            x = up(x, skip)
        return self.out(x)


@pytest.mark.parametrize("name", ["timm-dinov3-s", pytest.param("hf-dinov3", marks=pytest.mark.full)])
def test_a_unetr_learns_and_so_does_the_backbone(name):
    host = BY_NAME[name]
    layers = {"num_hidden_layers" if name.startswith("hf") else "depth": 4}
    model, volume = Unetr(pcf.lift(host.make(**layers)), 64, 2), host.volume(batch=1, depth=2, grid=(2, 2))
    target = (volume.mean(1)[:, :, ::4, ::4] > 0).long()  # (1, 2, 8, 8)
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        scores = model(volume)
        assert scores.shape == (1, 2, 2, 8, 8)
        loss = F.cross_entropy(scores, target)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    for block in (0, -1):
        gradients = [p.grad for p in model.lifted.blocks[block].parameters() if p.requires_grad]
        assert len(gradients) > 5 and sum([float(g.abs().sum()) for g in gradients if g is not None]) > 0
