"""The two branches of a block, attention and MLP: the host's linear layers with operations between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry.rope import PlaneAngles
from ..hosts.description import PLAIN, BlockDescription, WeightAndBias, weight_and_bias
from ..ops import Axial, Tables, attention
from ..ops.activations.gelu import gelu_ref, gelu_tanh
from ..ops.activations.linear_gelu import linear_gelu_on, linear_gelu_tanh, pays
from ..ops.activations.swiglu import check_swiglu, swiglu_on
from ..ops.choice import Choice
from ..ops.multihead_attention.attention import attention_on, check_takes
from ..ops.multihead_attention.self_attention import check_self_attention, self_attention_on
from ..ops.multihead_attention.self_attention_load import turned_on_load
from ..ops.rotary.rope import check_rope, rope_on
from ..ops.rotary.rope_within import rope_within
from ..runtime.attentions import AttentionCall, lie_as_kernels_want
from ..runtime.tracing import recorder
from .stream import Layer


def attention_branch(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    """Self-attention within each sequence, or the host's own where it is not replaced."""
    if "attention" in block.kept:
        return block.parts.call_attention(normed, layer.sincos)
    return block.attention.output(attended(_projected(block, normed), block, layer).flatten(2))


def attended(
    made: list[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd), just made
    block: BlockDescription,
    layer: Layer,
) -> Tensor:  # (N, rows, heads, hd)
    """Queries and keys turned, and attention."""
    found, chosen = block.attention, layer.choice.attention
    named = chosen != "auto"
    if chosen == "triton" and layer.choice.autocast is not None:  # norms of queries and keys may have made float32
        made = [t if t.dtype == torch.float64 else t.to(layer.choice.autocast) for t in made]
    if not named:
        call = AttentionCall.of_parts(made, found.heads, found.scale)
        chosen = layer.choice.attention_for(call, _plain(block, made)).attention
    elif chosen == "triton":
        check_takes(chosen, *_split(made, found.heads), found.scale)
    if chosen == "triton":
        return _by_own_kernels(made, block, layer)
    if named and chosen not in ("sdpa", "reference"):  # which may not take these tensors
        return attention(*_split(_turned(made, block, layer), found.heads), found.scale, chosen)
    return attention_on(chosen, *_split(_turned(made, block, layer), found.heads), found.scale)


