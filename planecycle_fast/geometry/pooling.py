"""How global tokens (class and register tokens) pass from one plane to the next.

Between two layers the globals of P_prev slices become those of P_next slices. Every rule is a matrix
M (P_next, P_prev) on the slice axis of the residual stream, built from two pieces (paper section 2.3):

    A(n -> m)      adaptive average pooling, with the bins of torch's adaptive_avg_pool1d:
                   row i averages columns floor(i*n/m) up to, not including, ceil((i+1)*n/m)
    mean(n -> m)   the mean of all n slices, repeated m times

    pool_method   globals_at="plane" (Algorithm 1)   globals_at="depth" (the authors' released code)
    PCg           A(P_prev -> P_next)                A(D -> P_next) @ A(P_prev -> D)
    PCm           mean(P_prev -> P_next)             mean(D -> P_next) @ A(P_prev -> D)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .planes import HW, Plane, Sizes

POOL_METHODS = ("PCg", "PCm")
GLOBALS_AT = ("depth", "plane")


@dataclass(frozen=True)
class Transition:
    """One matrix M (num_next, num_prev), in the forms that different callers need.

    `via` is the number of slices between the two steps (D under globals_at="depth"), or None for a
    single step. `mean` makes the last step a mean instead of A.
    """

    num_prev: int
    num_next: int
    via: int | None = None
    mean: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than one slice."""
        for name, slices in (("num_prev", self.num_prev), ("num_next", self.num_next), ("via", self.via)):
            if slices is not None and slices < 1:
                raise ValueError(f"{name} must be at least 1, got {slices}")

    @property
    def is_identity(self) -> bool:
        """Whether M is the identity matrix, so that nothing needs to be computed.

        Passing through `via` slices is lossless when `via` is a multiple of the slices: each of them
        is repeated equally often and averaged again.
        """
        if self.num_prev != self.num_next:
            return False
        if self.mean:
            return self.num_prev == 1
        return self.via is None or self.via % self.num_prev == 0

    def dense(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """M as a matrix, (num_next, num_prev). Each row sums to 1."""
        unit_vectors = torch.eye(self.num_prev, dtype=dtype, device=device)[None, :, None]  # (1, num_prev, 1, num_prev)
        return self.apply(unit_vectors)[0, :, 0]

    def bands(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """First and last non-zero column of every row of M: two int64 tensors, (num_next,)."""
        rows = torch.arange(self.num_next, device=device)
        if self.mean:
            return torch.zeros_like(rows), torch.full_like(rows, self.num_prev - 1)
        first, end = rows, rows + 1
        steps = [self.num_next, self.num_prev] if self.via is None else [self.num_next, self.via, self.num_prev]
        for fine, coarse in pairwise(steps):  # from M's rows back to its columns
            first, end = first * coarse // fine, -(-end * coarse // fine)
        return first, end - 1

    def mean_weights(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
        """The row that M repeats under PCm, (num_prev,): reduce once with it, then broadcast.

        Raises ValueError for PCg, whose rows differ.
        """
        if not self.mean:
            raise ValueError("mean_weights exist for pool_method 'PCm' only, got a transition of 'PCg'")
        return self.dense(dtype, device)[0]

    def apply(
        self,
        globals_: Tensor,  # (B, num_prev, g, C), floating point
    ) -> Tensor:  # (B, num_next, g, C), same dtype
        """M times the globals, summed in at least float32, under autocast too. PCm reduces once and broadcasts."""
        if not torch.compiler.is_compiling() and self.is_identity:  # compiled: see `_average`
            return globals_
        rows = globals_.to(torch.promote_types(globals_.dtype, torch.float32)).flatten(2)  # (B, num_prev, g*C)
        if self.via is not None:
            rows = _average(rows, self.via)
        if self.mean:
            rows = rows.mean(1, keepdim=True).expand(-1, self.num_next, -1)
        else:
            rows = _average(rows, self.num_next)
        return rows.unflatten(2, globals_.shape[2:]).to(globals_.dtype)


def _average(
    rows: Tensor,  # (B, n, K)
    m: int,
) -> Tensor:  # (B, m, K)
    """A(n -> m). By gathering bins: a matrix product would round under autocast, and spread NaN to every bin."""
    n = rows.shape[1]
    if not torch.compiler.is_compiling() and n == m:  # compiled, sizes that are equal by chance would count
        return rows
    bins = torch.arange(m, device=rows.device)
    first, end = bins * n // m, ((bins + 1) * n + m - 1) // m  # rounded up; ONNX evaluators differ below zero
    width = (n - 1) // m + 2  # of any bin; written such that torch.export knows it to be over 1
    columns = first[:, None] + torch.arange(width, device=rows.device)  # (m, width)
    outside = columns >= end[:, None]
    picked = rows[:, columns.clamp(max=n - 1)]  # (B, m, width, K)
    return picked.masked_fill(outside[..., None], 0).sum(2) / (end - first)[:, None]


def transition(
    num_prev: int, num_next: int, depth: int, pool_method: str = "PCg", globals_at: str = "depth"
) -> Transition:
    """The transition of the globals from one plane to the next.

    Args:
        num_prev, num_next: slices P of the old and of the new plane.
        depth: D, the slices of the volume.
        pool_method: "PCg" (grouped averages) or "PCm" (one mean for all).
        globals_at: "depth": back to D slices after every layer, as the authors' code does;
            "plane": straight from plane to plane, Algorithm 1 of the paper.

    Raises:
        ValueError: an unknown pool_method or globals_at.
    """
    check_pooling(pool_method, globals_at)
    via = depth if globals_at == "depth" and num_prev != depth else None
    return Transition(num_prev, num_next, via, mean=pool_method == "PCm")


def between(old: Plane, new: Plane, sizes: Sizes, pool_method: str = "PCg", globals_at: str = "depth") -> Transition:
    """The `transition` from one plane of a volume of `sizes` = (D, H, W) to the next.

    Goes by planes, not by sizes that happen to be equal, so that a compiled model serves all sizes.
    """
    check_pooling(pool_method, globals_at)
    via = sizes[0] if globals_at == "depth" and old != HW else None
    return Transition(old.slices(sizes), new.slices(sizes), via, mean=pool_method == "PCm")


def check_pooling(pool_method: str, globals_at: str) -> None:
    """Raises ValueError for an unknown pool_method or globals_at."""
    if pool_method not in POOL_METHODS:
        raise ValueError(f"pool_method must be one of {', '.join(POOL_METHODS)}, got {pool_method!r}")
    if globals_at not in GLOBALS_AT:
        raise ValueError(f"globals_at must be one of {', '.join(GLOBALS_AT)}, got {globals_at!r}")
