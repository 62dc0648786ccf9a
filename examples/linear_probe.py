"""A linear probe on frozen features of volumes: ``python examples/linear_probe.py``, about half a minute on a CPU.

Does a disc grow brighter or darker along D? Slice by slice, no probe can tell; PlaneCycle's layers see the slices
together. Needs the demo's weights (`make demo`). docs/features.md has the task at its full size, with averages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import planecycle_fast as pcf
from planecycle_fast.weights.load import DEMO_MODEL

VOLUMES, DEPTH, PIXELS, TRAIN = 90, 6, 56, 60


def make_volumes() -> tuple[Tensor, Tensor]:  # (N, 3, D, height, width); (N,) of 0 and 1
    labels = torch.arange(VOLUMES) % 2
    rising = torch.linspace(-2, 2, DEPTH).expand(VOLUMES, -1)
    brightness = torch.where(labels[:, None] == 1, rising, rising.flip(1))  # (N, D)
    at = torch.linspace(-1, 1, PIXELS)
    centre = 0.6 * torch.rand(VOLUMES, 2, 1, 1) - 0.3
    disc = (at[:, None] - centre[:, 0]) ** 2 + (at - centre[:, 1]) ** 2 < 0.2  # (N, height, width)
    noise = F.interpolate(torch.randn(VOLUMES * DEPTH, 1, 7, 7), PIXELS).view(VOLUMES, DEPTH, PIXELS, PIXELS)
    images = torch.where(disc[:, None], brightness[..., None, None], noise)
    return images[:, None].expand(-1, 3, -1, -1, -1), labels


def accuracy(features: Tensor, labels: Tensor) -> float:  # (N, F), (N,)
    """Of a linear layer, fitted to the first volumes, on the others."""
    features = (features - features[:TRAIN].mean(0)) / features[:TRAIN].std(0)
    probe = nn.Linear(features.shape[1], 2)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(probe(features[:TRAIN]), labels[:TRAIN]).backward()
        optimizer.step()
    return (probe(features[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    volumes, labels = make_volumes()
    model, _ = pcf.load_model(DEMO_MODEL)
    for mode, position in (("slice2d", "none"), ("planecycle", "none"), ("planecycle", "rope1d")):
        lifted = pcf.lift(model, mode, depth_position=position)
        with torch.no_grad():
            features = torch.cat([lifted(batch).patches.mean((1, 2, 3)) for batch in volumes.split(10)])
        print(f"{mode:10} depth_position={position:6} {accuracy(features, labels):.2f} right, 0.5 is chance")


if __name__ == "__main__":
    main()
