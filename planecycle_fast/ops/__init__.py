"""Single operations, a folder each. Every `<op>` has its pure-PyTorch reference `<op>_ref`, with the same arguments.

May import `geometry` and `runtime`; `hosts` and `engine` use them, and so may anybody.

In a folder `<op>.py` is the public function, which checks its arguments and picks a backend; types and the reference
are in a file that imports no backend. `<op>_triton.py` and `<op>_cpu.py` (csrc) are imported when they are picked, and
share `<op>_autograd.py`: shapes of outputs, derivatives. Start with `activations/`, the smallest that has all of these.

| | |
| --- | --- |
| `choice.py` | which implementations a pass runs, decided once |
| `registry.py` | what an operation is to torch and the tests, and derivatives that torch.library has no place for |
| `registration.py`, `native_ops.py` | how those of Triton, and of csrc, are registered |
| `eager.py`, `launch_plans.py` | how they run where nobody watches: past torch's dispatcher, launches made once |
| `tiles.py`, `scalars_triton.py` | what kernels hold and count; the types of the numbers they are given |
| `blocks_cpu.py` | consecutive blocks in one call of csrc, made of the others |
"""

from .activations.gelu import gelu, gelu_ref
from .activations.linear_gelu import linear_gelu, linear_gelu_ref
from .activations.swiglu import swiglu, swiglu_ref
from .multihead_attention.attention import attention, attention_ref
from .multihead_attention.self_attention import self_attention, self_attention_ref
from .patch_embedding.patchify import patchify
from .patch_embedding.pixel_rows import patchify_ref
from .plane_change.plane_switch import plane_switch, plane_switch_ref
from .residual.add_norm import add_norm
from .residual.norm import Norm, add_norm_ref
from .rotary.angles import Axial, Tables, rope_ref
from .rotary.rope import rope

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
    "linear_gelu",
    "linear_gelu_ref",
    "patchify",
    "patchify_ref",
    "plane_switch",
    "plane_switch_ref",
    "rope",
    "rope_ref",
    "self_attention",
    "self_attention_ref",
    "swiglu",
    "swiglu_ref",
]
