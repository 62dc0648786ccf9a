"""What the test bed knows of each operation: one file per operation, its `SPEC` listed here."""

from .add_norm import SPEC as ADD_NORM
from .plane_switch import SPEC as PLANE_SWITCH
from .rope import SPEC as ROPE
from .self_attention import SPEC as SELF_ATTENTION
from .swiglu import SPEC as SWIGLU

SPECS = [PLANE_SWITCH, ADD_NORM, SWIGLU, ROPE, SELF_ATTENTION]
OUTPUTS = {kernel: outputs for spec in SPECS for kernel, outputs in spec.outputs.items()}  # what kernels write to
