"""On a CPU a block runs group by group of sequences, so that what passes between its layers stays in the caches.

After the change of planes a sequence needs nothing of the others: attention, residual and MLP of some of them run
before those of the next. Only the residual stream is ever held as a whole, and memory that was just used is used again.
All of it is one operation, csrc/block.cpp, made of those that run elsewhere too: where a linear layer is more than its
weight and bias, and for training, blocks run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .backends import choose
from .branches import is_plain
from .ops import Norm
from .ops.registry import transforms_active
from .parts import Plan, Snapshot

if TYPE_CHECKING:
    from .stream import Layer

GROUP_BYTES = 26 * 2**20  # of the widest activations of a group: fewer matrix products, or less memory
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # other subclasses, quantised or sharded, have their own ways
Linear = tuple[Tensor, "Tensor | None"]  # weight (out, in), bias (out,)
_onednn: dict[torch.dtype, bool] = {}
_loaded: list[Callable[..., Tensor]] = []  # `block_in_place`: an import costs time in every call


class _Block(NamedTuple):
    """What a block that runs in groups is made of."""

    qkv: Sequence[Callable[[], Linear]]
    heads: int
    scale: float | None
    in_table_dtype: bool
    out: Callable[[], Linear]
    gamma: Tensor | None  # (C,)
    norm: Norm  # norm2
    gated: bool
    first: Sequence[Callable[[], Linear]]
    last: Callable[[], Linear]


def run_in_groups(
    parts: Snapshot,
    todo: Plan,
    x: Tensor,  # (N, rows, C)
    normed: Tensor,  # (N, rows, C), its norm; written to
    layer: Layer,
    shared: bool,
) -> tuple[Tensor, Tensor] | None:  # the residual and the MLP's branch, (N, rows, C) each
    """What follows norm1, as many sequences at a time as caches hold; None where the block has to run as a whole.

    x is written to, unless it is `shared` with others.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active():
        return None
    if layer.attention not in ("auto", "sdpa") or torch.is_autocast_enabled("cpu"):
        return None
    found = parts.once("groups", lambda: _read(parts, todo))
    if found is None or (layer.backend != "cpu" and choose(layer.backend, x.device, "add_norm", layer.strict) != "cpu"):
        return None
    qkv, first = [linear() for linear in found.qkv], [linear() for linear in found.first]
    out, last = found.out(), found.last()
    if not _are_alike(x, normed, (*qkv, out, *first, last), found.gamma):
        return None
    if not _loaded:
        from .ops.block_cpu import block_in_place  # it needs the library

        _loaded.append(block_in_place)
    if shared:
        x = x.clone(memory_format=torch.contiguous_format)
    angles = None if layer.angles is None else layer.angles.halves()
    heads = found.heads, found.scale, layer.num_globals, found.in_table_dtype
    more = found.gated, first, last, _group(x, first[0][0].shape[0]), _has_onednn(x.dtype)
    return x, _loaded[0](x, normed, qkv, heads, angles, out, found.gamma, found.norm, *more)


def _read(parts: Snapshot, todo: Plan) -> _Block | None:
    """None where somebody could tell that a block runs in groups."""
    if any([getattr(todo, part) is not None for part in ("norm1", "attention", "scale1", "norm2", "mlp", "scale2")]):
        return None
    attention, mlp = parts.attention(), parts.mlp()
    if not all([is_plain(linear) for linear in (*attention.qkv, attention.output, *mlp.first, mlp.last)]):
        return None
    return _Block(
        [weight_and_bias(linear) for linear in attention.qkv],
        attention.heads,
        attention.scale,
        attention.in_table_dtype,
        weight_and_bias(attention.output),
        parts.scale(1).gamma,
        parts.known_norm(2),
        mlp.activation == "swiglu",
        [weight_and_bias(linear) for linear in mlp.first],
        weight_and_bias(mlp.last),
    )


def weight_and_bias(linear: Any) -> Callable[[], Linear]:
    """Reads those of a plain linear layer; ``LinearKMaskedBias`` of dinov3 masks its bias."""
    if hasattr(linear, "weight_and_bias"):
        return linear.weight_and_bias
    weight, bias = linear.weight, linear.bias
    if type(linear) is nn.Linear or bias is None:
        return lambda: (weight, bias)
    mask = linear.bias_mask
    return lambda: (weight, bias * mask.to(bias.dtype))


def _are_alike(
    x: Tensor,  # (N, rows, C)
    normed: Tensor,  # like x
    linears: Sequence[Linear],
    gamma: Tensor | None,  # (C,)
) -> bool:
    """Whether all are plain tensors of one dtype; a LayerScale may be of another that does not widen the sum."""
    dtype = x.dtype
    if normed.dtype != dtype or x.numel() == 0 or type(x) not in PLAIN or type(normed) not in PLAIN:
        return False
    if gamma is not None and (type(gamma) not in PLAIN or torch.promote_types(dtype, gamma.dtype) != dtype):
        return False
    tensors = [t for linear in linears for t in linear if t is not None]
    return all([t.dtype == dtype and type(t) in PLAIN for t in tensors])


def _group(
    x: Tensor,  # (N, rows, C)
    hidden: int,
) -> int:
    """How many sequences at a time, groups being of equal size."""
    at_once = max(1, GROUP_BYTES // (x.shape[1] * hidden * x.element_size()))
    return max(1, -(-len(x) // -(-len(x) // at_once)))


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's linear layers, for a dtype on this CPU."""
    if dtype not in _onednn:
        operations = torch.ops.mkldnn
        has = dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
        has = has and hasattr(operations, "_linear_pointwise")
        if dtype == torch.bfloat16:
            supported = getattr(operations, "_is_mkldnn_bf16_supported", None)
            has = has and supported is not None and supported()
        _onednn[dtype] = has
    return _onednn[dtype] and torch.backends.mkldnn.enabled
