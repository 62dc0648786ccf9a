"""A vision transformer that no library knows, lifted: ``python examples/own_adapter.py``. Random weights, seconds.
Four methods and three attributes tell `lift` what comes before the blocks, what a block is, and what comes after."""

import torch
from torch import Tensor, nn

import planecycle_fast as pcf

PATCH, HEIGHT, WIDTH, CHANNELS = 8, 40, 48, 64


class Small(nn.Module):
    """A class token, patches with learned positions, torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.places = nn.Parameter(torch.randn(HEIGHT // PATCH * WIDTH // PATCH, CHANNELS))
        settings = dict(dim_feedforward=256, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(CHANNELS, 4, **settings)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(CHANNELS), enable_nested_tensor=False)

    def tokens(self, images: Tensor) -> Tensor:  # (N, 3, height, width) -> (N, 1 + h*w, C)
        return torch.cat([self.cls.expand(len(images), -1, -1), self.stem(images).flatten(2).mT + self.places], 1)


class SmallAdapter(pcf.Adapter):
    num_globals, has_cls, patch_size = 1, True, (PATCH, PATCH)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layers

    def embed(self, images: Tensor) -> Tensor:  # (N, 3, height, width) -> (N, g + h*w, C)
        return self.model.tokens(images)

    def call_block(self, block, tokens: Tensor, grid, sincos) -> Tensor:  # (N, g + L, C) -> the same, on any plane
        return block(tokens)

    def norm(self, tokens: Tensor) -> Tensor:  # (N, rows, C) -> the same
        return self.model.encoder.norm(tokens)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, volume = Small().eval(), torch.randn(1, 3, 6, HEIGHT, WIDTH)  # (B, 3, D, height, width)
    other = volume.clone()
    other[:, :, 0] += 1  # slice 0 alone; in which slices do features change?
    for mode in ("slice2d", "planecycle"):
        lifted = pcf.lift(model, mode, adapter=SmallAdapter)
        moved = (lifted(other).patches - lifted(volume).patches).abs().amax((0, 2, 3, 4)) > 1e-4
        print(f"{mode}: slice 0 reaches slices {moved.nonzero().flatten().tolist()}")
    slices = pcf.lift(model, "slice2d", adapter=SmallAdapter)(volume)
    error = (slices.patches[:, 2].flatten(1, 2) - model.encoder(model.tokens(volume[:, :, 2]))[:, 1:]).abs().max()
    print(f"slice2d: slice 2 differs from the 2D model by at most {error:.1e}")


if __name__ == "__main__":
    main()
