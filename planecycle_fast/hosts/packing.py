"""A block as csrc/blocks.cpp takes it: weights, biases and vectors in a row, and what blocks of a call agree in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from .description import BlockDescription

PLAIN = (Tensor, nn.Parameter, FakeTensor)  # other subclasses, quantised or sharded, have their own ways
WeightAndBias = tuple[Tensor, "Tensor | None"]  # (out, in), (out,)


class PackedSettings(NamedTuple):
    """What blocks have to agree in to run in one call."""

    num_qkv: int  # one packed layer, or three
    num_first: int  # one layer; gated two, or one that is twice as wide
    norms: tuple[str, str]  # "layer" or "rms", norm1 and norm2
    eps: tuple[float, float]
    heads: int
    scale: float | None  # of scores
    in_table_dtype: bool  # see `ops.rope`
    gated: bool  # SwiGLU instead of GELU


class Packed(NamedTuple):
    """What a block that runs in groups is made of."""

    settings: PackedSettings
    linears: Sequence[Tensor | None]  # weights (out, in) and biases (out,): qkv, out, first, last
    made: Sequence[tuple[int, Callable[[], WeightAndBias]]]  # of these, by position: those that are made when needed
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


def pack(block: BlockDescription) -> Packed | None:
    """None where a part is left to the host or unknown to csrc, or a linear layer is more than its weight and bias."""
    attention, mlp = block.attention, block.mlp
    if block.kept or attention.qk_norm or not (block.plain_qkv and block.plain_first and block.plain_last):
        return None
    linears, made = [], []
    for i, linear in enumerate((*attention.qkv, attention.output, *mlp.first, mlp.last)):
        if type(linear) is nn.Linear:
            linears += [linear.weight, linear.bias]
        else:
            linears += [None, None]
            made.append((2 * i, weight_and_bias(linear)))
    norms = [block.norm1.known, block.norm2.known]
    vectors = [
        t for norm, scale in zip(norms, (block.scale1, block.scale2)) for t in (norm.weight, norm.bias, scale.gamma)
    ]
    if not all([t is None or type(t) in PLAIN for t in vectors]):
        return None
    settings = PackedSettings(
        len(attention.qkv),
        len(mlp.first),
        tuple(["rms" if norm.rms else "layer" for norm in norms]),
        tuple([norm.eps for norm in norms]),
        attention.heads,
        attention.scale,
        attention.in_table_dtype,
        mlp.activation == "swiglu",
    )
    return Packed(settings, linears, made, vectors)


def weight_and_bias(linear: Any) -> Callable[[], WeightAndBias]:
    """Reads those of a plain linear layer; ``LinearKMaskedBias`` of dinov3 masks its bias."""
    if hasattr(linear, "weight_and_bias"):
        return linear.weight_and_bias
    weight, bias = linear.weight, linear.bias
    if type(linear) is nn.Linear or bias is None:
        return lambda: (weight, bias)
    mask = linear.bias_mask
    return lambda: (weight, bias * (mask if mask.dtype is bias.dtype else mask.to(bias.dtype)))
