"""Where each token lies on each plane: sizes, orders and angles. No layer and no kernel is here.

A volume of D x H x W tokens is cut into the slices of a plane, HW, DW or DH, or is one sequence, DHW. Patches change
places between planes; globals (class and register tokens) are pooled, as each slice has its own; RoPE turns by the
axes of the plane.

May import `runtime`; whatever computes imports it.

Start with `planes.Plane`: the names of its axes are all that the rest follows from.

| | |
| --- | --- |
| `planes.py` | `Plane`, cycles of planes, and which old row a new row is (`row_map`) |
| `pooling.py` | `Transition`, the matrix M that takes globals from the slices of one plane to those of the next |
| `rope.py` | `Rope`, a host's settings, and the angles of any plane from them, to the bit of the host's |
"""
