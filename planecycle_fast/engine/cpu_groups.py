"""On a CPU blocks run group by group of sequences, so that what passes between their layers stays in the caches.

After the change of planes a sequence needs nothing of the others: attention, residual and MLP of some of them run
before those of the next. Only the residual stream is ever held as a whole, and memory that was just used is used again.
All of it is one operation, csrc/blocks.cpp, made of those that run elsewhere too, and as many blocks as come next are
one call. Where a linear layer is more than its weight and bias, and for training, blocks run one by one and as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..hosts.parts import Plan, Snapshot
from ..ops.residual.norm import Norm
from ..runtime.backends import choose
from ..runtime.repeats import most_rounds
from ..runtime.tracing import may_write
from .branches import is_plain
from .stream import Layer, Own, Stream

GROUP_BYTES = 26 * 2**20  # of the widest activations of a group: fewer matrix products, or less memory
CALL = 2e11  # multiplications of a call, some seconds at most: signals have to wait for its end
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # other subclasses, quantised or sharded, have their own ways
Following = tuple["Snapshot | str | Norm", Layer]  # a block's parts, or the last norm; and where it stands
Linear = tuple[Tensor, "Tensor | None"]  # weight (out, in), bias (out,)
_onednn: dict[torch.dtype, bool] = {}
_loaded: list[Callable[..., Any]] = []  # `blocks_in_place`: an import costs time in every call


class Settings(NamedTuple):
    """What blocks have to agree in to run in one call."""

    num_qkv: int  # one packed layer, or three
    num_first: int  # one layer; gated two, or one that is twice as wide
    norms: tuple[str, str]  # "layer" or "rms", norm1 and norm2
    eps: tuple[float, float]
    heads: int
    scale: float | None  # of scores
    in_table_dtype: bool  # see `ops.rope`
    gated: bool  # SwiGLU instead of GELU


class _Block(NamedTuple):
    """What a block that runs in groups is made of."""

    settings: Settings
    linears: Sequence[Tensor | None]  # weights (out, in) and biases (out,): qkv, out, first, last
    made: Sequence[tuple[int, Callable[[], Linear]]]  # of these, by position: weight and bias that are made when needed
    vectors: Sequence[Tensor | None]  # (C,): norm1's weight and bias, gamma, norm2's weight and bias, gamma

    def tensors(self, dtype: torch.dtype) -> list[Tensor | None] | None:
        """All of them as they are now, or None where they are not of a stream's dtype.

        A LayerScale may be of another that does not widen the sum.
        """
        linears = [*self.linears]
        for position, make in self.made:
            linears[position : position + 2] = make()
        if not all([t is None or (t.dtype is dtype and type(t) in PLAIN) for t in linears]):
            return None
        for gamma in self.vectors[2::3]:
            if gamma is not None and gamma.dtype is not dtype and torch.promote_types(dtype, gamma.dtype) != dtype:
                return None
        return [*linears, *self.vectors]


def run_in_groups(
    parts: Snapshot,
    todo: Plan,
    held: list[Stream],
    layer: Layer,
    following: Iterable[Following] = (),
) -> tuple[Stream | tuple[Tensor, Tensor], int] | None:
    """This block and those of the following ones that are like it, as many sequences at a time as caches hold.

    Args:
        parts, todo: of the block.
        held: the stream that comes in; taken out.
        following: what comes after it in the same pass, which nobody watches.

    Returns: the stream that goes out, or after a last norm the tokens and their norm, (B*P, g + L, C) each; and how
        many steps that were. None where this block has to run as a whole.
    """
    if torch.is_grad_enabled() or not may_write():
        return None
    if held[0].residual.device.type != "cpu":
        return None
    if layer.attention not in ("auto", "sdpa") or torch.is_autocast_enabled("cpu"):
        return None
    found, came = parts.once("groups", lambda: _read(parts, todo)), held[0].residual
    if found is None or (
        layer.backend != "cpu" and choose(layer.backend, came.device, "add_norm", layer.strict) != "cpu"
    ):
        return None
    dtype = _dtype_of(*held[0])
    tensors = None if dtype is None or came.numel() == 0 else found.tensors(dtype)
    if tensors is None:
        return None
    blocks, layers, last, dimensions = [tensors], [layer], None, came.numel() * came.shape[-1]
    for after, next_layer in islice(following, max(0, int(CALL / (12 * dimensions)) - 1)):
        if isinstance(after, Norm):
            last = after
            layers.append(next_layer)
            break
        if (next_layer.angles is None) != (layer.angles is None):  # one call turns in all of its blocks, or in none
            break
        more = None if isinstance(after, str) else after.once("groups", lambda of=after: _read(of, of.plan()))
        if more is None or more.settings != found.settings or (tensors := more.tensors(dtype)) is None:
            break
        blocks.append(tensors)
        layers.append(next_layer)
    if not _loaded:
        from ..ops.blocks_cpu import blocks_in_place  # it needs the library

        _loaded.append(blocks_in_place)
    own = type(held[0]) is Own
    x, normed = layer.switch(held.pop(), parts.known_norm(1))
    if x is came and not own:
        x = x.clone(memory_format=torch.contiguous_format)
    del came
    angles = [] if layer.angles is None else [each.angles.halves() for each in layers[: len(blocks)]]
    vias, means = [each.via for each in layers[1:]], [each.transition.mean for each in layers[1:]]
    where = [each.new.name for each in layers], layer.sizes, layer.num_globals, vias, means
    made = _loaded[0](
        x, normed, blocks, found.settings, _has_onednn(dtype), *where, last, angles, GROUP_BYTES, most_rounds()
    )
    return (Own(*made, blocks[-1][-1]) if last is None else made), len(layers)


def _read(parts: Snapshot, todo: Plan) -> _Block | None:
    """None where somebody could tell that a block runs in groups."""
    if todo.reasons():
        return None
    attention, mlp, norms = parts.attention(), parts.mlp(), [parts.known_norm(1), parts.known_norm(2)]
    layers = (*attention.qkv, attention.output, *mlp.first, mlp.last)
    if not all([is_plain(linear) for linear in layers]):
        return None
    linears, made = [], []
    for i, linear in enumerate(layers):
        if type(linear) is nn.Linear:
            linears += [linear.weight, linear.bias]
        else:
            linears += [None, None]
            made.append((2 * i, weight_and_bias(linear)))
    vectors = [t for i, norm in enumerate(norms, 1) for t in (norm.weight, norm.bias, parts.scale(i).gamma)]
    if not all([t is None or type(t) in PLAIN for t in vectors]):
        return None
    settings = Settings(
        len(attention.qkv),
        len(mlp.first),
        tuple(["rms" if norm.rms else "layer" for norm in norms]),
        tuple([norm.eps for norm in norms]),
        attention.heads,
        attention.scale,
        attention.in_table_dtype,
        mlp.activation == "swiglu",
    )
    return _Block(settings, linears, made, vectors)


def weight_and_bias(linear: Any) -> Callable[[], Linear]:
    """Reads those of a plain linear layer; ``LinearKMaskedBias`` of dinov3 masks its bias."""
    if hasattr(linear, "weight_and_bias"):
        return linear.weight_and_bias
    weight, bias = linear.weight, linear.bias
    if type(linear) is nn.Linear or bias is None:
        return lambda: (weight, bias)
    mask = linear.bias_mask
    return lambda: (weight, bias * (mask if mask.dtype is bias.dtype else mask.to(bias.dtype)))


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
    return _onednn[dtype] and torch.backends.mkldnn.enabled
