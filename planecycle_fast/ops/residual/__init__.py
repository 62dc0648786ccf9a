"""add_norm: the residual stream, a branch added to it, and the norm of the sum, in one pass.

The same kernels change planes on the way, for `plane_switch` in full. Start with `norm.py`, which has the reference.

`add_norm.py` is public; `add_norm_autograd.py` is what torch is told of it, and both backends' calls: `add_norm_cpu.py`
is little more than their names. `add_norm_triton.py` holds the kernel forward, `add_norm_backward_triton.py` the one
backward, and how both hold rows of channels in two pieces.
"""
