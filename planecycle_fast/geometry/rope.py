"""Axial rotary position embedding for any plane, as the DINOv3 implementations compute it.

Token i on an axis of length n has the coordinate ``2 * (i + 0.5) / n - 1`` (`coordinates`). Each axis
owns a section of the frequencies; section j has the period ``base ** (j / section)``. The angles of a
token are ``2*pi * coordinate / period``, axis after axis, hd/2 in all; sine and cosine are tiled twice
(rotate-half). Globals are not rotated. Angles are separable: `Rope.angles` gives one small table per
axis, `Rope.sincos` the dense tables that 2D hosts expect.

The implementations agree on this but differ in dtypes, in multiplying by 1/period, and in when they
draw their training-time augmentation. `Rope` states these choices, so that a lifted model computes
what its host computes, to the bit where the same operations run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..runtime.recording import drawn_on_host
from ..runtime.tracing import nobody_watches, recorder
from .planes import Plane, Sizes

Made = TypeVar("Made")
NORMALIZATIONS = ("separate", "min", "max")


def coordinates(
    sizes: Sequence[int],
    normalize: str = "separate",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Token centres along each axis, mapped to [-1, 1].

    Args:
        sizes: tokens per axis, e.g. (n0, n1) of a plane.
        normalize: divide by each axis's own size ("separate"), or by the smallest ("min") or largest
            ("max") of `sizes`, which keeps the aspect ratio.

    Returns: one tensor (n,) per axis.

    Raises ValueError for an unknown `normalize`.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    common = None if normalize == "separate" else min(sizes) if normalize == "min" else max(sizes)
    return [2.0 * (_centres(n, dtype, device) / (common or n)) - 1.0 for n in sizes]


def _centres(n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:  # (n,)
    """0.5, 1.5, ... below n."""
    wide = torch.promote_types(dtype, torch.float32)
    if wide != dtype and recorder() is None:  # as hosts do: beyond 128 torch's own rounding is another one
        return torch.arange(0.5, n, dtype=dtype, device=device)
    # From whole numbers, as torch.export cannot tell how many come of a start between them.
    return (torch.arange(n, dtype=wide, device=device) + 0.5).to(dtype)


def section_sizes(head_dim: int, num_axes: int) -> tuple[int, ...]:
    """Frequencies per axis: hd/4 each in 2D; (hd/8, 3hd/16, 3hd/16) for (D, H, W), as flatten3d has it.

    Raises ValueError when head_dim does not divide.
    """
    parts = {2: (1, 1), 3: (2, 3, 3)}.get(num_axes)
    if parts is None:
        raise ValueError(f"num_axes must be 2 or 3, got {num_axes}")
    unit = 2 * sum(parts)
    if head_dim % unit:
        raise ValueError(f"head_dim must be a multiple of {unit} for {num_axes}D RoPE, got {head_dim}")
    return tuple(part * head_dim // unit for part in parts)


def make_periods(
    count: int,
    base: float | None = None,
    min_period: float | None = None,
    max_period: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Periods of one axis, (count,): ``base ** (j / count)``, or from min_period to max_period, log-spaced.

    Raises ValueError unless exactly one of base and (min_period, max_period) is given.
    """
    if base is not None and min_period is None and max_period is None:
        return base ** (torch.arange(count, dtype=dtype, device=device) / count)
    if base is None and min_period is not None and max_period is not None:
        return min_period * (max_period / min_period) ** torch.linspace(0, 1, count, dtype=dtype, device=device)
    raise ValueError(
        "give either base, or min_period and max_period, "
        f"got base={base}, min_period={min_period}, max_period={max_period}"
    )


@dataclass(frozen=True)
class Augmentation:
    """One training-time draw. Coordinates become ``(coordinate + shift) * jitter * rescale``."""

    shift: Tensor | None = None  # (num_axes,)
    jitter: Tensor | None = None  # (num_axes,)
    rescale: Tensor | None = None  # (1,)

    def apply(
        self,
        coords: list[Tensor],  # num_axes tensors (n,)
    ) -> list[Tensor]:
        if self.shift is not None:
            coords = [c + s for c, s in zip(coords, self.shift)]
        if self.jitter is not None:
            coords = [c * j for c, j in zip(coords, self.jitter)]
        if self.rescale is not None:
            coords = [c * self.rescale for c in coords]
        return coords


