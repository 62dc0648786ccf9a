"""A vision transformer of your own, lifted by three attributes and four methods: ``python examples/own_adapter.py``."""

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
        layer = nn.TransformerEncoderLayer(CHANNELS, 4, 256, activation="gelu", batch_first=True, norm_first=True)
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
    other = torch.cat([volume[:, :, :1] + 1, volume[:, :, 1:]], 2)  # slice 0 alone has changed: which features do?
    for mode in ("planecycle", "slice2d"):
        lifted = pcf.lift(model, mode, adapter=SmallAdapter)
        patches = lifted(volume).patches  # (B, D, H, W, C)
        changes = (lifted(other).patches - patches).abs().amax((0, 2, 3, 4))  # (D,)
        print(f"{mode}: slice 0 reaches slices {(changes > 1e-4).nonzero().flatten().tolist()}")
    own = model.encoder(model.tokens(volume[:, :, 2]))[:, 1:]  # (B, h*w, C)
    error = (patches[:, 2].flatten(1, 2) - own).abs().max()
    print(f"slice2d: slice 2 differs from the 2D model by at most {error:.1e}")


if __name__ == "__main__":
    main()
