"""The two branches of a block, attention and MLP: the host's linear layers with operations between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..geometry.rope import PlaneAngles
from ..hosts.parts import Attention, BlockParts, Plan, watched
from ..ops import Axial, Tables, attention, gelu, rope, swiglu
from ..ops.rotary.rope_within import rope_within, turns_within
from ..runtime.backends import choose
from ..runtime.tracing import may_write, recorder
from .stream import Layer


def attention_branch(
    parts: BlockParts,
    todo: Plan,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    """Self-attention within each sequence, or the host's own where it is not replaced."""
    found = parts.attention()
    if todo.attention is not None:
        return parts.call_attention(normed, layer.sincos)
    q, k, v = queries_keys_values(found, normed, layer)
    out = attention(q, k, v, found.scale, layer.attention)  # (N, rows, heads, hd)
    del q, k, v  # memory that the projection can have
    return found.output(out.flatten(2))


def queries_keys_values(
    found: Attention,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> list[Tensor]:  # (N, rows, heads, hd) each
    """By the host's linear layers; queries and keys turned, as RoPE wants it on this plane."""
    heads, g = found.heads, layer.num_globals
    projected = [linear(normed) for linear in found.qkv]
    packed = len(projected) == 1  # heads of q, k and v side by side; q and k turn together
    made = [t.unflatten(-1, (3 * heads if packed else heads, -1)) for t in projected]  # (N, rows, heads or 3*heads, hd)
    if layer.angles is not None:
        backend, own = choose(layer.backend, normed.device, "rope", layer.strict), _is_ours(found.qkv)
        angles = _angles(layer.angles, backend)
        made = _turned(made, angles, g, heads, own, found.in_table_dtype, backend)
    return [head for t in made for head in t.split(heads, dim=2)]


def _turned(
    made: Sequence[Tensor],  # (N, rows, heads, hd) each, or (N, rows, 3*heads, hd)
    angles: Tables | Axial,
    num_globals: int,
    heads: int,
    own: bool,  # nobody else holds them
    in_table_dtype: bool,
    backend: str,
) -> list[Tensor]:  # (N, rows, any, hd) each, heads of q, k and v in a row
    """Queries and keys turned, the values as they are."""
    inplace = own and not any([t.requires_grad for t in made])
    how = inplace, in_table_dtype, backend
    if len(made) > 1:
        return [*[rope(t, angles, num_globals, None, *how) for t in made[:2]], *made[2:]]
    [qkv] = made
    if not qkv.requires_grad or recorder() is not None:  # a record is the same with gradients and without
        queries_keys, values = qkv.split([2 * heads, heads], dim=2)
        return [rope(queries_keys, angles, num_globals, None, *how), values]
    if own and turns_within(backend):
        return [*rope_within(qkv, angles, num_globals, in_table_dtype, backend)]
    return [rope(qkv, angles, num_globals, 2 * heads, *how)]  # as a whole, so that its gradient comes as one


def _angles(angles: PlaneAngles, backend: str) -> Tables | Axial:
    """For kernels the settings, where they are known and kernels follow them; else tables, which blocks share."""
    if backend == "triton" and angles.rope is not None and not angles.rope.narrows:
        return Axial(angles.rope, angles.grid, angles.augmentation, angles.periods())
    return Tables(*[(half,) for half in angles.halves()])


def make_tables(layer: Layer, device: torch.device) -> None:
    """What a block may ask of RoPE, by operations or for its own attention, on rows of a device.

    Made before the block is called: blocks share tables, and what is checkpointed and computed again has to run the
    same operations both times.
    """
    if layer.angles is None:
        return
    if layer.angles.rope is None or hasattr(layer.angles.rope, "halves"):  # else only for the model's own attention
        _angles(layer.angles, choose(layer.backend, device, "rope", layer.strict))
    layer.angles.sincos()


def mlp_branch(
    parts: BlockParts,
    todo: Plan,
    normed: Tensor,  # (N, rows, C)
    layer: Layer,
) -> Tensor:  # (N, rows, C)
    """The MLP of each row, or the host's own where it is not replaced."""
    found = parts.mlp()
    if todo.mlp is not None:
        return found.module(normed)
    hidden = [linear(normed) for linear in found.first]  # (N, rows, hidden); gate and value in one twice as wide
    free = _is_ours(found.first) and not any([t.requires_grad for t in hidden])
    backend = layer.backend_for(found.activation, normed)
    if found.activation == "gelu":
        activated = gelu(hidden[0], free, backend)
    else:  # gate and value in one: in place would leave rows with gaps, which the next layer would copy
        activated = swiglu(*hidden, inplace=free and len(hidden) == 2, backend=backend)
    return found.last(activated)


def _is_ours(linears: Sequence[object]) -> bool:
    """Whether what these layers return may be written to."""
    return may_write() and all([is_plain(linear) for linear in linears])


def is_plain(linear: object) -> bool:
    """Whether nobody but us can hold what a layer returned, so that it may be written to."""
    if hasattr(linear, "fresh"):
        return linear.fresh
    return (type(linear) is nn.Linear or type(linear).__name__ == "LinearKMaskedBias") and watched(linear) is None


def autocast_dtype(module: nn.Module, linears: Sequence[object]) -> torch.dtype | None:
    """What autocast would make of a norm in each of these layers, so that it is written as that at once; or None."""
    weight = module.weight
    if weight is None or not linears or weight.dtype == torch.float64:
        return None
    device = weight.device.type
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):  # torch 2.11 cannot trace it
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if all([is_plain(linear) for linear in linears]) else None
