"""The two branches of a block, attention and MLP: the host's linear layers with operations between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..geometry.rope import PlaneAngles
from ..hosts.description import PLAIN, BlockDescription, WeightAndBias, weight_and_bias
from ..ops import Axial, Tables, attention
from ..ops.activations.gelu import gelu_ref, gelu_tanh
from ..ops.activations.linear_gelu import linear_gelu_on, linear_gelu_tanh, pays
from ..ops.activations.swiglu import check_swiglu, swiglu_on
from ..ops.choice import Choice
from ..ops.rotary.rope import check_rope, rope_on
from ..ops.rotary.rope_within import rope_within
from ..ops.self_attention.attention import attention_on
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
    q, k, v = queries_keys_values(block, normed, layer)
    found, chosen = block.attention, layer.choice.attention
    if chosen in ("sdpa", "reference"):
        out = attention_on(chosen, q, k, v, found.scale)  # (N, rows, heads, hd)
    else:
        out = attention(q, k, v, found.scale, chosen)  # which may not take these tensors
    del q, k, v  # memory that the projection can have
    return found.output(out.flatten(2))


def queries_keys_values(
    block: BlockDescription,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> list[Tensor]:  # (N, rows, heads, hd) each
    """By the host's linear layers; queries and keys turned, as RoPE wants it on this plane."""
    found = block.attention
    projected = [linear(normed) for linear in found.qkv]
    packed = len(projected) == 1  # heads of q, k and v side by side; q and k turn together
    heads = 3 * found.heads if packed else found.heads
    made = [t.unflatten(-1, (heads, -1)) for t in projected]  # (N, rows, heads or 3*heads, hd)
    if found.qk_norm:
        q, k, v = [head for t in made for head in t.split(found.heads, dim=2)]
        made = [found.qk_norm[0](q), found.qk_norm[1](k), v]
    if layer.angles is not None:
        made = _turned(made, block, layer, layer.angles)
    return [head for t in made for head in t.split(found.heads, dim=2)]


def _turned(
    made: Sequence[Tensor],  # (N, rows, heads, hd) each, or (N, rows, 3*heads, hd)
    block: BlockDescription,
    layer: Layer,
    known: PlaneAngles,  # the layer's
) -> list[Tensor]:  # (N, rows, any, hd) each, heads of q, k and v in a row
    """Queries and keys turned, the values as they are."""
    choice, heads, g = layer.choice, block.attention.heads, layer.num_globals
    chosen, in_table_dtype, angles = choice.rope, block.attention.in_table_dtype, _angles(known, choice.rope)
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
