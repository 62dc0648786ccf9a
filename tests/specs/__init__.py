"""What the test bed knows of each operation: one file per operation, its `SPEC` listed here."""

from .add_norm import SPEC as ADD_NORM
from .linear_gelu import SPEC as LINEAR_GELU
from .patchify import SPEC as PATCHIFY
from .plane_switch import SPEC as PLANE_SWITCH
from .rope import SPEC as ROPE
from .self_attention import SPEC as SELF_ATTENTION
from .swiglu import SPEC as SWIGLU

SPECS = [PLANE_SWITCH, ADD_NORM, SWIGLU, ROPE, LINEAR_GELU, PATCHIFY, SELF_ATTENTION]
OUTPUTS = {kernel: outputs for spec in SPECS for kernel, outputs in spec.outputs.items()}  # what kernels write to
COMPILED = {kernel for spec in SPECS if not spec.opaque for kernel in spec.outputs}  # that torch.compile sees
