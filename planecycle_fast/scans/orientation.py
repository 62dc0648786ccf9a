"""Which way the axes of a scan run, and turning them without resampling."""

from __future__ import annotations

import itertools
import math

import numpy as np

PAIRS = ("RL", "AP", "SI")  # of each axis x, y, z of RAS+ millimetres: its positive end, its negative end
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # of affines
AXIAL = "SPR"  # slices from feet to head, each a picture with the face up and the patient's left on the left


def check_axes(axes: str) -> str:
    """The axes in capitals. Raises ValueError unless they are a letter of each pair R/L, A/P, S/I."""
    letters = axes.upper() if isinstance(axes, str) else ""
    if len(letters) != 3 or any(sum(letters.count(letter) for letter in pair) != 1 for pair in PAIRS):
        raise ValueError(f"axes must be one letter each of R/L, A/P and S/I, such as {AXIAL!r}, got {axes!r}")
    return letters


def spans_space(affine: np.ndarray) -> bool:
    """Whether an affine (4, 4) is finite and its axes are three distinct directions."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)  # mm
        return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-3 * lengths.prod() > 0)


def turned(voxels: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """Voxels turned, by permutations and flips, to the array axes that are nearest to `axes`.

    Args:
        voxels: 3D.
        affine: (4, 4), the voxels' indices to millimetres in RAS+; `spans_space`.
        axes: of `check_axes`.

    Returns a view of the voxels and its own affine, exactly.
    """
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)  # unit vectors
    # worlds[i] is the axis of space that array axis i follows: the best fit of all six assignments.
    worlds = max(itertools.permutations(range(3)), key=lambda p: math.prod(abs(columns[p[i], i]) for i in range(3)))
    turn = np.zeros((4, 4))  # new indices to old ones
    turn[3, 3] = 1
    order, flips = [], []
    for new, letter in enumerate(axes):
        world = next(w for w, pair in enumerate(PAIRS) if letter in pair)
        old = worlds.index(world)
        flip = (columns[world, old] > 0) != (letter == PAIRS[world][0])
        order.append(old)
        flips.append(slice(None, None, -1 if flip else 1))
        turn[old, new] = -1 if flip else 1
        turn[old, 3] = voxels.shape[old] - 1 if flip else 0
    return voxels.transpose(order)[tuple(flips)], affine @ turn + 0.0  # no negative zeros
