"""Pictures in three views: features, their principal components as colours, and attention, as heat."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.attention_maps import AttentionMap
from ..optional import require
from .feature_files import whole

FOREGROUND = 0.1  # mean intensity of a token, of 1, above which it is shown and counted
_ACROSS = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "R": "sagittal", "L": "sagittal"}
_UPWARDS = "SA"  # axes that increase upwards in a picture: up to the head, or to the face


def foreground(
    image: Tensor,  # (D, height, width) in [0, 1]
    grid: tuple[int, int, int],  # (D, H, W) in tokens
) -> Tensor:  # (D, H, W) bool
    """Tokens that are not background; all of them where nothing is bright."""
    mask = F.adaptive_avg_pool3d(image[None, None], grid)[0, 0] > FOREGROUND
    return mask if mask.any() else torch.ones_like(mask)


def pca_colours(
    features: dict[str, Tensor],  # by name, (D, H, W, C) each
    mask: Tensor,  # (D, H, W) bool, the tokens that count
) -> dict[str, Tensor]:  # by name, (D, H, W, 3) in [0, 1]
    """First three principal components as red, green and blue, on one scale for all names.

    Components are those of all names' masked features together, so equal colours mean equal features
    across names as well. Tokens outside the mask are black.
    """
    rows = torch.cat([f[mask] for f in features.values()]).float()  # (n, C)
    size = rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)  # by which they are divided: squares stay finite
    rows = rows / size
    mean = rows.mean(0)
    with torch.random.fork_rng(devices=[]):  # pca_lowrank draws; the caller's generator stays as it is
        torch.manual_seed(0)
        _, _, basis = torch.pca_lowrank(rows, q=min(8, *rows.shape), center=True)
    basis = F.pad(basis[:, :3], (0, max(0, 3 - basis.shape[1])))  # (C, 3), also of one or two tokens
    basis = basis * basis.sum(0).sign()  # components come with either sign
    low, high = torch.quantile(_sample((rows - mean) @ basis), torch.tensor([0.02, 0.98]), dim=0)
    colours = {}
    for name, f in features.items():
        scaled = (((f.float() / size - mean) @ basis) - low) / (high - low).clamp_min(1e-12)
        colours[name] = scaled.clamp(0, 1) * mask[..., None]
    return colours


def _sample(rows: Tensor, most: int = 100_000) -> Tensor:
    """Evenly spaced rows: quantiles of very many rows cost much and say the same."""
    return rows[:: -(-len(rows) // most)]


def heat_colours(
    weights: Tensor,  # (D, H, W), not negative
) -> Tensor:  # (D, H, W, 3) in [0, 1]
    """From black, 0, over red to yellow, the largest 0.5% of the weights that are not 0: a few would outshine all.

    Raises MissingPackageError without matplotlib.
    """
    colormaps = require("matplotlib", "demo").colormaps
    weights = weights.float()
    shown = weights[weights > 0]
    top = torch.quantile(_sample(shown), 0.995) if len(shown) else torch.tensor(1.0)
    return torch.from_numpy(colormaps["inferno"]((weights / top).clamp(0, 1).numpy())[..., :3])


def attention_picture(
    maps: Sequence[AttentionMap],
    image: Tensor,  # (D, height, width) in [0, 1], what the volume shows
    path: str | Path,
    title: str = "attention",
    patch: tuple[int, int, int] | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    axes: str | None = None,
) -> None:
    """Writes a picture of what `LiftedModel.attention_maps` returned for one volume: heads averaged, a column each.

    Args:
        maps: of layers, each with columns for its class tokens and its chosen patch, as far as they are there.
        image: voxels of the volume, any number of them per patch.
        path: of the picture, which appears whole or not at all.
        title: above all columns.
        patch: (d, h, w) where the views are cut: the chosen patch; None: in the middle.
        spacing: of patches along D, H, W, for the proportions.
        axes: in which directions D, H and W increase, such as "SPR"; None: it is not known.

    Raises:
        ValueError: no maps, or maps of several volumes.
        MissingPackageError, OSError: as `three_views`.
    """
    columns = {}
    for each in maps:
        for name, weights in (("class token", each.cls), ("patch", each.patch)):  # (B, heads, D, H, W)
            if weights is None:
                continue
            if len(weights) != 1:
                raise ValueError(f"maps must be of one volume, got weights of {len(weights)}")
            columns[f"layer {each.layer}, {each.plane}: {name}"] = heat_colours(weights[0].detach().mean(0).cpu())
    if not columns:
        raise ValueError("maps must hold a map, got none")
    sizes = next(iter(columns.values())).shape[:3]
    at = (0.5, 0.5, 0.5) if patch is None else tuple([(i + 0.5) / n for i, n in zip(patch, sizes)])
    three_views(image, columns, path, title, at, spacing, axes)


def three_views(
    image: Tensor,  # (D, H, W) in [0, 1], voxels of the same volume
    colours: dict[str, Tensor],  # by name, (D, H, W, 3) in [0, 1]
    path: str | Path,
    title: str,
    at: tuple[float, float, float] = (0.5, 0.5, 0.5),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    axes: str | None = "SPR",
) -> None:
    """Writes a picture: a row per view, the image and one column per name of `colours`.

    `at` is where to cut, as fractions of D, H and W. `spacing`, of tokens along D, H, W, gives the views
    their proportions. `axes` says in which directions D, H and W increase, which names the views and
    puts the head and the face up; None: it is not known. The file appears whole or not at all.

    Raises MissingPackageError without matplotlib, OSError if the file cannot be written.
    """
    figure_module = require("matplotlib.figure", "demo")
    columns = {"volume": image[..., None].expand(-1, -1, -1, 3), **colours}
    depth, rows, width = (n * s for n, s in zip(next(iter(colours.values())).shape[:3], spacing))
    # Rows are as high as their pictures: all views have one scale, up to the width of a column.
    heights = [rows / width, depth / width, depth / rows]
    figure = figure_module.Figure(figsize=(4.2 * len(columns), 4.2 * sum(heights) + 1.4), layout="constrained")
    places = figure.subplots(3, len(columns), squeeze=False, height_ratios=heights)
    for column, (name, cells) in enumerate(columns.items()):
        for row, axis in enumerate("DHW"):
            ax = places[row, column]
            ax.imshow(cut(cells, row, at[row], axes).numpy(), interpolation="nearest", aspect="auto")
            ax.set_box_aspect(heights[row])
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(name, fontsize=17)
            if column == 0:
                ax.set_ylabel(_ACROSS[axes[row]] if axes else f"across {axis}", fontsize=17)
    title = title.encode(errors="replace").decode()  # of file names that are no text
    figure.suptitle(title, fontsize=13, parse_math=False)
    with whole(Path(path)) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks become boxes
        figure.savefig(temporary, dpi=100, format="png")


def cut(
    cells: Tensor,  # (D, H, W, 3)
    view: int,
    at: float,
    axes: str | None = "SPR",
) -> Tensor:  # (rows, columns, 3)
    """One slice across axis `view` (0, 1, 2 for D, H, W), the head or the face up where `axes` tells."""
    index = min(int(at * cells.shape[view]), cells.shape[view] - 1)
    flat = cells.select(view, index)
    downwards = 1 if view == 0 else 0  # the axis that is the picture's rows
    return flat.flip(0) if axes and axes[downwards] in _UPWARDS else flat


def adjacent_cosine(
    features: Tensor,  # (D, H, W, C)
    mask: Tensor,  # (D, H, W) bool
) -> float:
    """Mean cosine between features of the same place in neighbouring slices, where both are masked.

    NaN for a single slice.
    """
    features = features.float() / features.abs().max().clamp_min(1e-30)  # squares stay finite
    cosine = F.cosine_similarity(features[1:], features[:-1], dim=-1)
    both = mask[1:] & mask[:-1]
    return float(cosine[both].mean()) if both.any() else float(np.nan)
