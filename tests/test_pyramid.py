"""VolumeFeatures.maps, and pyramids of them: sizes, values, gradients, and a decoder that learns on them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planecycle_fast as pcf

from .host_models import BY_NAME


@pytest.fixture(scope="module")
def lifted():
    torch.manual_seed(0)
    return pcf.lift(BY_NAME["timm-dinov3-s"].make(depth=4))


@pytest.mark.parametrize("globals_at", ["depth", "plane"])
def test_maps_are_a_view_of_the_patches(lifted, globals_at):
    lifted = pcf.lift(pcf.unlift(lifted), globals_at=globals_at)
    volume = BY_NAME["timm-dinov3-s"].volume()
    with torch.no_grad():
        for features in [lifted(volume), *lifted.intermediate(volume, [0, 2])]:
            assert features.maps.shape == (2, 64, 4, 3, 5)
            assert torch.equal(features.maps[0, :, 3, 1, 2], features.patches[0, 3, 1, 2])
            assert features.maps.data_ptr() == features.patches.data_ptr()
    assert pcf.VolumeFeatures._fields == ("patches", "cls", "registers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_maps_of_what_a_trace_returns(lifted):
    volume = BY_NAME["timm-dinov3-s"].volume(batch=1, depth=2, grid=(2, 2))

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.lifted = lifted

        def forward(self, volume):
            return self.lifted(volume).maps

    with torch.no_grad():
        traced = torch.jit.trace(Maps(), volume)
        torch.testing.assert_close(traced(volume), lifted(volume).maps, rtol=1e-4, atol=1e-5)


def features_of(patches):
    return pcf.VolumeFeatures(patches, None, None)


def test_sizes_and_values():
    patches = torch.randn(2, 4, 6, 8, 3)
    four, two, one, half = pcf.pyramid(features_of(patches), depth_scales=(2, 1, 1, 0.5))
    assert four.shape == (2, 3, 8, 24, 32) and two.shape == (2, 3, 4, 12, 16)
    maps = patches.permute(0, 4, 1, 2, 3)
    assert torch.equal(one, maps)
    assert torch.equal(two, F.interpolate(maps, (4, 12, 16), mode="trilinear", align_corners=False))
    wanted = maps.view(2, 3, 2, 2, 3, 2, 4, 2).mean((3, 5, 7))  # of all cells that it covers
    torch.testing.assert_close(half, wanted)


def test_depth_may_shrink_where_slices_grow():
    maps = torch.randn(1, 4, 3, 5, 2)
    [level] = pcf.pyramid(features_of(maps), [2], 0.25)
    wanted = F.interpolate(maps.movedim(-1, 1), (4, 6, 10), mode="trilinear", align_corners=False).mean(2, keepdim=True)
    torch.testing.assert_close(level, wanted)


def test_a_fine_pattern_does_not_become_a_coarse_one():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    [half] = pcf.pyramid(features_of(board.float().view(1, 1, 8, 8, 1)), [0.5])
    assert torch.equal(half, torch.full((1, 1, 1, 4, 4), 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([torch.ones(1)], [1]), TypeError, "features must be VolumeFeatures or a list of them, got Tensor at 0"),
        (((features_of(torch.ones(1, 2, 3, 4, 5)),) * 3,), ValueError, "features must be one.*4 scales, got 3"),
        ((features_of(torch.ones(1, 2, 3, 4, 5)), [0.5]), ValueError, "scale 0.5 .* got 3 patches along H"),
        ((features_of(torch.ones(1, 3, 2, 4, 5)), [1], 0.5), ValueError, "scale 0.5 .* got 3 patches along D"),
        ((features_of(torch.ones(1, 3, 2, 4, 5)), [1], (1, 2)), ValueError, "depth_scales must be one.*got 2"),
        ((features_of(torch.ones(1, 3, 2, 4, 5)), [0]), ValueError, "scales must hold finite numbers above 0, got 0"),
        ((features_of(torch.ones(1, 3, 2, 4, 5)), ["4"]), TypeError, "scales must hold numbers, got '4'"),
        ((features_of(torch.ones(1, 3, 2, 4, 5)), []), ValueError, "scales must hold at least one number"),
    ],
)
def test_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        pcf.pyramid(*arguments)


class FPN(nn.Module):
    """As detection has it: each level to one width, coarse ones added to finer ones."""

    def __init__(self, channels, levels):
        super().__init__()
        self.sides = nn.ModuleList([nn.Conv3d(channels, 8, 1) for _ in range(levels)])
        self.out = nn.Conv3d(8, 2, 3, padding=1)

    def forward(self, levels):
        levels = [side(level) for side, level in zip(self.sides, levels)]
        x = levels[-1]
        for level in levels[-2::-1]:
            x = level + F.interpolate(x, level.shape[2:])
        return self.out(x)


def test_a_plain_fpn_learns_and_so_does_the_backbone():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(depth=4)), host.volume(batch=1, depth=2, grid=(2, 2))
    decoder = FPN(64, 4)
    target = (volume.mean(1)[:, :, ::4, ::4] > 0).long()  # (1, 2, 8, 8)
    optimizer = torch.optim.Adam([*lifted.parameters(), *decoder.parameters()], 3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        scores = decoder(pcf.pyramid(lifted.intermediate(volume, 4)))
        assert scores.shape == (1, 2, 2, 8, 8)
        loss = F.cross_entropy(scores, target)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc1.weight"):
        assert lifted.get_parameter(name).grad.abs().sum() > 0
