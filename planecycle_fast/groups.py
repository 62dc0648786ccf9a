"""On a CPU a block runs group by group of sequences, so that what passes between its layers stays in the caches.

After the change of planes a sequence needs nothing of the others: attention, residual and MLP of some of them run
before those of the next. Only the residual stream is ever held as a whole, and memory that was just used is used again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import choose
from .branches import attention_branch, autocast_dtype, is_plain, mlp_branch
from .linear_cpu import PlainLinears
from .ops.add_norm_shapes import promoted
from .ops.registry import transforms_active
from .parts import BlockParts, Plan, known_norm

if TYPE_CHECKING:
    from .stream import Layer

GROUP_BYTES = 2**24  # of the widest activations of a group: fewer matrix products, or less memory


def runs_in_groups(parts: BlockParts, todo: Plan, layer: Layer, x: Tensor) -> bool:
    """Whether attention and MLP may run group by group of sequences: on a CPU, for inference, where nobody can tell."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active():
        return False
    if any([getattr(todo, part) is not None for part in ("norm1", "attention", "scale1", "norm2", "mlp", "scale2")]):
        return False
    if choose(layer.backend, x.device, "add_norm", layer.strict) != "cpu":
        return False
    attention, mlp = parts.attention(), parts.mlp()
    return all([is_plain(layer) for layer in (*attention.qkv, attention.output, *mlp.first, mlp.last)])


def run_in_groups(
    parts: BlockParts,
    todo: Plan,
    x: Tensor,  # (N, rows, C), written to
    normed: Tensor,  # (N, rows, C), written to
    layer: Layer,
) -> tuple[Tensor, Tensor]:  # the residual and the MLP's branch, (N, rows, C) each
    """What follows norm1, for as many sequences at a time as the caches hold: each needs just itself from there on."""
    from .ops.add_norm_cpu import add_norm_in_place

    mlp, gamma = parts.mlp(), parts.scale(1).gamma
    norm2 = known_norm(parts.norm(2))[0]
    dtype = autocast_dtype(parts.norm(2), mlp.first)
    sequences = _group(x, max([layer.out_features for layer in mlp.first]))
    linears = PlainLinears(sequences * x.shape[1], several=4 * sequences <= len(x))
    branch = None
    for start in range(0, len(x), sequences):
        group = slice(start, start + sequences)
        attended = attention_branch(parts, todo, normed[group], layer, linears)
        if start == 0:  # the dtype of the sum, which under autocast may be wider than what came in
            x = x.to(promoted(x, attended, gamma))
            dtype = dtype or x.dtype
        normed2 = normed[group] if normed.dtype == dtype else x.new_empty(x[group].shape, dtype=dtype)
        add_norm_in_place(x[group], attended, gamma, norm2, normed2)  # norm1 is not needed any more
        del attended
        out = mlp_branch(parts, todo, normed2, layer, linears)
        if sequences >= len(x):
            return x, out
        if branch is None:
            branch = normed if (normed.shape, normed.dtype) == (x.shape, out.dtype) else out.new_empty(x.shape)
        branch[group] = out
    return x, branch


def _group(
    x: Tensor,  # (N, rows, C)
    hidden: int,
) -> int:
    """How many sequences at a time, groups being of equal size."""
    at_once = max(1, GROUP_BYTES // (x.shape[1] * hidden * x.element_size()))
    return max(1, -(-len(x) // -(-len(x) // at_once)))
