"""Blocks of Hugging Face transformers (version 5), taken apart: DINOv2 and v3, ViT (MAE, I-JEPA), CLIP and SigLIP.

Names and contents of parts have changed since transformers 5.0. Within these models contents say what a part is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .adapter import SinCos
from .known import Contents, comes_from, consists_of, contents, kind_of, known_activation
from .parts import Attention, BlockParts, Mlp, Part, Scale

FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_mae", "ijepa", "clip", "siglip")
_OWN = tuple(f"transformers.models.{family}." for family in FAMILIES)
_SCALE = contents("lambda1")
_ATTENTION = [(last, contents(f"q_proj k_proj v_proj {last}")) for last in ("o_proj", "out_proj")]
_NESTED = contents("attention output"), contents("query key value"), contents("dense dropout")  # 5.0 to 5.17
_ACTIVATIONS = ("act_fn", "activation_fn", "activation")
_GATED = contents("gate_proj up_proj down_proj", " ".join(_ACTIVATIONS))
_PLAIN = [(first, last, contents(f"{first} {last}", " ".join(_ACTIVATIONS)))
          for first, last in (("up_proj", "down_proj"), ("fc1", "fc2"))]  # fmt: skip
_PACKED = contents("weights_in weights_out")  # gate and value in one, SiLU as a function
_SPLIT = contents("dense intermediate_act_fn"), contents("dense dropout")  # ViT's MLP in 5.0, in two modules
_DROPS = ("dropout", "attention_dropout", "dropout_prob")  # of attention's weights


def made_of(module: nn.Module, known: Contents) -> bool:
    """Whether a module is one of these models' own, and consists of just this."""
    return comes_from(module, _OWN) and consists_of(module, known)


class HuggingFaceBlock(BlockParts):
    """What all of these blocks have in common; subclasses say what parts are called, and what scales a branch."""

    names = ("norm1", "attention", "norm2")

    def norm(self, number: int) -> nn.Module:
        return getattr(self.block, self.names[0 if number == 1 else 2])

    def _attends(self) -> nn.Module:
        return getattr(self.block, self.names[1])

    def _within(self) -> nn.Module:
        """The module that attends: it was inside another, beside the projection, up to transformers 5.17."""
        return getattr(self._attends(), "attention", self._attends())

    def call_attention(self, normed: Tensor, sincos: SinCos | None) -> Tensor:
        settings = {} if sincos is None else {"position_embeddings": sincos[::-1]}
        out = self._attends()(normed, **settings)
        return out[0] if isinstance(out, tuple) else out

    def attention(self) -> Attention:
        found, within = self._attends(), self._within()
        last = next((last for last, known in _ATTENTION if made_of(found, known)), None)
        if last is not None:
            qkv, output, part = (found.q_proj, found.k_proj, found.v_proj), getattr(found, last), Part([found])
        elif made_of(found, _NESTED[0]) and made_of(within, _NESTED[1]) and made_of(found.output, _NESTED[2]):
            qkv, output = (within.query, within.key, within.value), found.output.dense
            part = Part([found, within, found.output], [found.output.dropout])
        else:
            return Attention(found, Part(unknown=f"{kind_of(found)} is of an unknown kind"))
        drop = next((p for p in (getattr(within, name, None) for name in _DROPS) if p is not None), 0)
        if (chosen := within.config._attn_implementation) != "sdpa":
            part = Part(unknown=f"the model's attention is {chosen!r}; only 'sdpa' is replaced")
        elif getattr(within, "is_causal", False):
            part = Part(unknown="it is causal")
        elif within.training and drop:
            part = Part(unknown=f"it drops {drop:g} of its weights in training")
        heads = getattr(within, "num_heads", None) or within.num_attention_heads
        scale = within.scaling if hasattr(within, "scaling") else within.scale
        return Attention(found, part, qkv, heads, scale=scale, output=output)

    def mlp(self) -> Mlp:
        found = self.block.mlp
        if made_of(found, _PACKED):
            return Mlp(found, Part([found]), "swiglu", (found.weights_in,), found.weights_out)
        act = next((m for m in (getattr(found, name, None) for name in _ACTIVATIONS) if m is not None), None)
        if act is not None and made_of(found, _GATED) and known_activation(act, "silu"):
            return Mlp(found, Part([found, act]), "swiglu", (found.gate_proj, found.up_proj), found.down_proj)
        for first, last, known in _PLAIN:
            if act is not None and made_of(found, known) and known_activation(act, "gelu"):
                return Mlp(found, Part([found, act]), "gelu", (getattr(found, first),), getattr(found, last))
        with_act = "" if act is None else f" with {kind_of(act)}"
        return Mlp(found, Part(unknown=f"{kind_of(found)}{with_act} is of an unknown kind"))

    def settings(self) -> Sequence[Any]:
        return (getattr(getattr(self._within(), "config", None), "_attn_implementation", None),)

    def scale(self, number: int) -> Scale:
        return Scale(None, Part())


class DinoBlock(HuggingFaceBlock):
    """`DINOv3ViTLayer` and the layers of both DINOv2s."""

    known = contents("norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2")

    def scale(self, number: int) -> Scale:
        found, drop = getattr(self.block, f"layer_scale{number}"), self.block.drop_path
        unknown = None if made_of(found, _SCALE) else f"{kind_of(found)} is of an unknown kind"
        return Scale(getattr(found, "lambda1", None), Part([found], [drop], unknown), (found, drop))


class ClipBlock(HuggingFaceBlock):
    """`CLIPEncoderLayer`, `SiglipEncoderLayer`: nothing scales or drops a branch."""

    known = contents("layer_norm1 self_attn layer_norm2 mlp")
    names = ("layer_norm1", "self_attn", "layer_norm2")


class ViTBlock(HuggingFaceBlock):
    """`ViTLayer`, `ViTMAELayer`, `IJepaLayer`: dropout on both branches, from one module."""

    known = contents("layernorm_before attention layernorm_after mlp dropout")
    names = ("layernorm_before", "attention", "layernorm_after")

    def scale(self, number: int) -> Scale:
        return Scale(None, Part([], [self.block.dropout]), (self.block.dropout,))


class FirstViTBlock(HuggingFaceBlock):
    """The same as of transformers 5.0: dropout within attention, and an MLP of two modules, of which one also adds.

    So the MLP has no module of its own that could run in its place: then the block runs as a whole.
    """

    known = contents("layernorm_before attention layernorm_after intermediate output")
    names = ViTBlock.names

    def why_not(self) -> str | None:
        return super().why_not() or self.mlp().part.why_not()

    def mlp(self) -> Mlp:
        first, last = self.block.intermediate, self.block.output
        known = made_of(first, _SPLIT[0]) and made_of(last, _SPLIT[1])
        if not known or not known_activation(first.intermediate_act_fn, "gelu"):
            act = getattr(first, "intermediate_act_fn", None)
            with_act = "" if act is None else f" with {kind_of(act)}"
            return Mlp(last, Part(unknown=f"{kind_of(first)}{with_act} is of an unknown kind"))
        part = Part([first, first.intermediate_act_fn, last], [last.dropout])
        return Mlp(last, part, "gelu", (first.dense,), last.dense)


BLOCKS = (DinoBlock, ClipBlock, ViTBlock, FirstViTBlock)


def block_parts(block: nn.Module) -> BlockParts | str:
    """A block of these models taken apart, or why it cannot be."""
    kind = next((kind for kind in BLOCKS if made_of(block, kind.known)), None)
    return f"{kind_of(block)} is of an unknown kind" if kind is None else kind(block)
