"""rope: rotary position embedding of queries and keys, by tables or by the settings that angles are made from.

Start with `angles.py`: `Tables`, `Axial` and the reference. `rope.py` is public; `rope_autograd.py` is what backends
share. `rope_triton.py` makes angles within its kernel, `rope_cpu.py` takes tables. `rope_within.py` turns a packed qkv
in place although it needs a gradient, in training.
"""
