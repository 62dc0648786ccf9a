"""On a CPU blocks run group by group of sequences, so that what passes between their layers stays in the caches.

After the change of planes a sequence needs nothing of the others: attention, residual and MLP of some of them run
before those of the next. Only the residual stream is ever held as a whole, and memory that was just used is used again.
All of it is one operation, csrc/blocks.cpp, made of those that run elsewhere too, and as many blocks as come next are
one call. Where a linear layer is more than its weight and bias, and for training, blocks run one by one and as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..hosts.description import PLAIN, BlockDescription
from ..ops import Norm
from ..runtime.repeats import most_rounds
from .stream import Layer, Own, Stream

GROUP_BYTES = 26 * 2**20  # of the widest activations of a group: fewer matrix products, or less memory
CALL = 2e11  # multiplications of a call, some seconds at most: signals have to wait for its end
Following = tuple["BlockDescription | Norm", Layer]  # a block, or the last norm; and where it stands
_onednn: dict[torch.dtype, bool] = {}
_loaded: list[Callable[..., Any]] = []  # `blocks_in_place`: an import costs time in every call


def run_in_groups(
    block: BlockDescription,
    held: list[Stream],
    layer: Layer,
    following: Iterable[Following] = (),
) -> tuple[Stream | tuple[Tensor, Tensor], int] | None:
    """This block and those of the following ones that are like it, as many sequences at a time as caches hold.

    Args:
        held: the stream that comes in; taken out.
        following: what comes after it in the same pass, which nobody watches.

    Returns: the stream that goes out, or after a last norm the tokens and their norm, (B*P, g + L, C) each; and how
        many steps that were. None where this block has to run as a whole.
    """
    choice, came = layer.choice, held[0].residual
    if choice.grad or not choice.writes or choice.add_norm != "cpu" or came.device.type != "cpu":
        return None
    if choice.attention != "sdpa" or choice.autocast is not None or choice.gelu == "tanh_epilogue":
        return None
    if (found := block.packed) is None:
        return None
    dtype = _dtype_of(*held[0])
    if dtype is None or came.numel() == 0 or (tensors := found.tensors(dtype)) is None:
        return None
    blocks, layers, last, dimensions = [tensors], [layer], None, came.numel() * came.shape[-1]
    for after, next_layer in islice(following, max(0, int(CALL / (12 * dimensions)) - 1)):
        if isinstance(after, Norm):
            last = after
            layers.append(next_layer)
            break
        if (next_layer.angles is None) != (layer.angles is None):  # one call turns in all of its blocks, or in none
            break
        more = after.packed
        if more is None or more.settings != found.settings or (tensors := more.tensors(dtype)) is None:
            break
        blocks.append(tensors)
        layers.append(next_layer)
    if not _loaded:
        from ..ops.blocks_cpu import blocks_in_place  # it needs the library

        _loaded.append(blocks_in_place)
    own = type(held[0]) is Own
    x, normed = layer.switch(held.pop(), block.norm1.known)
    if x is came and not own:
        x = x.clone(memory_format=torch.contiguous_format)
    del came
    angles = [each.angles.halves() for each in layers[: len(blocks)] if each.angles is not None]  # of all, or of none
    vias, means = [each.via for each in layers[1:]], [each.transition.mean for each in layers[1:]]
    where = [each.new.name for each in layers], layer.sizes, layer.num_globals, vias, means
    made = _loaded[0](
        x, normed, blocks, found.settings, _has_onednn(dtype), *where, last, angles, GROUP_BYTES, most_rounds()
    )
    return (Own(made[0], made[1], blocks[-1][-1]) if last is None else made), len(layers)


def _dtype_of(
    residual: Tensor,  # (N, rows, C)
    branch: Tensor | None,  # (N, rows, C)
    scale: Tensor | None,  # (C,)
) -> torch.dtype | None:
    """Of their sum; None where they are not all plain tensors."""
    dtype = residual.dtype
    for t in (residual, branch, scale):
        if t is None:
            continue
        if type(t) not in PLAIN:
            return None
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


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
    return _onednn[dtype] and torch.backends.mkldnn.enabled  # type: ignore[return-value]  # a property of a module
