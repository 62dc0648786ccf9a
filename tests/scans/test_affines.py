"""Grids that are not right or not even: one check for all formats, and resampling that keeps every place."""

import tracemalloc

import numpy as np
import pytest

from planecycle_fast.scans.affines import regridded, shear_of, stack_axis
from planecycle_fast.scans.checks import Refused, ScanWarning
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.scans.files import load_scan

from ..commands.test_features import cube_at
from ..scan_writers import COUNTS, WRITERS, write_dicom, write_frames, write_nifti
from .bad_dicom import sheared
from .test_scan_traps import SHARED, enhanced, group

SHEAR = "must have axes at right angles, got a gantry tilt or shear of {} degrees"
KINDS = ["nii", "nii.gz", "nrrd", "dicom"]


def tilted(degrees, spacing=(0.5, 0.7, 2.5)):
    """As of a tilted gantry: slices lie as far apart along their normal as without."""
    affine = np.diag([*spacing, 1.0])
    affine[1, 2] = spacing[2] * np.tan(np.radians(degrees))
    affine[:3, 3] = (-20, 30, 7)
    return affine


def world_of(affine, shape):
    return (affine @ np.vstack([np.indices(shape).reshape(3, -1), np.ones((1, np.prod(shape)))]))[:3]


def linear(affine, shape, slope=(3.0, -2.0, 5.0)):
    return (slope @ world_of(affine, shape) + 100).reshape(shape)


def assert_linear_within(voxels, affine, source, shape, atol, slope=(3.0, -2.0, 5.0)):
    """What lies between the outermost voxels of the source has the value of its place, and nothing is missing."""
    world = world_of(affine, voxels.shape)
    index = (np.linalg.inv(source) @ np.vstack([world, np.ones((1, world.shape[1]))]))[:3].T
    within = ((index > -1e-4) & (index < np.array(shape) - 1 + 1e-4)).all(1)
    error = abs(voxels.reshape(-1) - (slope @ world + 100))[within]
    assert error.max() < atol
    volume = within.sum() * abs(np.linalg.det(affine[:3, :3])) / abs(np.linalg.det(source[:3, :3]))
    assert volume > 0.5 * np.prod([n - 1 for n in shape])
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    ends = (np.linalg.inv(affine) @ source @ corners.T)[:3].T
    assert (ends > -0.01).all() and (ends < np.array(voxels.shape) - 0.99).all()


# One check


@pytest.mark.parametrize("kind", KINDS)
def test_a_tilt_of_twenty_degrees_is_the_same_in_every_format(tmp_path, kind):
    affine, shape = tilted(20), (16, 14, 9)
    array = np.rint(linear(affine, shape) * 50).astype(np.int16)
    path = WRITERS[kind](tmp_path, array, affine)
    with pytest.raises(ValueError, match=SHEAR.format(20)) as raised:
        load_scan(path)
    assert "--spacing" in str(raised.value) and "--allow-shear" in str(raised.value)
    kept = load_scan(path, axes="RAS", allow_shear=True)
    assert np.array_equal(kept.voxels.numpy(), array) and kept.spacing[2] == pytest.approx(2.66, abs=0.01)
    np.testing.assert_allclose(kept.affine, affine, atol=1e-4)
    with pytest.warns(ScanWarning, match=f"^volume .*{SHEAR.format(20)}: resampled to a right grid of 16 x "):
        scan = load_scan(path, axes="RAS", regrid=True)
    assert scan.spacing == pytest.approx((0.5, 0.7, 2.5), abs=1e-4) and scan.voxels.shape[2] == 9
    assert shear_of(scan.affine, scan.voxels.shape) == 0
    assert_linear_within(scan.voxels.numpy() / 50, scan.affine, affine, shape, 0.05)


def test_frames_that_are_tilted(tmp_path):
    folder = write_frames(tmp_path / "a", COUNTS)
    frames = {"PlanePositionSequence": lambda k: group(ImagePositionPatient=[10, 20 + k, 30 + 3 * k])}
    enhanced(folder / "frames", SHARED, frames)
    with pytest.raises(ValueError, match=SHEAR.format(18.4)):
        load_scan(folder)
    assert np.array_equal(load_scan(folder, axes="LPS", allow_shear=True).affine[:3, 2], [0, -1, 3])


