"""plane_switch: rows from one plane's order to another's, globals through M; in full a sum before and a norm after.

Start with `plane_switch_ref`. Kernels of this folder only move rows; in full it runs those of `residual`, which take
the weights of M from here.

`plane_switch_shapes.py` knows where rows are before and after, without data, for both operations and every backend.
"""
