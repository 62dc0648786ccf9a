"""PlaneCycle, written down as plainly as possible. Shares no code with the package.

Follows the authors' operator step by step: movedim, reshape, cat, adaptive_avg_pool1d, layer, split,
movedim back. `blocks` are functions (tokens (N, g + L, C), sincos) -> tokens; `make_rope(plane, sizes)`
gives their sine and cosine.
"""

import math

import torch
import torch.nn.functional as F

BATCH_AXIS = {"HW": 1, "DW": 2, "DH": 3}  # of (B, D, H, W, C)
ROPE_AXES = {"HW": (1, 2), "DW": (0, 2), "DH": (0, 1), "DHW": (0, 1, 2)}  # of (D, H, W)


def pool(g, size):
    """(B, n, g, C) to (B, size, g, C), by torch's adaptive average pooling."""
    batch, _, count, channels = g.shape
    if count == 0:
        return g.new_empty(batch, size, count, channels)
    rows = g.permute(0, 2, 3, 1).reshape(batch, count * channels, -1)
    return F.adaptive_avg_pool1d(rows, size).reshape(batch, count, channels, size).permute(0, 3, 1, 2)


def mean(g, size):
    return g.mean(1, keepdim=True).expand(-1, size, -1, -1)


def one_layer(x, g, layer, plane, pool_method):
    """x (B, D, H, W, C), g (B, S, g, C) -> x, and globals of every slice of the plane."""
    batch, *_, channels = x.shape
    if plane == "DHW":
        slices, moved = 1, x.unsqueeze(1)
    else:
        slices, moved = x.shape[BATCH_AXIS[plane]], x.movedim(BATCH_AXIS[plane], 1)
    g = (pool if pool_method == "PCg" else mean)(g, slices)
    count = g.shape[2]
    tokens = torch.cat([g.reshape(batch * slices, count, channels), moved.reshape(batch * slices, -1, channels)], 1)
    tokens = layer(tokens)
    patches = tokens[:, count:].reshape(moved.shape)
    patches = patches.squeeze(1) if plane == "DHW" else patches.movedim(1, BATCH_AXIS[plane])
    return patches, tokens[:, :count].reshape(batch, slices, count, channels)


def run(tokens, sizes, num_globals, blocks, planes, pool_method, globals_at, make_rope):
    """All layers. tokens: (B*D, g + H*W, C) of the embedded slices. Yields (x, globals) after each layer.

    Globals are per slice of D under "depth", per slice of the layer's plane under "plane".
    """
    depth, height, width = sizes
    batch, channels = len(tokens) // depth, tokens.shape[-1]
    g = tokens[:, :num_globals].reshape(batch, depth, num_globals, channels)
    x = tokens[:, num_globals:].reshape(batch, depth, height, width, channels)
    for i, block in enumerate(blocks):
        plane = planes[i % len(planes)]
        sincos = make_rope(plane, sizes)
        x, g = one_layer(x, g, lambda t, block=block, sincos=sincos: block(t, sincos), plane, pool_method)
        if globals_at == "depth":
            g = pool(g, depth)
        yield x, g


def settings_of_mode(mode, planes, pool_method, globals_at):
    """The other modes, from their definition: never pool, and one set of globals per volume."""
    if mode == "slice2d":
        return ["HW"], "PCg", "depth"
    if mode == "flatten3d":
        return ["DHW"], "PCm", "plane"
    return planes, pool_method, globals_at


def make_rope(head_dim, normalize, base=100.0, dtype=torch.float64):
    """make_rope(plane, sizes) -> sin, cos (L, hd), token by token from the formula."""

    def rope(plane, sizes):
        axes = ROPE_AXES[plane]
        grid = [sizes[a] for a in axes]
        sections = [head_dim // 4] * 2 if len(axes) == 2 else [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
        rows = []
        for position in torch.cartesian_prod(*[torch.arange(n) for n in grid]).tolist():
            angles = []
            for i, n, section in zip(position, grid, sections):
                by = {"separate": n, "min": min(grid), "max": max(grid)}[normalize]
                coordinate = 2 * (i + 0.5) / by - 1
                angles += [2 * math.pi * coordinate / base ** (j / section) for j in range(section)]
            rows.append(angles + angles)
        table = torch.tensor(rows, dtype=dtype)
        return table.sin(), table.cos()

    return rope
