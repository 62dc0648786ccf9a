"""Which window of a volume fits into memory, as planned before anything runs."""

from __future__ import annotations

import functools
import math

import torch

from ..cost.planning import plan
from ..geometry.planes import Plane, Sizes
from ..hosts.placement import running_place
from ..lifted import LiftedModel
from .checks import gib

SLICES = 8  # of a window, before it is cut within slices: examples/sliding_window.py shows what either costs


def fitting_window(
    lifted: LiftedModel,
    plane: Plane,  # whose slices have a set of globals each, after the last layer
    sizes: Sizes,  # of the volume, in patches
    window: Sizes | None,  # in patches; None: it is chosen
    volumes: int,
    batch: int,
    layers: int,
    accumulate_on: torch.device,
    dtype: torch.dtype,
    max_memory: int,
) -> Sizes:
    """A window of which `batch` pass through the model within max_memory bytes, beside features of the whole volume.

    A window that is given is checked; else it is the volume, and while that is too much, half of D or of the axis that
    has most patches, as `sliding_window` says. Planned are the peak of a pass, its pixels, and features in
    float32 or the model's dtype if that is wider: the sums, and a window's on their way there.

    Raises ValueError, which says what the smallest takes, where none fits.
    """
    patch = (1, *lifted.adapter.patch_size)
    device, _ = running_place(lifted) or (torch.device("cpu"), None)
    if any([p.is_meta for p in lifted.parameters()]):
        raise ValueError(
            "max_memory must be left out for a model whose weights are offloaded, which take of it as well"
        )
    wide = torch.promote_types(dtype, torch.float32).itemsize / dtype.itemsize
    together = device.type == accumulate_on.type
    globals_ = lifted.adapter.num_globals

    @functools.cache
    def needed(of: Sizes) -> int:
        planned = plan(
            lifted.adapter.model,
            (volumes * batch, lifted.adapter.in_channels, *[n * p for n, p in zip(of, patch)]),
            mode=lifted.mode,
            pool_method=lifted.pool_method if lifted.mode == "planecycle" else "PCg",
            dtype=dtype,
            device=device.type,
            backend=lifted.backend,
            cycle_order=lifted.planes,
            globals_at=lifted.globals_at,
            attention=lifted.attention,
            strict=lifted.strict,
            adapter=type(lifted.adapter),
            depth_position=lifted.depth_position,
            gelu=lifted.gelu,
        )
        row = planned.output_bytes / (volumes * batch * (math.prod(of) + globals_ * plane.slices(of)))  # of a token
        passing = planned.peak_bytes + planned.volume_bytes + (layers - 1) * planned.output_bytes
        whole, part = [volumes * (math.prod(n) + globals_ * max(n)) * row * wide for n in (sizes, of)]
        sums = layers * whole + 2 * part
        return math.ceil(passing + sums if together else max(passing, sums))

    def size(of: Sizes) -> str:
        return " x ".join([str(n * p) for n, p in zip(of, patch)])

    of, slices = sizes if window is None else window, 1 if lifted.mode == "slice2d" else SLICES
    while needed(of) > max_memory:
        if window is not None or max(of) == 1:
            smallest = "a window of" if window is not None else "the smallest window,"
            raise ValueError(
                f"max_memory must be at least {gib(needed(of))} for {smallest} {size(of)} pixels beside features of "
                f"the whole volume, got {gib(max_memory)}"
            )
        axis = 0 if of[0] > slices else max(range(3), key=lambda a: of[a])
        of = tuple([-(-n // 2) if a == axis else n for a, n in enumerate(of)])
    return of
