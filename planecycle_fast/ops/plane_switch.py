"""plane_switch: rows from one plane's order to another's, globals through M.

New patch row (p, i, j) is the old row that holds the same voxel (`planes.row_map`); the new globals of
a volume are M times the old ones (`pooling.Transition`). Equivalent to the authors' ``movedim``,
``reshape``, ``adaptive_avg_pool1d`` and ``cat``, in one pass over the rows.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import pick
from ..planes import Plane, Sizes, parse_plane, permutation
from ..pooling import Transition


def plane_switch_ref(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`
    old: Plane,
    new: Plane,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`
    """Pure PyTorch, any device and floating dtype, differentiable any number of times.

    Returns `x` itself where rows and M both stay as they are.
    """
    g, channels = num_globals, x.shape[-1]
    if old == new and (g == 0 or transition.is_identity):
        return x
    batch = x.shape[0] // old.slices(sizes)  # written out, so that B = 0 and C = 0 leave nothing to guess
    volumes = x.unflatten(0, (batch, old.slices(sizes)))  # (B, P1, g + L1, C)
    out = x.new_empty(batch, new.slices(sizes), g + new.length(sizes), channels)
    # The one gather: views name the voxels of both orders, each row is read once and written once.
    source = volumes[:, :, g:].reshape(batch, *old.ordered(sizes), channels)
    target = out[:, :, g:].view(batch, *new.ordered(sizes), channels)
    target.copy_(source.permute(permutation(old, new)))
    if g:
        out[:, :, :g] = transition.apply(volumes[:, :, :g])
    return out.flatten(0, 1)


def plane_switch(
    x: Tensor,  # (B*P1, g + L1, C), plane order of `old`
    old: Plane | str,
    new: Plane | str,
    sizes: Sizes,  # (D, H, W) in tokens
    num_globals: int,  # g
    transition: Transition,  # M, (P2, P1)
    backend: str = "auto",
) -> Tensor:  # (B*P2, g + L2, C), plane order of `new`
    """`plane_switch_ref` on the backend asked for.

    Raises:
        TypeError: x is not a floating-point tensor, or transition no `Transition`.
        ValueError: an unknown plane, sizes or shapes that do not belong together, or a backend that is
            unknown or not usable.
    """
    old, new = parse_plane(old, "old"), parse_plane(new, "new")
    _check(x, old, new, sizes, num_globals, transition)
    chosen = pick(backend, x.device)
    if old == new and (num_globals == 0 or transition.is_identity):
        return x
    if chosen == "triton":
        from .plane_switch_triton import plane_switch_triton

        return plane_switch_triton(x, old, new, sizes, num_globals, transition)
    return plane_switch_ref(x, old, new, sizes, num_globals, transition)


def _check(x: Tensor, old: Plane, new: Plane, sizes: Sizes, num_globals: int, transition: Transition) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"sizes must be (D, H, W), at least 1 each, got {tuple(sizes)}")
    if num_globals < 0:
        raise ValueError(f"num_globals must be at least 0, got {num_globals}")
    if not isinstance(transition, Transition):
        raise TypeError(f"transition must be a pooling.Transition, got {type(transition).__name__}")
    slices, rows = old.slices(sizes), num_globals + old.length(sizes)
    if x.ndim != 3 or x.shape[0] % slices or x.shape[1] != rows:
        raise ValueError(
            f"x must have shape (B*{slices}, {rows}, C) for {num_globals} globals and a {old} plane of "
            f"(D, H, W) = {tuple(sizes)}, got {tuple(x.shape)}"
        )
    expected = (new.slices(sizes), slices)
    if (transition.num_next, transition.num_prev) != expected:
        raise ValueError(
            f"transition must be a matrix {expected} from {old} to {new}, "
            f"got {(transition.num_next, transition.num_prev)}"
        )
