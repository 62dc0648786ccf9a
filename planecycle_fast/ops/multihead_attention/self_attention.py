"""self_attention: RoPE of queries and keys, then attention: what comes between qkv and the projection, in one pass.

Own kernels (backend "triton") take q, k and v as a linear layer leaves them, packed in one tensor or in three, and turn
queries and keys when they load them; nothing is copied, and the context comes out as the projection wants it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.attentions import why_not_for
from ...runtime.backends import asked_for, pick
from ..rotary.angles import Axial, Tables
from ..rotary.rope import check_angles, rope_on
from .attention import attention_on, check_heads, resolve_attention
from .self_attention_load import turned_on_load
from .self_attention_shapes import parts


def self_attention_ref(
    q: Tensor,  # (N, rows, heads, hd), any strides; without k and v (N, rows, 3*heads, hd): heads of q, k and v
    k: Tensor | None = None,  # (N, rows, heads, hd)
    v: Tensor | None = None,  # like k
    angles: Tables | Axial | None = None,  # of the rows after the globals; None: nothing turns
    num_globals: int = 0,  # g
    scale: float | None = None,  # of scores; None: 1/sqrt(hd)
    in_table_dtype: bool = False,  # as of `ops.rope`
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """Pure PyTorch, any device and floating dtype, differentiable any number of times: `rope_ref`, then
    `attention_ref`."""
    return in_steps("reference", "reference", q, k, v, angles, num_globals, scale, in_table_dtype)


def self_attention(
    q: Tensor,  # (N, rows, heads, hd), any strides; without k and v (N, rows, 3*heads, hd): heads of q, k and v
    k: Tensor | None = None,  # (N, rows, heads, hd)
    v: Tensor | None = None,  # like k
    angles: Tables | Axial | None = None,  # of the rows after the globals; None: nothing turns
    num_globals: int = 0,  # g
    scale: float | None = None,  # of scores; None: 1/sqrt(hd)
    in_table_dtype: bool = False,
    backend: str = "auto",
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """`self_attention_ref` on the backend asked for: queries and keys turn, then attention within each sequence.

    Backend "triton" makes one pass, differentiated once, in reverse, for q, k and v; "cpu" turns by its `rope` and
    leaves attention to torch; "auto" is the reference where "triton" does not take the tensors.

    Args:
        scale: of the scores.
        in_table_dtype: as of `ops.rope`.

    Raises:
        TypeError: q, k, v or a table is not a floating-point tensor, or angles of the wrong kind.
        ValueError: shapes or devices that do not belong together, or a backend that is unknown or not usable. On
            "triton" also what `attentions.why_not_call` names, angles that need a gradient, and more than 2**30 rows.
        NotImplementedError: on "triton", forward mode, torch.func's transforms or a second derivative.
    """
    check_self_attention(q, k, v, angles, num_globals)
    chosen = pick(backend, q.device, op="self_attention")
    reason = why_not_for("triton", *parts(q, k, v), scale) if chosen == "triton" else None
    if reason is not None:
        if asked_for(backend) == "triton":
            raise ValueError(f"backend 'triton' does not take these tensors: {reason}; use 'auto'")
        chosen = "reference"
    return self_attention_on(chosen, q, k, v, angles, num_globals, scale, in_table_dtype)


def self_attention_on(
    chosen: str,  # a backend that can be used, and takes these tensors
    q: Tensor,  # all as of `self_attention`
    k: Tensor | None,
    v: Tensor | None,
    angles: Tables | Axial | None = None,
    num_globals: int = 0,
    scale: float | None = None,
    in_table_dtype: bool = False,
    load: str = "qk",
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """`self_attention` of what is known to belong together.

    `load` says what is to turn: "q" where keys have turned before. On "triton" what kernels would turn again and again
    (`turned_on_load`) does so in a pass of its own.
    """
    if chosen == "triton":
        from .self_attention_triton import self_attention_triton

        if angles is not None:
            backward = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (q, k, v)])
            within = turned_on_load(q.shape[1], int(q.shape[3]), q.dtype, backward)
            if k is None and (load, within) == ("qk", ""):  # as a whole, so that its gradient comes as one
                q = rope_on(chosen, q, angles, num_globals, q.shape[2] // 3 * 2, False, in_table_dtype)
            elif not set(load) <= set(within):
                q, k, v = parts(q, k, v)
                how = num_globals, None, False, in_table_dtype
                q, k = [
                    rope_on(chosen, t, angles, *how) if name in load and name not in within else t
                    for name, t in (("q", q), ("k", k))
                ]
            load = "".join([name for name in load if name in within])
        return self_attention_triton(q, k, v, angles, num_globals, scale, in_table_dtype, load)
    attention = resolve_attention("auto", q.device) if chosen == "cpu" else "reference"
    return in_steps(chosen, attention, q, k, v, angles, num_globals, scale, in_table_dtype, load)


def in_steps(
    backend: str,  # of rope
    attention: str,  # as of `attention_on`
    q: Tensor,  # all as of `self_attention_on`
    k: Tensor | None,
    v: Tensor | None,
    angles: Tables | Axial | None,
    num_globals: int,
    scale: float | None,
    in_table_dtype: bool,
    load: str = "qk",
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """Rope, then attention, each on its own."""
    q, k, v = parts(q, k, v)
    if angles is not None and "q" in load:
        q = rope_on(backend, q, angles, num_globals, in_table_dtype=in_table_dtype)
    if angles is not None and "k" in load:
        k = rope_on(backend, k, angles, num_globals, in_table_dtype=in_table_dtype)
    return attention_on(attention, q, k, v, scale)


def check_self_attention(
    q: Tensor,  # all as of `self_attention`
    k: Tensor | None,
    v: Tensor | None,
    angles: Tables | Axial | None,
    num_globals: int,
) -> None:
    """Raises TypeError or ValueError for arguments of `self_attention` that do not belong together."""
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must be a tensor where the other one is, got None")
    if k is None or v is None:
        check_heads(q, q, q)
        if q.shape[2] % 3:
            raise ValueError(f"q must have shape (N, rows, 3*heads, hd) without k and v, got {tuple(q.shape)}")
    else:
        check_heads(q, k, v)
    if angles is not None:
        check_angles(q, angles, num_globals, "q")
