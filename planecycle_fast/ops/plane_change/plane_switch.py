"""plane_switch: rows from one plane's order to another's, globals through M; with the sum before and the norm after.

New patch row (p, i, j) is the old row that holds the same voxel (`planes.row_map`); the new globals of
a volume are M times the old ones (`pooling.Transition`). Equivalent to the authors' ``movedim``,
``reshape``, ``adaptive_avg_pool1d`` and ``cat``, in one pass over the rows.

In full it is the boundary between two blocks of a transformer: residual + LayerScale * branch in the old
plane, then the change of plane, then the next block's norm, of the rounded residual.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...geometry.planes import Plane, Sizes, parse_plane, permutation
from ...geometry.pooling import Transition
from ...runtime.backends import pick
from ...runtime.tracing import may_fill
from ..residual.add_norm import pick_rows
from ..residual.norm import Norm, add_ref, check_stream, normalize_ref


def plane_switch_ref(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; (B*P1, L1, C) where globals come in `globals_`
    old: Plane,
    new: Plane,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
    branch: Tensor | None = None,  # like x
    scale: Tensor | None = None,  # (C,)
    norm: Norm | None = None,
    globals_: Tensor | None = None,  # (B*P1, g, C), or (1, g, C): the same in all slices
    norm_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (B*P2, g + L2, C), plane order of `new`; with a norm: and its norm
    """Pure PyTorch, any device and floating dtype, differentiable any number of times.

    Returns `x` itself where nothing is added and rows and M both stay as they are.
    """
    x, g, channels = add_ref(x, branch, scale), num_globals, x.shape[-1]
    if old == new and globals_ is None and _keeps_globals(g, transition):
        return x if norm is None else (x, normalize_ref(x, norm, norm_dtype))
    batch = x.shape[0] // old.slices(sizes)  # written out, so that B = 0 and C = 0 leave nothing to guess
    volumes = x.unflatten(0, (batch, old.slices(sizes)))  # (B, P1, g + L1, C)
    skip = 0 if globals_ is not None else g
    dtype = x.dtype if globals_ is None else torch.promote_types(x.dtype, globals_.dtype)
    slices, length = new.slices(sizes), new.length(sizes)
    source = volumes[:, :, skip:].reshape(batch, *old.ordered(sizes), channels).permute(permutation(old, new))
    pooled = globals_ if g else None  # (B, P2, g, C), or (1, g, C): rows of M sum to 1
    if g and globals_ is None:
        pooled = transition.apply(volumes[:, :, :g])
    elif pooled is not None and pooled.shape[0] != 1:
        pooled = transition.apply(pooled.unflatten(0, (batch, old.slices(sizes))))
    if not may_fill():
        parts = [] if pooled is None else [pooled.expand(batch, slices, -1, -1).flatten(0, 1).to(dtype)]
        # Three axes: of four torch.export asks which memory format they have, and fixes sizes by it.
        out = torch.cat([*parts, source.reshape(batch * slices, length, channels).to(dtype)], 1)
    else:
        out = x.new_empty(batch * slices, g + length, channels, dtype=dtype)  # no view: FSDP warns of those
        rows = out.view(batch, slices, g + length, channels)
        # The one gather: views name the voxels of both orders, each row is read once and written once.
        rows[:, :, g:].view(batch, *new.ordered(sizes), channels).copy_(source)
        if pooled is not None:
            rows[:, :, :g] = pooled
    return out if norm is None else (out, normalize_ref(out, norm, norm_dtype))


def _keeps_globals(num_globals: int, transition: Transition) -> bool:
    """Whether M changes nothing. Of traced sizes only what holds for all of them, so that none is compiled for."""
    if num_globals == 0:
        return True
    if torch.compiler.is_compiling():
        return not transition.mean and transition.via is None
    return transition.is_identity


def plane_switch(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; (B*P1, L1, C) where globals come in `globals_`
    old: Plane | str,
    new: Plane | str,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
    branch: Tensor | None = None,  # like x
    scale: Tensor | None = None,  # (C,)
    norm: Norm | None = None,
    globals_: Tensor | None = None,  # (B*P1, g, C), or (1, g, C): the same in all slices
    norm_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # (B*P2, g + L2, C), plane order of `new`; with a norm: and its norm
    """`plane_switch_ref` on the backend asked for; never writes to its inputs.

    Backends "triton" and "cpu" do all of it in one pass; with a branch or a norm they have first derivatives in reverse
    mode only. Globals of their own are put before their patches by torch first, which is one pass.

    Args:
        x: the residual stream. With `branch`, ``x + scale * branch`` changes planes (DESIGN: paper section 2.2).
        norm: also return the norm of the new rows.
        norm_dtype: of the norm, see `add_norm`.
        globals_: of a volume that enters the stream: x has only patches then, of any strides.

    Raises:
        TypeError: x or another is not a floating-point tensor, transition no `Transition`, norm no `Norm`, or
            norm_dtype no floating-point dtype.
        ValueError: an unknown plane, sizes or shapes that do not belong together, a backend that is unknown or not
            usable, or more than 8,192 channels with a branch or a norm on backend "triton".
    """
    old, new = parse_plane(old, "old"), parse_plane(new, "new")
    check_switch(x, old, new, sizes, num_globals, transition, branch, scale, norm, globals_, norm_dtype)
    in_full = branch is not None or norm is not None
    chosen = pick_rows(backend, x) if in_full else pick(backend, x.device, op="plane_switch")
    return switch_on(chosen, x, old, new, sizes, num_globals, transition, branch, scale, norm, globals_, norm_dtype)


def switch_on(
    chosen: str,  # a backend that can be used
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`; (B*P1, L1, C) where globals come in `globals_`
    old: Plane,
    new: Plane,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
    branch: Tensor | None = None,  # like x
    scale: Tensor | None = None,  # (C,)
    norm: Norm | None = None,
    globals_: Tensor | None = None,  # (B*P1, g, C), or (1, g, C): the same in all slices
    norm_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (B*P2, g + L2, C), plane order of `new`; with a norm: and its norm
    """`plane_switch` of what is known to belong together."""
    in_full = branch is not None or norm is not None
    if chosen == "reference":
        return plane_switch_ref(x, old, new, sizes, num_globals, transition, branch, scale, norm, globals_, norm_dtype)
    if globals_ is not None:
        x = torch.cat([globals_.expand(x.shape[0], -1, -1), add_ref(x, branch, scale)], dim=1)
        branch = scale = None
    stays = old == new and _keeps_globals(num_globals, transition)
    load = _load if torch.compiler.is_compiling() else _loaded  # torch.compile warns of caches
    switch, boundary, add_rows = load(chosen)
    if in_full and stays:
        return add_rows(x, branch, scale, norm, norm_dtype)
    if in_full:
        return boundary(x, old, new, sizes, num_globals, transition, branch, scale, norm, norm_dtype)
    return x if stays else switch(x, old, new, sizes, num_globals, transition)


def _load(backend: str) -> tuple[Callable[..., Any], ...]:
    """Of a change of planes, the same in full, and in full where rows stay."""
    if backend == "cpu":
        from ..residual.add_norm_cpu import add_norm_cpu as boundary
        from ..residual.add_norm_cpu import add_rows_cpu as add_rows
        from .plane_switch_cpu import plane_switch_cpu as switch
    else:
        from ..residual.add_norm_triton import add_norm_triton as boundary
        from ..residual.add_norm_triton import add_rows_triton as add_rows
        from .plane_switch_triton import plane_switch_triton as switch
    return switch, boundary, add_rows


_loaded = cache(_load)  # imports cost time in every call


def check_switch(
    x: Tensor,  # as of `plane_switch`
    old: Plane,
    new: Plane,
    sizes: Sizes,
    num_globals: int,
    transition: Transition,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm | None = None,
    globals_: Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> None:
    """Raises TypeError or ValueError for arguments of `plane_switch` that do not belong together."""
    check_stream(x, branch, scale, norm, norm_dtype)
    if len(sizes) != 3 or any([n < 1 for n in sizes]):
        raise ValueError(f"sizes must be (D, H, W), at least 1 each, got {tuple(sizes)}")
    if num_globals < 0:
        raise ValueError(f"num_globals must be at least 0, got {num_globals}")
    if not isinstance(transition, Transition):
        raise TypeError(f"transition must be a pooling.Transition, got {type(transition).__name__}")
    slices, rows = old.slices(sizes), (0 if globals_ is not None else num_globals) + old.length(sizes)
    if x.ndim != 3 or x.shape[0] % slices or x.shape[1] != rows:
        held = "no globals" if globals_ is not None else f"{num_globals} globals"
        raise ValueError(
            f"x must have shape (B*{slices}, {rows}, C) for {held} and a {old} plane of "
            f"(D, H, W) = {tuple(sizes)}, got {tuple(x.shape)}"
        )
    expected = (new.slices(sizes), slices)
    if (transition.num_next, transition.num_prev) != expected:
        raise ValueError(
            f"transition must be a matrix {expected} from {old} to {new}, "
            f"got {(transition.num_next, transition.num_prev)}"
        )
    if globals_ is None:
        return
    if not isinstance(globals_, Tensor) or not globals_.is_floating_point():
        got = getattr(globals_, "dtype", type(globals_).__name__)
        raise TypeError(f"globals_ must be a floating-point tensor or None, got {got}")
    wanted = (num_globals, x.shape[2])
    if globals_.ndim != 3 or tuple(globals_.shape[1:]) != wanted or globals_.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"globals_ must have shape ({x.shape[0]}, {num_globals}, {x.shape[2]}) or (1, {num_globals}, "
            f"{x.shape[2]}), got {tuple(globals_.shape)}"
        )
