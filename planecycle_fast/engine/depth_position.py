"""`lift(depth_position=...)`: a place along D for models that know none there; nothing is learned.

Learned positions (DINOv2, CLIP, MAE) say where in its slice a token is. On the planes DW and DH all slices look alike
to them, so that attention cannot tell their order. The paper adds nothing for it; this is an addition, off by default.

Both kinds follow the rule of DINOv3's rotary embedding on the one axis D: slice d of D has the coordinate
``2 * (d + 0.5) / D - 1``, channel j of n the period ``100 ** (j / n)``, and the angle is 2 pi times their quotient.

"sincos": the sine and cosine of these angles, C/2 each, are added to the patches once, before the first block, with
the root mean square of the model's own learned positions about their mean. "rope1d": queries and keys turn by them
where a layer's plane contains D, over all hd/2 pairs of channels, by the operation `rope`; on HW nothing happens.
Globals get neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry.planes import Plane, Sizes
from ..geometry.rope import PlaneAngles, PlaneTables, coordinates, make_periods
from ..hosts import Adapter
from ..hosts.wrapped import read
from .lifted_block import LiftedBlock

KINDS = ("none", "sincos", "rope1d")
BASE = 100.0  # of periods, as in DINOv3


def check_depth_position(depth_position: str, adapter: Adapter) -> None:
    """Raises ValueError for a kind that this model cannot use."""
    if depth_position == "none":
        return
    if (known := adapter.positions_on_planes()) is not None:
        raise ValueError(
            f"depth_position must be 'none' for this model, got {depth_position!r}: {known} follow every plane already"
        )
    if depth_position == "sincos" and adapter.positions() is None:
        raise ValueError(
            "depth_position must be 'none' or 'rope1d' for this model, got 'sincos': it has no learned positions whose "
            "size that of depth could follow (an adapter of your own gives them as `positions`)"
        )


def angles(depth: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # (D, count)
    """Of the slices of a volume, for `count` channels."""
    [at] = coordinates([depth], dtype=dtype, device=device)
    return 2 * math.pi * at[:, None] / make_periods(count, BASE, dtype=dtype, device=device)


def amplitude(
    positions: Tensor,  # (L, C), learned ones of patches
) -> Tensor:  # ()
    """The root mean square of learned positions about their mean, in at least float32."""
    wide = positions.detach().to(torch.promote_types(positions.dtype, torch.float32))
    return (wide - wide.mean(0)).square().mean().sqrt()


def add_depth(
    patches: Tensor,  # (B*D, L, C), canonical order
    depth: int,  # D
    adapter: Adapter,
    inplace: bool = False,
) -> Tensor:  # (B*D, L, C)
    """Patches with the code of their slice, "sincos"; in place the same tensor.

    Raises ValueError where the learned positions have no values here, as while a framework has taken them away.
    """
    positions, channels = adapter.positions(), patches.shape[2]
    assert positions is not None  # see `check_depth_position`
    if positions.device != patches.device:
        raise ValueError(
            f"the model's learned positions must be on {patches.device} for depth_position='sincos', got "
            f"{positions.device}: keep them there when other weights are offloaded"
        )
    if channels % 2:
        raise ValueError(f"depth_position='sincos' must have an even number of channels, got {channels}")
    size = amplitude(positions)
    turns = angles(depth, channels // 2, size.dtype, patches.device)
    code = torch.cat([turns.sin(), turns.cos()], dim=1) * (math.sqrt(2) * size)  # (D, C), of that very size
    of_volumes, code = patches.unflatten(0, (-1, depth)), code.to(patches.dtype)[:, None]
    if inplace:
        of_volumes += code
        return patches
    return (of_volumes + code).flatten(0, 1)


class DepthTables:
    """Angles of one forward pass for "rope1d", in the place of `PlaneTables`: those of the planes that contain D."""

    augments = False

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self._tables: dict[Plane, PlaneAngles] = {}

    def for_block(self, plane: Plane, sizes: Sizes) -> PlaneAngles | None:
        """Angles for a plane of a volume of (D, H, W) tokens; None on HW. All calls are for the same volume."""
        if 0 not in plane.sequence:
            return None
        if plane not in self._tables:
            axis = plane.sequence.index(0)
            shape = [-1 if i == axis else 1 for i in range(len(plane.sequence))] + [self.head_dim]
            turns = angles(sizes[0], self.head_dim // 2, self.dtype, self.device).repeat(1, 2)  # (D, hd)
            sin, cos = [t.view(shape).expand(*plane.grid(sizes), -1).flatten(0, -2) for t in (turns.sin(), turns.cos())]
            self._tables[plane] = PlaneAngles(None, sincos=(sin, cos))
        return self._tables[plane]


def tables_of(
    depth_position: str, adapter: Adapter, blocks: Sequence[LiftedBlock], volume: Tensor, training: bool, num_axes: int
) -> PlaneTables | DepthTables:
    """Angles of one forward pass on a volume (B, channels, D, height, width): the model's, or those of "rope1d".

    Raises ValueError where "rope1d" would be lost: attention that the model's own code runs does not turn.
    """
    if depth_position != "rope1d":
        return PlaneTables(adapter.rope(volume.dtype), training, num_axes)
    for i, block in enumerate(blocks):
        if (reason := block.description().why_not_attention) is not None:
            raise ValueError(
                f"depth_position 'rope1d' needs attention that can be taken apart, got block {i}, whose own code runs: "
                f"{reason}"
            )
    attention = blocks[0].description().attention
    width = read(attention.output, "in_features", 0)
    if width == 0 or width % (2 * attention.heads):
        raise ValueError(f"depth_position 'rope1d' needs heads of even width, got {width} / {attention.heads}")
    dtype = torch.promote_types(volume.dtype, torch.float32)
    return DepthTables(width // attention.heads, dtype, volume.device)


def describe_depth(depth_position: str, adapter: Adapter, planes: Sequence[Plane]) -> str:
    """A line for `LiftedModel.report`."""
    if depth_position == "sincos":
        positions = adapter.positions()
        assert positions is not None  # see `check_depth_position`
        return f"depth: sine and cosine added to the patches, of size {float(amplitude(positions)):.3g}"
    turned = dict.fromkeys([plane.name for plane in planes if 0 in plane.sequence])
    where = f"on planes {', '.join(turned)}" if turned else "nowhere, as no plane contains D"
    return f"depth: queries and keys turned by rope {where}"