def _plain(
    block: BlockDescription,
    made: Sequence[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
) -> bool:
    """Whether they lie as every kernel wants them; strides may be symbols where a compiler looks."""
    if block.plain_qkv and not block.attention.qk_norm:
        return True
    if torch.compiler.is_compiling() or any([t.dtype != made[0].dtype for t in made]):
        return False
    return lie_as_kernels_want(*made)


def queries_keys_values(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, rows, heads, hd) each
    """By the host's linear layers; queries and keys turned, as RoPE wants it on this plane."""
    return _split(_turned(_projected(block, normed), block, layer), block.attention.heads)


def _projected(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
) -> list[Tensor]:  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
    """By the host's linear layers, and its norms of queries and keys."""
    found = block.attention
    made = in_heads([linear(normed) for linear in found.qkv], found.heads)
    if found.qk_norm:
        q, k, v = _split(made, found.heads)
        made = [found.qk_norm[0](q), found.qk_norm[1](k), v]
    return made


def in_heads(
    projected: Sequence[Tensor],  # q, k and v (N, rows, C), or packed (N, rows, 3*C)
    heads: int,
) -> list[Tensor]:  # (N, rows, heads, hd), or packed (N, rows, 3*heads, hd): heads of q, k and v side by side
    heads = 3 * heads if len(projected) == 1 else heads
    return [t.unflatten(-1, (heads, -1)) for t in projected]


def _split(
    made: Sequence[Tensor],  # (N, rows, any, hd) each, heads of q, k and v in a row
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # q, k and v (N, rows, heads, hd)
    q, k, v = [part for t in made for part in t.split(heads, dim=2)]
    return q, k, v


def _by_own_kernels(
    made: list[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
    block: BlockDescription,
    layer: Layer,
) -> Tensor:  # (N, rows, heads, hd)
    """Attention that turns queries and keys itself as far as that is faster; the others have turned before."""
    found, choice, known, g = block.attention, layer.choice, layer.angles, layer.num_globals
    tables: Any = None if known is None else known.by_axis()
    if not block.plain_qkv:  # others may return anything
        check_self_attention(*_three(made), tables, g)
    backward = choice.grad and any([t.requires_grad for t in made])
    load = "" if known is None else turned_on_load(made[0].shape[1], made[0].shape[3], made[0].dtype, backward)
    settings = g, found.scale, found.in_table_dtype
    if known is not None and load != "qk":
        angles = _angles(known, choice.rope)
        if load == "" and len(made) == 1 and backward and choice.writes and block.plain_qkv:
            from ..ops.multihead_attention.self_attention_within import self_attention_within

            scale = made[0].shape[3] ** -0.5 if found.scale is None else found.scale
            return self_attention_within(made[0], angles, tables, g, scale, found.in_table_dtype)
        if load == "":
            made = _turned(made, block, layer)
            made = made if len(made) == 1 else [*_split(made, found.heads)]
        else:  # keys turn where they are, if nobody else has them
            q, k, v = _split(made, found.heads)
            inplace = choice.may_overwrite(k, block.plain_qkv)
            made = [q, rope_on(choice.rope, k, angles, g, None, inplace, found.in_table_dtype), v]
    return self_attention_on("triton", *_three(made), tables, *settings, load)


def _three(
    made: Sequence[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k and v, as operations take them: k and v are None where all are in one."""
    return (made[0], None, None) if len(made) == 1 else (made[0], made[1], made[2])


def _turned(
    made: list[Tensor],  # q, k and v (N, rows, heads, hd), or packed (N, rows, 3*heads, hd)
    block: BlockDescription,
    layer: Layer,
) -> list[Tensor]:  # (N, rows, any, hd) each, heads of q, k and v in a row
    """Queries and keys turned, the values as they are."""
    if layer.angles is None:
        return made
    choice, heads, g = layer.choice, block.attention.heads, layer.num_globals
    chosen, in_table_dtype, angles = choice.rope, block.attention.in_table_dtype, _angles(layer.angles, choice.rope)
    inplace = all([choice.may_overwrite(t, block.plain_qkv) for t in made])
    how = inplace, in_table_dtype
    if not block.plain_qkv:  # others may return anything
        for t in made[:2]:
            check_rope(t, angles, g)
    if len(made) > 1:
        return [*[rope_on(chosen, t, angles, g, None, *how) for t in made[:2]], *made[2:]]
    [qkv] = made
    if not qkv.requires_grad or recorder() is not None:  # a record is the same with gradients and without
        queries_keys, values = qkv.split([2 * heads, heads], dim=2)
        return [rope_on(chosen, queries_keys, angles, g, None, *how), values]
    if choice.writes and block.plain_qkv and chosen != "reference":
        return [*rope_within(qkv, angles, g, in_table_dtype, chosen)]
    return [rope_on(chosen, qkv, angles, g, 2 * heads, *how)]  # as a whole, so that its gradient comes as one


def _angles(angles: PlaneAngles, backend: str) -> Tables | Axial:
    """For kernels the settings, where they are known and kernels follow them; else tables, which blocks share."""
    if backend == "triton" and angles.rope is not None and not angles.rope.narrows:
        return Axial(angles.rope, angles.grid, angles.augmentation, angles.periods())
    return Tables(*[(half,) for half in angles.halves()])


def make_tables(layer: Layer) -> None:
    """What a block may ask of RoPE, by operations or for its own attention.

    Made before the block is called: blocks share tables, and what is checkpointed and computed again has to run the
    same operations both times.
    """
    if layer.angles is None:
        return
    if layer.angles.rope is None or hasattr(layer.angles.rope, "halves"):  # else only for the model's own attention
        _angles(layer.angles, layer.choice.rope)
    layer.angles.sincos()
    if layer.choice.rope == "triton":
        layer.angles.by_axis()


def mlp_branch(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    """The MLP of each row, or the host's own where it is not replaced."""
    found, choice = block.mlp, layer.choice
    if "mlp" in block.kept:
        return found.module(normed)
    if found.activation == "gelu" and (activated := _in_epilogue(block, normed, choice)) is not None:
        return found.last(activated)
    hidden = [linear(normed) for linear in found.first]  # (N, rows, hidden); gate and value in one twice as wide
    inplace = all([choice.may_overwrite(t, block.plain_first) for t in hidden])
    if found.activation == "gelu":
        activate = gelu_tanh if choice.gelu == "tanh_epilogue" else gelu_ref
        return found.last(activate(hidden[0], inplace))
    # Gate and value in one: in place would leave rows with gaps, which the next layer would copy.
    gate, value = hidden if len(hidden) == 2 else (hidden[0], None)
    if not block.plain_first:  # others may return anything
        check_swiglu(gate, value)
    return found.last(swiglu_on(choice.swiglu, gate, value, inplace and value is not None))


def _in_epilogue(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
    choice: Choice,
) -> Tensor | None:  # (N, rows, hidden)
    """fc1 with its GELU, or None where they run one after the other."""
    # Training keeps what goes into GELU; autocast would cast weights, and keeps them; a compiler fuses GELU by itself.
    if choice.gelu == "exact" or choice.grad or not choice.writes or choice.autocast is not None:
        return None
    found = plain_weights(block)
    if found is None or type(normed) not in PLAIN or found[0].dtype is not normed.dtype:
        return None
    if choice.gelu == "tanh_epilogue":
        return linear_gelu_tanh(normed, *found)
    return linear_gelu_on(normed, *found) if pays(normed, *found) else None


def plain_weights(block: BlockDescription) -> WeightAndBias | None:
    """Of fc1, where that is its weight and bias and nothing more."""
    if not block.plain_first:
        return None
    weight, bias = weight_and_bias(block.mlp.first[0])()
    return (weight, bias) if type(weight) in PLAIN and (bias is None or type(bias) in PLAIN) else None
