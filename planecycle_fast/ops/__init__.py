"""Single operations. Each `<op>` has its pure-PyTorch reference `<op>_ref` beside it, same signature."""

from .activations.gelu import gelu, gelu_ref
from .activations.swiglu import swiglu, swiglu_ref
from .plane_change.plane_switch import plane_switch, plane_switch_ref
from .residual.add_norm import add_norm
from .residual.norm import Norm, add_norm_ref
from .rotary.angles import Axial, Tables, rope_ref
from .rotary.rope import rope
from .self_attention.attention import attention, attention_ref

__all__ = [
    "Axial",
    "Norm",
    "Tables",
    "add_norm",
    "add_norm_ref",
    "attention",
    "attention_ref",
    "gelu",
    "gelu_ref",
    "plane_switch",
    "plane_switch_ref",
    "rope",
    "rope_ref",
    "swiglu",
    "swiglu_ref",
]
