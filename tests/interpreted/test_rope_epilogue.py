"""The candidate with RoPE in the epilogue of qkv computes a linear layer, then rope, rounded once less."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.rope_epilogue_triton import TILES, linear_rope
from planecycle_fast.ops import rope_ref

from ..specs.rope import tables

BF16, FP16 = torch.bfloat16, torch.float16


def layer(grid, g, channels, dtype, sequences, bias=True):
    torch.manual_seed(0)
    rows = g + torch.Size(grid).numel()
    x, weight = torch.randn(sequences, rows, channels), torch.randn(3 * channels, channels) * channels**-0.5
    return [t.to(dtype) for t in (x, weight)] + [torch.randn(3 * channels).to(dtype) if bias else None]


@pytest.mark.parametrize(
    "grid, g, channels, heads, dtype, sequences, columns",
    [
        ((4, 4), 5, 128, 2, BF16, 7, None),  # more rows than a tile, sequences across its end
        ((2, 3, 5), 1, 256, 2, FP16, 1, None),  # heads of 128 take narrow tiles, three axes
        ((7,), 0, 256, 8, BF16, 2, None),  # wide tiles, heads of 32, one table
        ((4, 4), 5, 256, 4, BF16, 1, 128),
    ],
)
def test_it_is_a_linear_layer_and_rope(grid, g, channels, heads, dtype, sequences, columns):
    x, weight, bias = layer(grid, g, channels, dtype, sequences, bias=sequences != 2)
    angles = tables(grid, channels // heads)
    got = linear_rope(x, weight, bias, angles, g, heads, TILES.get(columns))

    def turned(qkv):
        return rope_ref(qkv.unflatten(2, (3 * heads, -1)), angles, g, 2 * heads).double()

    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact, eps = turned(F.linear(*wide)), torch.finfo(dtype).eps
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got - exact).abs() <= eps / 2 * exact.abs() + 1e-5).all()  # one rounding
    separate = turned(F.linear(x, weight, bias))
    size = exact.unflatten(3, (2, -1)).norm(dim=3, keepdim=True).expand(-1, -1, -1, 2, -1).reshape(exact.shape)
    assert ((got - separate).abs() <= eps * 2 * size + 1e-5).all()  # before it turns, and after it


def test_globals_stay_as_they_are_infinities_too():
    x, weight, _ = layer((3,), 2, 128, BF16, 1, bias=False)
    bias = torch.zeros(3 * 128, dtype=BF16)
    bias[0] = torch.inf
    got = linear_rope(x, weight, bias, tables((3,), 64), 2, 2)
    assert (got[0, :2, 0, 0] == torch.inf).all() and got[0, :2].isnan().sum() == 0


def test_what_it_does_not_take():
    x, weight, bias = layer((3,), 2, 128, BF16, 1)
    for wrong, heads in ((x.float(), 2), (x, 8), (x[..., :96], 3)):
        with pytest.raises(ValueError, match="x must be of 16 bits, with heads of 32, 64 or 128 channels"):
            linear_rope(wrong, weight, bias, tables((3,), 64), 2, heads)
    with pytest.raises(ValueError, match="at most 2\\*\\*30 rows"):
        linear_rope(x[:, :1].expand(2**20, 2**11, -1), weight, bias, tables((3,), 64), 2, 2)
