"""From a scan to a model's volume: intensities, sizes, and where everything lies."""

import numpy as np
import pytest
import torch

from planecycle_fast.scans.checks import ScanWarning
from planecycle_fast.scans.preprocess import FITS, Window, parse_window, prepare
from planecycle_fast.scans.scan import Scan
from planecycle_fast.scans.windows import as_spacing

ALL = Window(0, 1)
AFFINE = np.array([[0, 0.3, 1.5, -20], [0.2, -2.0, 0.1, 30], [3.0, 0, 0, 5], [0, 0, 0, 1]])


def scan(*shape):
    torch.manual_seed(0)
    return Scan(torch.rand(shape), AFFINE, "SPR")


@pytest.mark.parametrize("text, window", [
    ("-160,240", Window(-160, 240)),
    (" 0.5% , 99.5%", Window(0.5, 99.5, percent=True)),
    ("1e3,2.5E3", Window(1000, 2500)),
    (".5,+1.", Window(0.5, 1)),
])  # fmt: skip
def test_windows(text, window):
    assert parse_window(text) == window and parse_window(str(window)) == window


@pytest.mark.parametrize(
    "text", ["", "1", "1,2,3", "2,1", "1,1", "1%,2", "a,b", "nan,1", "-1%,50%", "0%,100.1%", "1 2"]
)
def test_bad_windows(text):
    with pytest.raises(ValueError, match="window must .*, got"):
        parse_window(text)


def test_windows_of_intensities_and_percentiles():
    voxels = torch.arange(101.0).view(1, 1, 101)
    assert torch.equal(Window(20, 70).apply(voxels), ((voxels - 20) / 50).clamp(0, 1))
    assert torch.equal(Window(20, 70, percent=True).apply(voxels), ((voxels - 20) / 50).clamp(0, 1))
    almost_empty = torch.zeros(1, 1, 10_000)
    almost_empty[..., 7] = 3
    with pytest.warns(
        ScanWarning, match="window 0.5%,99.5% has no width in this scan: its extremes, 0 and 3, are black"
    ):
        assert Window(0.5, 99.5, percent=True).apply(almost_empty).sum() == 1
    for window in (Window(-9, 0), Window(100, 200)):
        with pytest.raises(ValueError, match="window must overlap the scan's intensities, 0 to 100, got"):
            window.apply(voxels)


def test_spacings():
    assert as_spacing("2") == (2, 2, 2) and as_spacing("3,1.5, .5") == (3, 1.5, 0.5)
    for text in ("", "1,2", "0", "1,2,-3", "inf", "nan", "a", "1,2,3,4"):
        with pytest.raises(ValueError, match="spacing must be millimetres, one number or three for D, H, W, got"):
            as_spacing(text)


def test_one_channel_three_times_with_the_models_statistics():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    given = prepare(scan(2, 8, 12), (4, 4), ALL, mean=mean, std=std)
    assert given.pixels.shape == (1, 3, 2, 8, 12) and given.padding == (0, 0)
    for channel in range(3):
        assert torch.equal(given.pixels[0, channel], (given.image - mean[channel]) / std[channel])


def test_padding_is_black_and_at_the_end():
    source = scan(2, 9, 11)
    given = prepare(source, (4, 6), ALL)
    assert given.image.shape == (2, 12, 12) and given.padding == (3, 1)
    assert (
        torch.equal(given.image[:, :9, :11], source.voxels)
        and not given.image[:, 9:].any()
        and not given.image[..., 11:].any()
    )
    assert np.array_equal(given.affine, AFFINE)


@pytest.mark.parametrize(
    "size, resized", [((9, 11), (8, 12)), ((2, 3), (4, 6)), ((10, 15), (8, 12)), ((8, 12), (8, 12))]
)
def test_resizing_goes_to_the_nearest_multiple(size, resized):
    given = prepare(scan(2, *size), (4, 6), ALL, fit="resize")
    assert given.image.shape == (2, *resized) and given.padding == (0, 0)


def corners(affine, shape):
    """Millimetres of the eight outer corners of an array of cells."""
    indices = np.array([(d, h, w, 1) for d in (0, 1) for h in (0, 1) for w in (0, 1)]) * (*shape, 1) - (
        0.5,
        0.5,
        0.5,
        0,
    )
    return (affine @ indices.T)[:3].T


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (6.0, 5.0, 0.7), (100.0, 100.0, 100.0)])
def test_resampling_covers_the_same_extent(spacing):
    source = scan(5, 24, 36)
    given = prepare(source, (4, 6), ALL, spacing, fit="resize")
    np.testing.assert_allclose(corners(given.affine, given.image.shape), corners(AFFINE, (5, 24, 36)), atol=1e-9)
    if spacing is not None:  # as nearly as whole voxels and whole patches allow
        assert given.image.shape[0] == max(1, round(5 * source.spacing[0] / spacing[0]))


def test_features_are_at_the_centres_of_their_patches():
    given = prepare(scan(3, 8, 12), (4, 6), ALL)
    pixels = np.array([(1, h, w, 1) for h in range(4, 8) for w in range(6, 12)])
    np.testing.assert_allclose(
        given.feature_affine((4, 6)) @ (1, 1, 1, 1), (given.affine @ pixels.T).mean(1), atol=1e-12
    )


@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 1.0), (4.0, 3.0, 3.5)])
@pytest.mark.parametrize("fit", FITS)
def test_a_ramp_keeps_its_millimetres(spacing, fit):
    """Intensities that are millimetres, along each axis of space in turn, are read off the pixels again."""
    shape = (9, 40, 44)
    indices = np.vstack([np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape)))])
    for axis in range(3):
        ramp = (AFFINE @ indices)[axis].reshape(shape)
        given = prepare(Scan(torch.from_numpy(ramp).float(), AFFINE, "SPR"), (4, 6), Window(-500, 500), spacing, fit)
        inner = tuple(slice(2, n - 2 - more) for n, more in zip(given.image.shape, (0, *given.padding)))
        where = np.indices(given.image.shape)[(slice(None), *inner)].reshape(3, -1)
        expected = (given.affine @ np.vstack([where, np.ones((1, where.shape[1]))]))[axis]
        got = given.image[inner].double().numpy().reshape(-1) * 1000 - 500
        np.testing.assert_allclose(got, expected, atol=0.25)  # mm; the filter's weights; half a voxel is 0.75 or more


def test_bad_settings():
    with pytest.raises(ValueError, match="fit must be one of pad, resize, got 'crop'"):
        prepare(scan(2, 8, 8), (4, 4), ALL, fit="crop")
    with pytest.raises(ValueError, match="at most .* GiB for the model, got 32 x 32 x 32 pixels; a larger spacing"):
        prepare(scan(32, 32, 32), (4, 4), ALL, max_bytes=3 * 4 * 32**3 // 4)
    assert prepare(scan(32, 32, 32), (4, 4), ALL, max_bytes=3 * 4 * 32**3).pixels.shape == (1, 3, 32, 32, 32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_finer_than_a_new_voxel_is_smoothed(axis):
    stripes = (torch.arange(64) % 2).float().view([-1 if a == axis else 1 for a in range(3)]).expand(64, 64, 64)
    given = prepare(Scan(stripes, np.eye(4), "SPR"), (4, 4), ALL, spacing=(4.0, 4.0, 4.0))
    assert given.image.shape == (16, 16, 16)
    assert (given.image - 0.5).abs().max() < 0.1
