"""Single operations. Each `<op>` has its pure-PyTorch reference `<op>_ref` beside it, same signature."""

from .add_norm import Norm, add_norm, add_norm_ref
from .attention import attention, attention_ref
from .gelu import gelu, gelu_ref
from .plane_switch import plane_switch, plane_switch_ref
from .rope import Axial, Tables, rope, rope_ref
from .swiglu import swiglu, swiglu_ref

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
