"""A scan in memory, and making it the input of a lifted model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.normalisation import IMAGENET_MEAN, IMAGENET_STD
from .checks import gib

MAX_BYTES = 8 * 2**30  # enough for 512 x 512 x 2000 voxels of any dtype up to 32 bits


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Scan:
    """A 3D image.

    Attributes:
        voxels: (D, H, W) float32.
        affine: (4, 4) float64, a voxel's (d, h, w, 1) to millimetres in RAS+: to the patient's right, to the
            front, up. Without `axes` it holds the spacing only.
        axes: the directions in which D, H and W increase, such as "SPR"; None where the file does not tell.
    """

    voxels: Tensor
    affine: np.ndarray
    axes: str | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along D, H, W; of a sheared scan along its own axes, not straight across."""
        depth, height, width = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return depth, height, width


def model_input(
    image: Tensor,  # (D, H, W) in [0, 1]
    spacing: tuple[float, float, float],  # mm along D, H, W
    patch_size: tuple[int, int],  # pixels
    size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,  # per channel
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:  # (1, channels, D', height, width)
    """An image as a model's volume, resampled so that tokens are as deep as they are wide.

    The longest side becomes about `size` pixels of a slice; the others follow the millimetres, rounded
    to whole tokens. Channels as `in_channels` makes them.

    Raises ValueError if `size` is smaller than a patch, or the volume would need more than MAX_BYTES.
    """
    if size < max(patch_size):
        raise ValueError(f"size must be at least one patch, {max(patch_size)} pixels, got {size}")
    extent = [n * s for n, s in zip(image.shape, spacing)]  # mm
    token = max(extent) / (size / max(patch_size))  # mm
    depth, rows, columns = (max(1, round(e / token)) for e in extent)
    shape = (depth, rows * patch_size[0], columns * patch_size[1])
    if len(mean) * 4 * math.prod(shape) > MAX_BYTES:
        raise ValueError(f"size must leave a volume of at most {gib(MAX_BYTES)}, got {size}, which makes it {shape}")
    return in_channels(resample(image, shape), mean, std)


def in_channels(
    image: Tensor,  # (D, H, W) in [0, 1]
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:  # (1, channels, D, H, W)
    """The image once for each channel that `mean` and `std` have, less the one and divided by the other.

    Raises ValueError where these are not as many, a deviation is not above 0, or what they make is not finite.
    """
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean and std must have one number per channel, got {len(mean)} and {len(std)}")
    means, stds = (torch.tensor(t, device=image.device).view(1, -1, 1, 1, 1) for t in (mean, std))
    pixels = (image[None, None] - means) / stds
    if not (stds > 0).all() or not torch.isfinite(pixels).all():
        raise ValueError(f"mean and std must make finite pixels, with std above 0, got {tuple(mean)} and {tuple(std)}")
    return pixels


def resample(
    image: Tensor,  # (D, H, W)
    shape: tuple[int, int, int],
) -> Tensor:  # shape
    """The same extent in other voxels, linearly; an axis that shrinks is smoothed by as much as it shrinks.

    By torch's antialiased interpolation, which exists in 2D. Its mode "area" would shift voxels by up to
    half of one wherever sizes do not divide.
    """
    depth, height, width = shape
    slices = F.interpolate(image[:, None], (height, width), mode="bilinear", antialias=True)  # (D, 1, height, width)
    columns = slices.flatten(1).T[None, None]  # (1, 1, height*width, D)
    columns = F.interpolate(columns, (height * width, depth), mode="bilinear", antialias=True)
    return columns[0, 0].T.reshape(shape)
