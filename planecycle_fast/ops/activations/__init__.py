"""What stands between the linear layers of an MLP: gelu, which is torch's own everywhere, and swiglu.

Start with `swiglu.py`: reference and public function. `swiglu_autograd.py` is what its backends share,
`swiglu_triton.py` and `swiglu_cpu.py` are these.
"""
