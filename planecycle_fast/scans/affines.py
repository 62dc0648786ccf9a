"""Whether the axes of a scan are at right angles, the same for all formats, and resampling where they are not.

A scan is a stack of equal planes. Where each lies straight above the one before, at the same distance, its voxels are a
right grid; a tilted gantry shifts each plane sideways, and slices may be unevenly spaced.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from .checks import Refused, gib

ROUNDING = 0.1  # mm, to which some scanners write positions
SLOPE = 2e-3  # a tenth of a degree, the rounding of directions; tilted gantries stand at half a degree or more
SAME = 1e-3  # of a voxel


def rounding(spacing: float) -> float:
    """Millimetres that places may be off in a grid of this spacing: ROUNDING, but no more than half a voxel."""
    return min(ROUNDING, spacing / 2)


def stack_axis(affine: np.ndarray) -> int:
    """The array axis that runs across planes: the other two are at right angles, as far as any are.

    Of several such axes it is the last of the array, where most writers have it, or else that of the thickest voxels.

    Args:
        affine: (4, 4), of `spans_space`.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)  # mm
    unit = affine[:3, :3] / lengths

    def key(axis: int) -> tuple[float, bool, float]:
        u, v = (n for n in range(3) if n != axis)
        return max(abs(float(unit[:, u] @ unit[:, v])), SLOPE), axis != 2, -lengths[axis]

    return min(range(3), key=key)


def shear_of(affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """Degrees by which the axes of a grid miss right angles; 0 where that is no more than rounding.

    Args:
        affine: (4, 4), indices to millimetres; of `spans_space`.
        shape: of the voxels: rounding shows in what they extend over.
    """
    axis = stack_axis(affine)
    u, v = (n for n in range(3) if n != axis)
    extent = affine[:3, :3] * [n - 1 for n in shape]  # (3, 3) mm
    allowed = rounding(min(np.linalg.norm(affine[:3, [u, v]], axis=0)))
    short, long = sorted((u, v), key=lambda n: np.linalg.norm(extent[:, n]))
    along = affine[:3, long] / np.linalg.norm(affine[:3, long])
    upright = np.cross(affine[:3, u], affine[:3, v])
    upright /= np.linalg.norm(upright)
    within = float(extent[:, short] @ along)  # mm that the shorter axis of a plane goes along the other
    across = float(extent[:, axis] @ upright)  # mm that the third axis goes along the planes' normal
    misses = [  # (mm aside, mm straight on)
        (abs(within), math.sqrt(max(0.0, float(extent[:, short] @ extent[:, short]) - within**2))),
        (float(np.linalg.norm(extent[:, axis] - across * upright)), abs(across)),
    ]
    angles = [math.degrees(math.atan2(*miss)) for miss in misses if miss[0] > allowed + SLOPE * miss[1]]
    return max(angles, default=0.0)


def regridded(
    voxels: np.ndarray,  # (i, j, k) float32
    affine: np.ndarray,  # (4, 4), of i, j, k to mm
    max_bytes: int,
    positions: np.ndarray | None = None,  # (k, 3) mm, of the first voxel of each plane
) -> tuple[np.ndarray, np.ndarray]:
    """The scan on a right and even grid over all of its planes, and that grid's affine (4, 4).

    Two axes stay as they are, or become perpendicular within their plane; the third is the planes' normal. Planes are
    sampled linearly, each in itself, and between two of them linearly along the normal. New planes are as far apart
    as the nearest two, and lie in the old ones where those are evenly spaced. Voxels beyond the scan get its lowest
    value.

    Args:
        voxels: of any stride.
        affine: of `spans_space`.
        max_bytes: refuse to take more memory.
        positions: of planes k where they are unevenly placed, in the order of the normal; else the affine's.

    Raises Refused.
    """
    axis = stack_axis(affine) if positions is None else 2
    order = [n for n in range(3) if n != axis] + [axis]
    voxels, columns = voxels.transpose(order), affine[:3, order]
    width, height, count = voxels.shape
    if positions is None:
        origin, offsets = affine[:3, 3], np.arange(count)[:, None] * columns[:, 2]
    else:
        origin, offsets = positions[0], positions - positions[0]
    first = columns[:, 0] / np.linalg.norm(columns[:, 0])
    second = columns[:, 1] - (columns[:, 1] @ first) * first
    second /= np.linalg.norm(second)
    normal = np.cross(first, second)
    normal *= np.sign(normal @ columns[:, 2])
    frame = np.stack([first, second, normal], axis=1)  # (3, 3), unit vectors
    plane = frame[:, :2].T @ columns[:, :2]  # (2, 2), index within a plane to mm within it
    steps = np.diag(plane)
    places = offsets @ frame  # (k, 3) mm
    corners = np.array([(0, 0), (0, height - 1), (width - 1, 0), (width - 1, height - 1)]) @ plane.T
    spread = (corners[:, None] + places[:, :2]) / steps  # (4, k, 2), in new voxels
    begin = np.floor(spread.min((0, 1)) + SAME).astype(int)
    size = np.ceil(spread.max((0, 1)) - SAME).astype(int) - begin + 1
    gaps = np.diff(places[:, 2])
    planes = 1 if count == 1 else math.ceil(places[-1, 2] / gaps.min() - SAME) + 1
    needed = 4 * voxels.size + 8 * planes * int(size.prod())  # before; after, and turned
    if needed > max_bytes:
        raise Refused(f"must need at most {gib(max_bytes)}, got slices whose right grid asks for {gib(needed)}")
    step = float(columns[:, 2] @ normal) if count == 1 else places[-1, 2] / (planes - 1)
    new = np.empty((planes, *size), np.float32)
    inverse = np.linalg.inv(plane).T
    mesh = np.stack(np.meshgrid(*(np.arange(n) + b for n, b in zip(size, begin)), indexing="ij"), -1) * steps @ inverse
    shifts = places[:, :2] @ inverse  # (k, 2), of each plane, in old voxels
    lowest = voxels.min()
    for number, target in enumerate(new):
        place = np.interp(number * step, places[:, 2], range(count))  # among the old planes
        place = round(place) if abs(place - round(place)) < 1e-6 else place
        below, share = math.floor(place), place - math.floor(place)
        total, inside = np.zeros(size), np.ones(size, bool)
        for k, weight in ((below, 1 - share), (below + 1, share)):
            if weight:
                index = mesh - shifts[k]  # (u, v, 2), in old voxels
                total += weight * _sampled(voxels[:, :, k], index)
                inside &= ((index > -0.5 - SAME) & (index < np.array([width, height]) - 0.5 + SAME)).all(-1)
        target[:] = np.where(inside, total, lowest)
    turned = np.eye(4)
    turned[:3, :3] = frame * [*steps, step]
    turned[:3, 3] = origin + frame[:, :2] @ (begin * steps)
    return new.transpose(1, 2, 0), turned


def _sampled(
    plane: np.ndarray,  # (u, v)
    index: np.ndarray,  # (..., ..., 2), fractions of voxels
) -> np.ndarray:  # (..., ...) float64
    """Values of a plane at places within it, linearly; beyond the outermost centres theirs go on."""
    pixels = torch.from_numpy(plane.astype(np.float64))[None, None]
    grid = torch.from_numpy(((2 * index + 1) / plane.shape - 1)[..., ::-1].copy())[None]
    return F.grid_sample(pixels, grid, "bilinear", "border", align_corners=False)[0, 0].numpy()
