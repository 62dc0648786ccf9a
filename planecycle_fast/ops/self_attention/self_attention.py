"""self_attention: RoPE of queries and keys, then attention: what comes between qkv and the projection, in one pass.

Own kernels (backend "triton") take q, k and v as a linear layer leaves them, packed in one tensor or in three, and turn
queries and keys when they load them; nothing is copied, and the context comes out as the projection wants it.
"""

from __future__ import annotations

from torch import Tensor

from ..rotary.angles import Tables, rope_ref
from .attention import attention_ref


def self_attention_ref(
    q: Tensor,  # (N, rows, heads, hd), any strides; without k and v (N, rows, 3*heads, hd): heads of q, k and v
    k: Tensor | None = None,  # (N, rows, heads, hd)
    v: Tensor | None = None,  # like k
    angles: Tables | None = None,  # of the rows after the globals; None: nothing turns
    num_globals: int = 0,  # g
    scale: float | None = None,  # of scores; None: 1/sqrt(hd)
    in_table_dtype: bool = False,  # as of `ops.rope`
) -> Tensor:  # (N, rows, heads, hd), contiguous
    """Pure PyTorch, any device and floating dtype, differentiable any number of times: `rope_ref`, `attention_ref`."""
    if k is None or v is None:
        q, k, v = q.chunk(3, dim=2)
    if angles is not None:
        q, k = [rope_ref(t, angles, num_globals, in_table_dtype=in_table_dtype) for t in (q, k)]
    return attention_ref(q, k, v, scale)
