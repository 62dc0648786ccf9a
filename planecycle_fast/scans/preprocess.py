"""From a scan to a model's volume, keeping track of where each voxel and each feature lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..hosts.placement import running_place
from ..inputs import check_one_of
from ..lifted import lifted_in
from ..weights.normalisation import normalisation_of
from .checks import gib
from .grids import scaled
from .scan import IMAGENET_MEAN, IMAGENET_STD, MAX_BYTES, Scan
from .transforms import Array, as_scan, channels, pad, resize, size_at
from .transforms import window as windowed
from .windows import PERCENTILES, Window, as_spacing, as_window, parse_window

__all__ = ["FITS", "PERCENTILES", "ModelInput", "Window", "parse_window", "prepare"]
FITS = ("pad", "resize")
BEYOND = 0.1  # of [0, 1], which interpolation by splines may reach


@dataclass(frozen=True, eq=False)
class ModelInput:
    """A model's volume, and what it shows."""

    pixels: Tensor  # (1, channels, D, height, width), mean removed, deviation divided out
    image: Tensor  # (D, height, width) in [0, 1], the same before that
    affine: np.ndarray  # (4, 4) float64, index (d, h, w, 1) of a pixel's centre to mm, like the scan's
    padding: tuple[int, int]  # pixels added at the end of height and width
    patch_size: tuple[int, int]  # of the model, pixels

    def feature_affine(self, patch_size: tuple[int, int] | None = None) -> np.ndarray:  # (4, 4)
        """Index (d, h, w, 1) of a patch, of this or another size, to the millimetres of its centre."""
        return self.affine @ scaled((1, *(self.patch_size if patch_size is None else patch_size)))


def prepare(
    scan: Scan | Array,  # (D, H, W)
    model: nn.Module | tuple[int, int],  # lifted; or the size of a patch, pixels
    window: Window | str | Sequence[float] | None = PERCENTILES,
    spacing: str | float | Sequence[float] | None = None,  # mm along D, H, W
    fit: str = "pad",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_bytes: int = MAX_BYTES,
) -> ModelInput:
    """A scan's one channel as equal ones of the model, of a size that is a multiple of the patch.

        given = pcf.prepare(pcf.load_scan("ct.nii.gz"), lifted, window=(-160, 240), spacing=1.5)
        features = lifted(given.pixels)  # what `planecycle-fast features` writes, for the same settings

    It is `transforms.window`, `resize`, `pad` and `channels` one after another, in one step of resampling.

    Args:
        scan: any intensities; an array or tensor has voxels of 1 mm, or is made a Scan by `transforms.as_scan`.
        model: the lifted model, whose patch size, mean and std are taken, and in whose dtype and where it runs the
            pixels are; or a patch size alone, with ImageNet's statistics, float32. Slices are patchified, depth is not.
        window: intensities that become black and white: two numbers, or text, "0.5%,99.5%" of percentiles; None: the
            scan is in [0, 1] already.
        spacing: resample to this, over the same extent, as nearly as whole voxels allow; None keeps the scan's.
        fit: what makes height and width a multiple of the patch: "pad" at their end, with black, or
            "resize" to the nearest multiple.
        mean, std: of the model's training images in [0, 1], per channel; they tell how many channels the model has.
        max_bytes: refuse to make a larger volume.

    Raises:
        TypeError: scan or model is something else.
        ValueError: an unknown fit, a volume beyond max_bytes, a window beside the scan's intensities, or a model that
            does not say what its mean and std are.
    """
    check_one_of(fit, FITS, "fit")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must both be given, or neither, got {mean} and {std}")
    scan, window = as_scan(scan), None if window is None else as_window(window)
    if window is None:
        least, most = float(scan.voxels.min()), float(scan.voxels.max())
        if not (least >= -BEYOND and most <= 1 + BEYOND):
            raise ValueError(f"scan must be in [0, 1] where window is None, got {least:g} to {most:g}")
    patch_size, like = model, None
    if not isinstance(model, (tuple, list)):
        lifted = lifted_in(model)
        patch_size = lifted.adapter.patch_size
        like = running_place(lifted)
        if mean is None:
            mean, std = normalisation_of(lifted.adapter.model, lifted.adapter.in_channels)
    elif mean is None:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    shape = list(scan.voxels.shape) if spacing is None else size_at(scan, as_spacing(spacing))
    padding = (0, 0)
    if fit == "resize":
        shape[1:] = [max(1, round(n / p)) * p for n, p in zip(shape[1:], patch_size)]
    else:
        padding = tuple([-n % p for n, p in zip(shape[1:], patch_size)])
    padded = (shape[0], *[n + more for n, more in zip(shape[1:], padding)])
    if len(mean) * 4 * math.prod(padded) > max_bytes:
        size = " x ".join(map(str, padded))
        raise ValueError(
            f"scan must make a volume of at most {gib(max_bytes)} for the model, got {size} pixels; "
            "a larger spacing makes it smaller"
        )
    image = pad(resize(scan if window is None else windowed(scan, window), shape), padded, where="end", value=0.0)
    pixels = channels(image, mean, std)
    return ModelInput(
        pixels if like is None else pixels.to(*like), image.voxels, image.affine, padding, tuple(patch_size)
    )
