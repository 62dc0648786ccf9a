"""What stands between the linear layers of an MLP: gelu, which is torch's own everywhere, and swiglu.

linear_gelu is gelu in the epilogue of the layer before it: `linear_gelu.py` says when, `linear_gelu_table.py` where it
is faster, and in which tiles. Of swiglu start with `swiglu.py`, reference and public function: `swiglu_autograd.py` is
what its backends share, `swiglu_triton.py` and `swiglu_cpu.py` are these.
"""
