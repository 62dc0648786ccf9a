"""Features of volumes that do not fit: window by window, overlapping ones blended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..features import VolumeFeatures
from ..geometry.planes import Plane, Sizes
from ..hosts.placement import running_place
from ..inputs import check_one_of, check_volume, plain, usable_device, wanted_layers
from ..lifted import lifted_in
from .progress import window_bar

BLENDS = ("constant", "linear", "gaussian")
SIGMA = 0.125  # of a window's length, as MONAI's sliding windows have it


def sliding_window(
    lifted: nn.Module,
    volume: Tensor,  # (B, C, D, height, width), pixels
    window: Sequence[int] | None = None,
    *,
    overlap: float | Sequence[float] = 0.25,
    blend: str = "linear",
    layers: int | Sequence[int] | None = None,
    batch: int = 1,
    accumulate_on: str | torch.device = "cpu",
    progress: bool | Callable[[int, int], Any] | None = None,
    max_memory: int | None = None,
) -> VolumeFeatures | list[VolumeFeatures]:
    """Features of a whole volume, of which the model sees a window at a time. For inference: without gradients.

        features = pcf.sliding_window(lifted, volume, (32, 224, 224), overlap=0.5)

    Windows begin at multiples of the patch; the last of an axis ends where the volume does. A patch that several
    windows hold gets the mean of what they make of it, weighted by `blend`; weights sum to one. A set of class and
    register tokens of the volume is the mean of those of the windows that reach into its slice, weighted by their share
    of the slice's patches (blended along D as patches are). What attention sees ends at a window: features are those of
    the volume as a whole only where it does so anyway, as for slice2d with windows of whole slices; there, without
    overlap, they are equal.

    Args:
        lifted: of `lift`; also within torch.compile.
        volume: on any device, in the model's dtype; windows go where the model runs.
        window: (D, height, width) in pixels, multiples of the patch; axes that are shorter are taken whole. None: the
            largest that fits into `max_memory`, by halving: D, which costs features least, down to 8 slices (of
            slice2d to one), then the axis of most patches.
        overlap: of two neighbours; a share of the window, 0 <= overlap < 1, or pixels, a whole number, or three of
            either for D, height, width. Rounded up to whole patches.
        blend: "linear", which falls off to the window's faces; "constant"; or "gaussian", of deviation 0.125 windows.
        layers: as `n` of `LiftedModel.intermediate`; None: the last layer alone.
        batch: windows that pass through the model together.
        accumulate_on: the device where features are summed, in float32 or the model's dtype if that is wider.
        progress: True: a bar on stderr, if that is a terminal; or a function, called with windows done and in all.
        max_memory: bytes that may be taken, on each device, besides the weights and the volume: windows in the model,
            as `cost.planning.plan` tells, and all of the features. A window that needs more is refused.

    Returns VolumeFeatures of the volume's size, on `accumulate_on`; a list of them, one per layer, where layers are
    asked for.

    Raises:
        TypeError: lifted is no lifted model, or volume no tensor of floating-point numbers.
        ValueError: what `LiftedModel.forward` refuses of a window, a volume that needs a gradient, a window or overlap
            that is none, an unknown blend, layers that the model lacks, a device that cannot be used, neither window
            nor max_memory, no window that fits into it, or max_memory for weights that are offloaded.
        MissingPackageError: progress=True without rich.
    """
    inside = lifted_in(lifted)
    volume, (device, _) = plain(volume), running_place(inside) or (None, None)
    one = volume[:1, :, :1].to(device) if isinstance(volume, Tensor) and volume.ndim == 5 else volume
    check_volume(one, inside.adapter.in_channels, inside)
    if volume.requires_grad and torch.is_grad_enabled():
        raise ValueError("volume must need no gradient, as none is recorded; detach it, or call the model")
    check_one_of(blend, BLENDS, "blend")
    _check_count(batch, "batch")
    accumulate_on = usable_device(accumulate_on, "accumulate_on")
    wanted = sorted(wanted_layers(1 if layers is None else layers, len(inside.blocks), "layers"))
    patch = (1, *inside.adapter.patch_size)
    shape = tuple(volume.shape[2:])
    if any([n % p for n, p in zip(shape, patch)]):
        raise ValueError(
            f"volume's slices must be a multiple of the patch, {patch[1]} x {patch[2]} pixels, got "
            f"{shape[1]} x {shape[2]}"
        )
    sizes = tuple([n // p for n, p in zip(shape, patch)])
    if max_memory is not None:
        _check_count(max_memory, "max_memory")
    elif window is None:
        raise ValueError("window must be (D, height, width), or max_memory be given to choose it, got neither")
    of = None
    if window is not None:
        of = tuple([min(n, size) for n, size in zip(in_patches(window, patch), sizes)])
    if max_memory is not None:
        from .window_memory import fitting_window  # planning takes time to import

        last, counts = inside.plane_after(len(inside.blocks) - 1), (len(volume), batch, len(wanted))
        of = fitting_window(inside, last, sizes, of, *counts, accumulate_on, volume.dtype, max_memory)
    shared = _overlaps(overlap, of, sizes, patch)
    axes = [_axis(n, w, o, blend) for n, w, o in zip(sizes, of, shared)]  # per axis: starts, and their weights
    places = list(itertools.product(*[range(len(starts)) for starts, _ in axes]))
    sums: list[list[Tensor | None]] = [[None] * 3 for _ in wanted]
    with torch.no_grad(), window_bar(progress) as done:
        done(0, len(places))
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            begins = [[starts[i] for i, (starts, _) in zip(place, axes)] for place in some]
            cuts = [[slice(b * p, (b + n) * p) for b, n, p in zip(begin, of, patch)] for begin in begins]
            pixels = torch.cat([volume[(..., *cut)] for cut in cuts]) if len(cuts) > 1 else volume[(..., *cuts[0])]
            pixels = pixels.to(device)
            features = [lifted(pixels)] if layers is None else inside.intermediate(pixels, wanted)
            del pixels  # they need not be there while the next ones are made
            for number, (place, begin) in enumerate(zip(some, begins)):
                weights = [each[i] for i, (_, each) in zip(place, axes)]
                rows = slice(number * len(volume), (number + 1) * len(volume))
                for layer, each, total in zip(wanted, features, sums):
                    part = VolumeFeatures(*[None if tensor is None else tensor[rows] for tensor in each])
                    _add(total, part, weights, begin, sizes, inside.plane_after(layer), accumulate_on)
            done(first + len(some), len(places))
    results = [VolumeFeatures(*total) for total in sums]
    return results[0] if layers is None else results


def _add(
    total: list[Tensor | None],
    part: VolumeFeatures,
    weights: list[Tensor],  # per axis (n,), float64
    begin: list[int],  # patches
    sizes: Sizes,  # of the volume
    plane: Plane,
    device: torch.device,
) -> None:
    """Adds a window's features to those of the volume."""
    cut = tuple([slice(b, b + len(w)) for b, w in zip(begin, weights)])
    depth, height, width = weights
    shares = depth[:, None, None] * height[:, None] * width
    # Globals: of each slice of the plane, by the weights along it and the share of the slice that is the window's.
    inner = math.prod([float(weights[axis].sum()) / sizes[axis] for axis in plane.sequence])
    along = weights[plane.batch[0]] * inner if plane.batch else torch.tensor([inner], dtype=torch.float64)
    sets = cut[plane.batch[0]] if plane.batch else slice(0, 1)
    for i, (tensor, places, share) in enumerate(zip(part, (cut, (sets,), (sets,)), (shares, along, along))):
        if tensor is None:
            continue
        if total[i] is None:
            whole = sizes if i == 0 else (plane.slices(sizes),)
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            total[i] = torch.zeros(len(tensor), *whole, *tensor.shape[1 + len(whole) :], dtype=dtype, device=device)
        share = share.to(total[i]).view(1, *share.shape, *[1] * (tensor.ndim - 1 - share.ndim))
        total[i][(slice(None), *places)] += tensor.to(total[i]) * share


