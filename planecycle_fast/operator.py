"""`plane_cycle`: Algorithm 1 of the paper around any 2D layer, with or without global tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .geometry.planes import HW, Plane, parse_plane
from .geometry.pooling import Transition, check_pooling, transition
from .ops import plane_switch

LAYOUTS = ("tokens", "maps")


def plane_cycle(
    x: Tensor,  # (B, D, H, W, C)
    g: Tensor | None,  # (B, S, g, C), any number of slices S >= 1, or None
    layer: Callable[[Tensor, tuple[int, ...]], Tensor],
    plane: str | Plane,
    pool_method: str = "PCg",
    globals_at: str = "plane",
    layout: str = "tokens",
) -> tuple[Tensor, Tensor | None]:
    """Applies a 2D layer to every slice of a volume along one plane (paper section 2.2, Algorithm 1).

    Args:
        x: features of the volume, floating point.
        g: global tokens of S slices, pooled to the P slices of `plane`; None for networks without any.
        layer: called once as ``layer(t, grid)``, grid = (n0, n1), or (n0, n1, n2) for DHW. It keeps the
            plane's size and may change the number of channels C.
        plane: "HW", "DW", "DH" or "DHW".
        pool_method: "PCg" or "PCm", see `planecycle_fast.geometry.pooling`.
        globals_at: "plane" returns globals per slice of `plane`; "depth" pools them back to D slices,
            as the authors' operator does.
        layout: what the layer takes and returns: "tokens" (B*P, g + L, C), globals first; "maps"
            (B*P, C, n0, n1), for CNNs, without globals.

    Returns: features (B, D, H, W, C) and globals (B, P, g, C), (B, D, g, C) under "depth", or None.

    Raises:
        TypeError: x or g is not a floating-point tensor, or the layer does not return a tensor.
        ValueError: wrong shapes or names, or a layer that changes the plane's size.
    """
    plane = parse_plane(plane)
    check_pooling(pool_method, globals_at)
    _check_inputs(x, g, layer, layout)
    batch, sizes, num_globals = x.shape[0], tuple(x.shape[1:4]), 0 if g is None else g.shape[2]
    depth, slices, grid = sizes[0], plane.slices(sizes), plane.grid(sizes)

    patches, pooling = x.flatten(2, 3).flatten(0, 1), Transition(depth, slices)  # (B*D, L, C)
    if g is None:
        t = plane_switch(patches, HW, plane, sizes, 0, pooling)  # (B*P, L, C)
    elif g.shape[1] == depth:
        pooling = transition(depth, slices, depth, pool_method, "plane")
        t = plane_switch(patches, HW, plane, sizes, num_globals, pooling, globals_=g.flatten(0, 1))  # (B*P, g + L, C)
    else:
        pooled = transition(g.shape[1], slices, depth, pool_method, "plane").apply(g)  # (B, P, g, C)
        t = plane_switch(patches, HW, plane, sizes, 0, pooling)
        assert isinstance(t, Tensor)
        t = plane_switch(t, plane, plane, sizes, num_globals, Transition(slices, slices), globals_=pooled.flatten(0, 1))
    assert isinstance(t, Tensor)  # no norm was asked for
    if layout == "maps":
        t = t.unflatten(1, grid).movedim(-1, 1)  # (B*P, C, n0, n1), a view

    out = layer(t, grid)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(f"layer must return a floating-point tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    channel_dim = 1 if layout == "maps" else 2
    expected = list(t.shape)
    expected[channel_dim] = out.shape[channel_dim] if out.ndim == t.ndim else -1
    if list(out.shape) != expected:
        raise ValueError(
            f"layer must keep the size of the {plane} plane: it took {tuple(t.shape)} and returned {tuple(out.shape)}; "
            "only the number of channels may change"
        )

    if layout == "maps":
        out = out.movedim(1, -1).flatten(1, -2)
    patches = out[:, num_globals:].contiguous()
    back = plane_switch(patches, plane, HW, sizes, 0, Transition(slices, depth))
    assert isinstance(back, Tensor)
    x = back.unflatten(1, sizes[1:]).unflatten(0, (batch, depth))
    if g is None:
        return x, None
    g = out[:, :num_globals].unflatten(0, (batch, slices))
    if globals_at == "depth":
        g = transition(slices, depth, depth).apply(g)
    return x, g


def _check_inputs(x: Tensor, g: Tensor | None, layer: Callable[..., Tensor], layout: str) -> None:
    if not callable(layer):
        raise TypeError(f"layer must be callable, got {type(layer).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, D, H, W, C), none of them 0, got {tuple(x.shape)}")
    if g is None:
        return
    if layout == "maps":
        raise ValueError(f"g must be None with layout 'maps', got {type(g).__name__}")
    if not isinstance(g, Tensor) or not g.is_floating_point():
        raise TypeError(f"g must be a floating-point tensor or None, got {getattr(g, 'dtype', type(g).__name__)}")
    if g.ndim != 4 or g.shape[0] != x.shape[0] or g.shape[1] == 0 or g.shape[3] != x.shape[4]:
        raise ValueError(f"g must have shape (B={x.shape[0]}, S, g, C={x.shape[4]}), S >= 1, got {tuple(g.shape)}")
    if g.dtype != x.dtype or g.device != x.device:
        raise ValueError(f"g must have x's dtype and device, {x.dtype} on {x.device}, got {g.dtype} on {g.device}")
