"""A scan in memory: spacing, intensities, and the input of a model."""

import dataclasses

import numpy as np
import pytest
import torch

from planecycle_fast.scans.scan import IMAGENET_MEAN, IMAGENET_STD, Scan, model_input


def test_a_scan_has_the_spacing_of_its_affine_and_does_not_change():
    affine = np.array([[0, 0, 1.5, 4], [0, -2, 0, 5], [3, 0, 0, 6], [0, 0, 0, 1]])
    scan = Scan(torch.zeros(2, 3, 4), affine, "SPR")
    assert scan.spacing == (3.0, 2.0, 1.5) and all(type(s) is float for s in scan.spacing)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scan.axes = None
    assert Scan(torch.zeros(2, 3, 4), affine).axes is None


def test_model_input_has_cubic_tokens_and_imagenet_statistics():
    image = torch.rand(20, 30, 40)
    volume = model_input(image, spacing=(3.0, 1.0, 1.0), patch_size=(14, 14), size=112)
    # Sides of 60, 30 and 40 mm: the longest is 8 tokens, so a token is 7.5 mm.
    assert volume.shape == (1, 3, 8, 4 * 14, 5 * 14)
    for channel in range(3):
        grey = volume[0, channel] * IMAGENET_STD[channel] + IMAGENET_MEAN[channel]
        torch.testing.assert_close(grey.mean(), image.mean(), rtol=0.02, atol=0)
        assert grey.min() >= -1e-6 and grey.max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="size must be at least one patch, 14 pixels, got 13"):
        model_input(image, (1, 1, 1), (14, 14), 13)


def test_resampling_keeps_places():
    image = torch.zeros(40, 20, 20)
    image[30:34, 4:8, 12:16] = 1
    volume = model_input(image, (1.0, 1.0, 1.0), (4, 4), 40)  # 10 x 5 x 5 tokens of 4 mm
    assert volume.shape == (1, 3, 10, 20, 20)
    bright = volume[0, 0].flatten().argmax().item()
    d, h, w = bright // 400, bright // 20 % 20, bright % 20
    assert d in (7, 8) and 4 <= h < 8 and 12 <= w < 16


def test_a_size_that_no_memory_holds():
    with pytest.raises(ValueError, match="size must leave a volume of at most 8 GiB, got 100000, which makes it"):
        model_input(torch.rand(4, 5, 6), (1, 1, 1), (14, 14), 100_000)