@pytest.mark.parametrize("column, change", [(1, (0.2, 0, 0)), (0, (0, 0, 0.1)), (2, (0.4, 0.4, 0)), (2, (0, -0.02, 0))])
@pytest.mark.parametrize("kind", ["nii", "nrrd"])
def test_any_shear_of_any_axis(tmp_path, kind, column, change):
    affine = np.eye(4)
    affine[:3, column] += change
    array = np.random.default_rng(0).normal(size=(40, 41, 42)).astype(np.float32)
    path = WRITERS[kind](tmp_path, array, affine)
    with pytest.raises(ValueError, match="must have axes at right angles, got a gantry tilt or shear of"):
        load_scan(path)
    assert np.allclose(load_scan(path, axes="RAS", allow_shear=True).affine, affine, atol=1e-5)
    with pytest.warns(ScanWarning, match="resampled to a right grid"):
        assert shear_of((scan := load_scan(path, regrid=True)).affine, scan.voxels.shape) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_oblique_scans_are_no_sheared_ones(tmp_path, kind):
    """Directions and positions rounded as files round them, of scans of any extent."""
    generator = np.random.default_rng(1)
    for number in range(6):
        turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
        turn[:, 2] *= np.sign(np.linalg.det(turn))
        affine = np.eye(4)
        affine[:3, :3] = turn * generator.uniform(0.3, 5, 3)
        affine[:3, 3] = generator.uniform(-200, 200, 3)
        shape = generator.integers(2, 30, 3)
        array = generator.integers(0, 99, shape).astype(np.int16)
        (tmp_path / str(number)).mkdir()
        scan = load_scan(WRITERS[kind](tmp_path / str(number), array, affine))
        assert scan.voxels.numel() == array.size


def test_what_is_rounding_and_what_is_a_tilt():
    for shape in ((512, 512, 30), (512, 512, 300), (64, 64, 40)):
        assert shear_of(tilted(0.1), shape) == 0
        assert shear_of(tilted(0.5), shape) == pytest.approx(0.5, abs=1e-6)
    assert shear_of(tilted(0.5), (512, 512, 2)) == 0  # 0.02 mm
    tiny = tilted(5, spacing=(0.005, 0.005, 0.01))  # a tenth of a millimetre is no rounding there
    assert shear_of(tiny, (64, 64, 64)) == pytest.approx(5, abs=1e-6)
    assert shear_of(tilted(20), (16, 16, 1)) == 0


def test_the_axis_across_planes():
    assert stack_axis(tilted(20)) == 2
    assert stack_axis(tilted(20)[:, [2, 1, 0, 3]]) == 0  # the thickest of two
    assert stack_axis(np.eye(4)) == 2


# A right grid


@pytest.mark.parametrize("seed", range(8))
def test_linear_intensities_at_random_shears(seed):
    generator = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    shear = np.eye(3) + np.triu(generator.uniform(-0.6, 0.6, (3, 3)), 1) * (1 if seed % 2 else [[0, 0, 1]] * 3)
    affine = np.eye(4)
    affine[:3, :3] = (turn @ shear * generator.uniform(0.5, 3, 3))[:, generator.permutation(3)]
    affine[:3, 3] = generator.uniform(-50, 50, 3)
    shape = tuple(int(n) for n in generator.integers(8, 16, 3))
    voxels, right = regridded(linear(affine, shape).astype(np.float32), affine, 2**30)
    assert shear_of(right, voxels.shape) == 0
    assert np.linalg.det(right) == pytest.approx(np.linalg.det(affine), rel=1e-6) or seed % 2 == 0
    assert abs(np.linalg.det(right)) == pytest.approx(abs(np.linalg.det(affine)), rel=1e-6)  # as fine as before
    assert_linear_within(voxels, right, affine, shape, 1e-3)


def test_a_right_grid_is_the_same_wherever_it_lies():
    array = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    near, far = tilted(20), tilted(20)
    far[:3, 3] *= 1e15  # mm, beside which a voxel is nothing
    (expected, there), (got, here) = (regridded(array, affine, 2**30) for affine in (near, far))
    assert np.array_equal(got, expected) and np.array_equal(here[:3, :3], there[:3, :3])


@pytest.mark.parametrize("degrees", [-30, -7, 3, 20, 40])
def test_a_sphere_stays_one(tmp_path, degrees):
    affine, shape = tilted(degrees, (1.0, 1.2, 2.5)), (40, 60, 20)
    centre = world_of(affine, shape).mean(1)
    far = np.linalg.norm(world_of(affine, shape) - centre[:, None], axis=0).reshape(shape)
    array = np.clip(12.5 - far, 0, 1).astype(np.float32) * 1000  # of a radius of 12 mm, with a soft edge
    with pytest.warns(ScanWarning):
        scan = load_scan(write_nifti(tmp_path / "a.nii", array, affine), regrid=True)
    values, world = scan.voxels.numpy().reshape(-1), world_of(scan.affine, scan.voxels.shape)
    np.testing.assert_allclose(world @ values / values.sum(), centre, atol=0.02)
    radii = np.sqrt(5 * ((world - centre[:, None]) ** 2 @ values / values.sum()))
    np.testing.assert_allclose(radii, 12, atol=0.25)  # of a sphere, along each axis of space
    assert values.sum() / 1000 * np.prod(scan.spacing) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)