class Tables(NamedTuple):
    """Sine and cosine of the angles of each axis, one to three of them, or one dense table each."""

    sin: Sequence[Tensor]  # per axis (n_i, s_i), L = product of n_i, sum of s_i = hd/2
    cos: Sequence[Tensor]  # like sin


MOST = 64  # of what is kept of one tensor of periods

_kept: MutableMapping[Tensor, dict[Any, tuple[Any, Any]]] = WeakIdKeyDictionary()  # by periods


def kept(
    periods: Tensor,  # (hd/4,)
    key: Hashable,
    make: Callable[[], Made],
) -> Made:
    """What `make` makes of periods and nothing else but what `key` says, once as long as periods are as they were."""
    if not _may_keep(periods):
        return make()
    of_these = _kept.setdefault(periods, {})
    now = periods._version, periods.data_ptr()
    found = of_these.get(key)
    if found is None or found[0] != now:
        if len(of_these) >= MOST:
            of_these.clear()
        with torch.inference_mode(False), torch.no_grad():  # gradients may need it later
            found = of_these[key] = now, make()
    return found[1]


def _may_keep(
    periods: Tensor,  # (hd/4,)
) -> bool:
    """Whether tables serve later passes as well: not where somebody records how they are made, as a CUDA graph does."""
    if not nobody_watches() or type(periods) not in (Tensor, torch.nn.Parameter) or periods.is_inference():
        return False
    if periods.requires_grad and torch.is_grad_enabled():
        return False
    return periods.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Rope:
    """The RoPE settings of a host model, read from it by its adapter."""

    periods: Tensor  # (hd/4,), the host's own, for planes of two axes
    periods_are_inverse: bool = False  # `periods` holds 1/period, to be multiplied (Hugging Face)
    base: float | None = 100.0  # to make the periods of the three axes of DHW
    min_period: float | None = None
    max_period: float | None = None
    normalize: str = "separate"
    coord_dtype: torch.dtype = torch.float32
    promote_coords: bool = True  # to wider periods before they become angles, or only by the division
    coords_as_periods: bool = False  # in the periods' dtype, be it narrower, before they become angles (timm)
    table_dtype: torch.dtype | None = None  # of sin and cos; None: as they come out
    shift: float | None = None  # training: uniform in [-shift, shift], per axis
    jitter: float | None = None  # training: log-uniform in [1/jitter, jitter], per axis
    rescale: float | None = None  # training: log-uniform in [1/rescale, rescale], all axes alike
    draw_device: torch.device | None = None  # of the random draws; None: where `periods` is
    draw_per_block: bool = False  # draw anew for every block (facebookresearch) or once per forward

    @property
    def head_dim(self) -> int:
        return 4 * len(self.periods)

    @property
    def narrows(self) -> bool:
        """Whether coordinates are rounded to the dtype of periods that a host cast with the model."""
        dtype = self.periods.dtype
        return self.coords_as_periods and torch.promote_types(self.coord_dtype, dtype) != dtype

    @property
    def augments(self) -> bool:
        return not (self.shift is None and self.jitter is None and self.rescale is None)

    def draw(self, num_axes: int) -> Augmentation:
        """Draws shift, jitter and rescale in this order, as all DINOv3 implementations do."""
        here, device = self.draw_device, self.periods.device

        def uniform(n: int, high: float) -> Tensor:
            def draw() -> Tensor:
                return torch.empty(n, dtype=self.coord_dtype, device=here or device).uniform_(-high, high)

            return draw() if here is None else drawn_on_host(draw, device)

        return Augmentation(
            shift=None if self.shift is None else uniform(num_axes, self.shift),
            jitter=None if self.jitter is None else uniform(num_axes, math.log(self.jitter)).exp(),
            rescale=None if self.rescale is None else uniform(1, math.log(self.rescale)).exp(),
        )

    def axis_periods(self, num_axes: int) -> list[Tensor]:
        """Periods of each axis: the host's own in 2D; for (D, H, W) each section its full range."""
        sections = section_sizes(self.head_dim, num_axes)
        if num_axes == 2:
            return [self.periods, self.periods]
        dtype = torch.promote_types(self.periods.dtype, torch.float32)
        made = [
            make_periods(n, self.base, self.min_period, self.max_period, dtype, self.periods.device) for n in sections
        ]
        return [(1 / p if self.periods_are_inverse else p).to(self.periods.dtype) for p in made]

    def angles(self, grid: Sequence[int], augmentation: Augmentation | None = None) -> list[Tensor]:
        """One table of angles per axis: (n0, s0), (n1, s1), ... for a plane of `grid` = (n0, n1[, n2]).

        The sections s add up to hd/2. `augmentation` is applied to the coordinates if given.
        """
        coords = coordinates(grid, self.normalize, self.coord_dtype, self.periods.device)
        if augmentation is not None:
            coords = augmentation.apply(coords)
        periods = self.axis_periods(len(grid))
        if self.periods_are_inverse:
            return [2 * math.pi * c[:, None] * p for c, p in zip(coords, periods)]
        if self.coords_as_periods:
            coords = [c.to(self.periods.dtype) for c in coords]
        elif self.promote_coords:
            coords = [c.to(torch.promote_types(c.dtype, self.periods.dtype)) for c in coords]
        return [2 * math.pi * c[:, None] / p for c, p in zip(coords, periods)]

    def sincos(self, grid: Sequence[int], augmentation: Augmentation | None = None) -> tuple[Tensor, Tensor]:
        """Dense sine and cosine tables of one sequence of patches, (L, hd) each, L = n0*n1[*n2]."""
        sin, cos = self.halves(grid, augmentation)
        return sin.repeat(1, 2), cos.repeat(1, 2)

    def axis_tables(self, grid: Sequence[int], augmentation: Augmentation | None = None) -> Tables:
        """Sine and cosine tables of each axis, which `halves` has side by side.

        Kept from pass to pass where periods are as they were: making them takes many small operations.
        """
        if augmentation is not None:
            return self._axis_tables(grid, augmentation)
        settings = [getattr(self, field.name) for field in fields(self) if field.name != "periods"]
        return kept(self.periods, (tuple(grid), *settings), lambda: self._axis_tables(grid, None))

    def _axis_tables(self, grid: Sequence[int], augmentation: Augmentation | None) -> Tables:
        angles = self.angles(grid, augmentation)
        dtype = self.table_dtype or angles[0].dtype
        return Tables(tuple([a.sin().to(dtype) for a in angles]), tuple([a.cos().to(dtype) for a in angles]))

    def halves(self, grid: Sequence[int], augmentation: Augmentation | None = None) -> tuple[Tensor, Tensor]:
        """The first halves of `sincos`, which the second ones repeat, (L, hd/2) each."""
        angles = dense_table(self.angles(grid, augmentation), grid)  # (L, hd/2)
        sin, cos = angles.sin(), angles.cos()
        return sin.to(self.table_dtype or sin.dtype), cos.to(self.table_dtype or cos.dtype)