def _axis(size: int, window: int, shared: int, blend: str) -> tuple[list[int], list[Tensor]]:
    """Where windows begin along an axis, and the weights of each, which sum to one over all windows at each place.

    Weights of a window are the product of those along its axes: windows are all combinations, so these sum to one too.
    """
    step = window - shared
    starts = sorted({min(start, size - window) for start in range(0, size - window + step, step)})
    middle = (window - 1) / 2
    away = (torch.arange(window, dtype=torch.float64) - middle) / window  # from -1/2 to 1/2
    shape = {
        "constant": torch.ones_like(away),
        "linear": 1 - 2 * away.abs(),  # above 0: centres of patches lie within the window
        "gaussian": torch.exp(-0.5 * (away / SIGMA) ** 2),
    }[blend]
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += shape
    return starts, [shape / total[start : start + window] for start in starts]


def in_patches(window: Sequence[int], patch: tuple[int, int, int], name: str = "window") -> Sizes:
    """A window of (D, height, width) pixels. Raises ValueError unless these are multiples of the patch."""
    listed = isinstance(window, Sequence) and len(window) == 3 and all([_is_whole(n) for n in window])
    if not listed or min(window) < 1 or any([n % p for n, p in zip(window, patch)]):
        raise ValueError(
            f"{name} must be (D, height, width) in pixels, multiples of the patch, {patch[1]} x {patch[2]}, "
            f"got {window!r}"
        )
    return tuple([int(n) // p for n, p in zip(window, patch)])


def parse_tile(text: str) -> tuple[int, int, int]:
    """A window of "DxHEIGHTxWIDTH", 32x224x224. Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all([part.strip().isdecimal() for part in parts]):
        raise ValueError(f"tile must be slices x pixels x pixels, such as 32x224x224, got {text!r}")
    return tuple([int(part) for part in parts])


def _overlaps(overlap: float | Sequence[float], of: Sizes, sizes: Sizes, patch: tuple[int, int, int]) -> Sizes:
    """In patches, along each axis; what is asked of an axis that is taken whole does not matter."""
    each = list(overlap) if isinstance(overlap, Sequence) and not isinstance(overlap, str) else [overlap] * 3
    good, shared = len(each) == 3, []
    for value, window, size, p in zip(each, of, sizes, patch):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            good = False
            continue
        pixels = isinstance(value, Integral)
        good &= window == size or value < window * p if pixels else value < 1
        patches = -(-int(value) // p) if pixels else math.ceil(value * window - 1e-9)
        shared.append(min(patches, window - 1))
    if not good:
        raise ValueError(
            "overlap must be a share of the window, 0 or more and below 1, or fewer pixels than the window of "
            f"{' x '.join([str(n * p) for n, p in zip(of, patch)])}, one or three, got {overlap!r}"
        )
    return tuple(shared)


def _check_count(value: Any, name: str) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