def test_beyond_the_scan_is_its_lowest_value():
    affine, shape = tilted(45, (1.0, 1.0, 1.0)), (6, 6, 6)
    array = np.random.default_rng(0).uniform(7, 9, shape).astype(np.float32)
    voxels = regridded(array, affine, 2**30)[0]
    assert voxels.shape == (6, 11, 6) and voxels.min() == array.min()
    for k in range(6):  # each plane is shifted by its own whole number of voxels
        np.testing.assert_allclose(voxels[:, k : k + 6, k], array[:, :, k], atol=1e-6)
        assert (np.delete(voxels[:, :, k], range(k, k + 6), 1) == array.min()).all()


def test_what_is_not_finite_does_not_spread(tmp_path):
    array = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    array[4, 4, 4] = np.nan
    with pytest.raises(ValueError, match="must hold finite voxels, got 1 NaN"):
        load_scan(write_nifti(tmp_path / "a.nii", array, tilted(20)), regrid=True)


def test_a_right_grid_keeps_to_the_memory_that_was_declared():
    affine, array = tilted(20, (1.0, 1.0, 2.0)), np.random.default_rng(0).random((90, 80, 70), np.float32)
    size = 90 * (80 + int(np.ceil(69 * 2 * np.tan(np.radians(20)) - 1e-3))) * 70
    needed = 4 * array.size + 8 * size
    tracemalloc.start()
    voxels, _ = regridded(array, affine, needed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert voxels.size == size and 4 * size < peak < 8 * size  # besides the array, which was there
    with pytest.raises(Refused, match="must need at most .*, got slices whose right grid asks for"):
        regridded(array, affine, needed - 1)


# Uneven slices


def uneven(heights, aside=0.0):
    return {"0020|0032": lambda k: f"0\\{aside * heights[k]:.4f}\\{heights[k]:.4f}"}


def test_a_missing_slice_is_interpolated_where_that_is_asked_for(tmp_path):
    folder = write_dicom(tmp_path / "a", COUNTS, tags=uneven([0, 1, 2, 4, 5]))
    with pytest.raises(
        ValueError, match=r"got 1 to 2 mm: slices are missing or unevenly spaced; --spacing .* interpol"
    ):
        load_scan(folder)
    with pytest.warns(ScanWarning, match="got 1 to 2 mm: slices are missing .*: interpolated to 6 even ones"):
        scan = load_scan(folder, axes="RAS", regrid=True)
    assert scan.spacing == pytest.approx((1, 1, 1))
    voxels = scan.voxels.numpy()
    np.testing.assert_allclose(voxels[:, :, [0, 1, 2, 4, 5]], COUNTS, atol=1e-3)
    np.testing.assert_allclose(voxels[:, :, 3], (COUNTS[:, :, 2].astype(float) + COUNTS[:, :, 3]) / 2, atol=1e-3)


@pytest.mark.parametrize("aside", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_places_of_uneven_slices(tmp_path, seed, aside):
    generator = np.random.default_rng(seed)
    heights = np.round(np.cumsum(generator.uniform(0.6, 3, 8)), 3)
    i, j = np.indices((12, 10))
    planes = [np.rint(10 * (3 * i - 2 * (j + aside * z) + 5 * z)) for z in heights]  # of places in LPS+
    array = np.stack(planes, -1).astype(np.int16)
    folder = write_dicom(tmp_path / "a", array, np.diag([-1.0, -1, 1, 1]), tags=uneven(heights, aside))
    with pytest.warns(ScanWarning, match="unevenly spaced"):
        scan = load_scan(folder, axes="LPS", regrid=True)
    voxels = scan.voxels.numpy()
    x, y, z = world_of(scan.affine, voxels.shape) * np.array([[-1], [-1], [1]])
    assert z.min() == pytest.approx(heights[0]) and z.max() == pytest.approx(heights[-1])
    below = np.clip(np.searchsorted(heights, z, "right") - 1, 0, 6)
    inside = (x > -1e-6) & (x < 11 + 1e-6) & (y > aside * heights[below + 1] - 1e-6) & (y < 9 + aside * heights[below])
    assert inside.sum() > 100
    np.testing.assert_allclose(voxels.reshape(-1)[inside], 10 * (3 * x - 2 * y + 5 * z)[inside], atol=1)


@pytest.mark.parametrize("down", [False, True])
def test_frames_that_are_uneven(tmp_path, down):
    folder = write_frames(tmp_path / "a", COUNTS)
    heights = [0, 2, 3, 5, 6][:: -1 if down else 1]
    frames = {"PlanePositionSequence": lambda k: group(ImagePositionPatient=[0, 0, heights[k]])}
    enhanced(folder / "frames", {n: s for n, s in SHARED.items() if n != "PixelValueTransformationSequence"}, frames)
    with pytest.warns(ScanWarning, match="interpolated to 7 even ones"):
        voxels = load_scan(folder, axes="LPS", regrid=True).voxels.numpy()
    np.testing.assert_allclose(voxels[:, :, heights], COUNTS, atol=1e-3)
    np.testing.assert_allclose(voxels[:, :, 1], voxels[:, :, [0, 2]].mean(2), atol=1e-3)


def test_slices_beside_their_line(tmp_path):
    tags = {"0020|0032": lambda k: f"0\\{0.6 * (k == 2)}\\{k}"}
    with pytest.raises(ValueError, match="must have slices along one line, got some 0.6 mm beside it; --spacing"):
        load_scan(write_dicom(tmp_path / "a", COUNTS, tags=tags))


# From the command line


@pytest.mark.parametrize("kind", KINDS)
def test_spacing_resamples_a_sheared_scan_properly(run, tmp_path, kind):
    affine = tilted(20, (1.5, 1.5, 2.5))
    mm = (affine @ (28, 23, 10, 1))[:3]
    scans = []
    for name, value in (("bright", 100), ("dark", 10)):
        (tmp_path / name).mkdir()
        array = cube_at(affine, (56, 50, 20), mm, value).astype(np.int16)
        scans.append(WRITERS[kind](tmp_path / name, array, affine).rename(tmp_path / f"{name}.{kind}"))
    options = ["--window", "0,100", "--layers", "0", "--spacing", "2.5,1.5,1.5"]
    status, out, err = run(*scans, "--out", "out", *options[:4])
    assert status == 1 and out == [] and len(err) == 2 and all(SHEAR.format(20) in line for line in err)
    assert not (tmp_path / "out").exists()
    status, out, err = run(*scans, "--out", "out", *options)
    err = [line for line in err if "nearly one grey" not in line]  # which a small dark cube is
    assert status == 0 and len(out) == len(err) == 2
    assert all(line.startswith("planecycle-fast: volume ") and "resampled to a right grid" in line for line in err)
    bright, dark = (load_features(tmp_path / "out" / f"{scan_name(s)}.safetensors") for s in scans)
    assert bright.metadata["scan_spacing"] == pytest.approx([2.5, 1.5, 1.5], abs=1e-4)
    assert bright.metadata["spacing"] == pytest.approx([2.5, 24, 24], abs=1e-3)
    change = (bright.tensors["layer0.patches"] - dark.tensors["layer0.patches"]).norm(dim=-1)
    cell = np.unravel_index(change.argmax().item(), change.shape)
    place = (np.linalg.inv(bright.metadata["affine"]) @ (*mm, 1))[:3]
    assert abs(np.array(cell) - place).max() <= 0.55


def scan_name(path):
    return path.name.split(".")[0] if path.is_file() else path.name


def test_allow_shear_keeps_it(run, tmp_path):
    affine = tilted(20)
    write_nifti(tmp_path / "a.nii", np.random.default_rng(0).normal(size=(32, 32, 5)).astype(np.float32), affine)
    for name, options in (("f", []), ("g", ["--spacing", "2.66,1,1"])):
        assert run("a.nii", "--out", f"{name}.npz", "--allow-shear", *options)[::2] == (0, [])
        columns = np.array(load_features(f"{name}.npz").metadata["affine"])[:3, :3]
        unit = columns / np.linalg.norm(columns, axis=0)
        assert abs(unit[:, 0] @ unit[:, 1]) == pytest.approx(np.sin(np.radians(20)), abs=1e-4)


def test_a_dicom_tilt_of_one_degree_over_few_slices(tmp_path):
    with pytest.warns(ScanWarning, match=SHEAR.format(1)):
        load_scan(write_dicom(tmp_path / "a", COUNTS, sheared(1)), regrid=True)