def dense_table(
    tables: Sequence[Tensor],  # per axis (n_i, s_i)
    grid: Sequence[int],  # the n_i
) -> Tensor:  # (L, sum of s_i), L = product of n_i
    """One table of all tokens, row-major, from those of the axes."""
    wide = []
    for axis, table in enumerate(tables):
        shape = [n if a == axis else 1 for a, n in enumerate(grid)]
        wide.append(table.view([*shape, table.shape[1]]).expand(*grid, -1))
    return torch.cat(wide, -1).flatten(0, -2)


class PlaneAngles:
    """RoPE of one plane: what kernels make angles from, or dense tables, made when they are asked for."""

    def __init__(
        self,
        rope: Rope | None,  # None: there are only tables
        grid: Sequence[int] = (),
        augmentation: Augmentation | None = None,
        sincos: tuple[Tensor, Tensor] | None = None,  # (L, hd) each
    ) -> None:
        self.rope, self.grid, self.augmentation = rope, grid, augmentation
        self._sincos = sincos
        self._periods: list[Tensor] | None = None
        self._halves: tuple[Tensor, Tensor] | None = None
        self._by_axis: Tables | None = None
        self._elsewhere: dict[torch.device, PlaneAngles] = {}

    def sincos(self) -> tuple[Tensor, Tensor]:
        """Sine and cosine, (L, hd) each."""
        if self._sincos is None:
            assert self.rope is not None  # or there were tables
            self._sincos = self.rope.sincos(self.grid, self.augmentation)
        return self._sincos

    def halves(self) -> tuple[Tensor, Tensor]:
        """The first halves of `sincos`, which the second ones repeat, (L, hd/2) each."""
        if self._halves is None and self._sincos is not None:
            sin, cos = self._sincos
            self._halves = sin[:, : sin.shape[1] // 2], cos[:, : cos.shape[1] // 2]
        elif self._halves is None:
            assert self.rope is not None
            self._halves = self.rope.halves(self.grid, self.augmentation)
        return self._halves

    def by_axis(self) -> Tables:
        """`Rope.axis_tables`, made once; where there are only dense tables, those as of one axis."""
        if self._by_axis is None:
            if self.rope is not None and hasattr(self.rope, "axis_tables"):
                self._by_axis = self.rope.axis_tables(self.grid, self.augmentation)
            else:
                sin, cos = self.halves()
                self._by_axis = Tables((sin.contiguous(),), (cos.contiguous(),))
        return self._by_axis

    def on(self, device: torch.device) -> PlaneAngles:
        """The same for rows that are on this device."""
        made_from = getattr(self.rope, "periods", None)
        mine = (self.sincos()[0] if made_from is None else made_from).device
        if mine == device:
            return self
        if device not in self._elsewhere:
            sin, cos = self.sincos()
            self._elsewhere[device] = PlaneAngles(None, sincos=(sin.to(device), cos.to(device)))
        return self._elsewhere[device]

    def periods(self) -> list[Tensor]:
        """`Rope.axis_periods`, made once: for three axes they are computed."""
        if self._periods is None:
            assert self.rope is not None
            self._periods = self.rope.axis_periods(len(self.grid))
        return self._periods


class PlaneTables:
    """Angles of one forward pass: once per plane, augmented in training as the host does."""

    def __init__(self, rope: Rope | None, training: bool, num_axes: int = 2) -> None:
        self.rope = rope
        self.augments = rope is not None and training and rope.augments
        self._draws: dict[int, Augmentation] = {}  # by number of axes, where one draw serves the forward
        self._tables: dict[Plane | tuple[int, ...], PlaneAngles] = {}  # by grid, or where it is compiled by plane
        if rope is not None and self.augments and not rope.draw_per_block:
            self._draw(num_axes)  # of the first plane, before anything else of this forward draws

    def for_block(self, plane: Plane, sizes: Sizes) -> PlaneAngles | None:
        """Angles for the next block's plane of a volume of (D, H, W) tokens; None without RoPE.

        All calls are for the same volume.
        """
        if self.rope is None:
            return None
        grid = plane.grid(sizes)
        if self.augments and self.rope.draw_per_block:
            return PlaneAngles(self.rope, grid, self.rope.draw(len(grid)))
        key = plane if torch.compiler.is_compiling() else grid  # sizes as keys would be fixed by torch.compile
        if key not in self._tables:
            self._tables[key] = PlaneAngles(self.rope, grid, self._draw(len(grid)))
        return self._tables[key]

    def _draw(self, num_axes: int) -> Augmentation | None:
        if self.rope is not None and self.augments and num_axes not in self._draws:
            self._draws[num_axes] = self.rope.draw(num_axes)
        return self._draws.get(num_axes)
