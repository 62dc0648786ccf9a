"""What torch is told of self_attention: shapes of what its operations take and return.

    self_attention(q, k, v, scale, num_globals, grid, sin, cos, load, in_table_dtype, keep, precision) -> out, lse
    self_attention_backward(grad, q, k, v, out, lse, scale, num_globals, grid, sin, cos, load, back, in_table_dtype,
                            precision) -> gradients of q, k and v, or of the packed tensor

`load` says which of q and k are turned when a kernel loads them ("", "q", "qk"), `back` which of their gradients are
turned back before they are stored: those that were turned before, in place, come without `load`, and need it as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def parts(
    q: Tensor,  # (N, rows, heads, hd); without k and v (N, rows, 3*heads, hd)
    k: Tensor | None,  # (N, rows, heads, hd)
    v: Tensor | None,  # like k
) -> tuple[Tensor, Tensor, Tensor]:  # q, k, v (N, rows, heads, hd)
    """Views of a packed tensor, or the three."""
    if k is not None and v is not None:
        return q, k, v
    heads = q.shape[2] // 3
    return q[:, :, :heads], q[:, :, heads : 2 * heads], q[:, :, 2 * heads :]


def fake(
    q: Tensor,  # all as of the operation
    k: Tensor | None,
    v: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:  # out (N, rows, heads, hd), contiguous; lse (N, heads, rows), float32 at least, or (0,)
    """What `self_attention` returns, without data."""
    *_, keep, _ = settings
    n, rows, heads, head_dim = parts(q, k, v)[0].shape
    return q.new_empty(n, rows, heads, head_dim), q.new_empty((n, heads, rows) if keep else (0,), dtype=lse_dtype(q))


def lse_dtype(
    q: Tensor,  # any shape
) -> torch.dtype:
    """float32, of float64 that: the dtype of the logarithms of sums."""
    return torch.promote_types(q.dtype, torch.float32)


def fake_backward(
    grad: Tensor,  # (N, rows, heads, hd)
    q: Tensor,  # as of the operation
    k: Tensor | None,
    v: Tensor | None,
    *others: Any,
) -> list[Tensor]:  # like q, k and v, contiguous; of a packed tensor like that
    """What `self_attention_backward` returns, without data."""
    return [t.new_empty(t.shape) for t in (q, k, v) if t is not None]
