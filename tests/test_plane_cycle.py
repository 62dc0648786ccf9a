"""`plane_cycle`: the operator around any layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import planecycle_fast as pcf

from . import naive
from .toy import ToyBlock, ToyViT

SHAPE = (2, 3, 4, 5)  # B, D, H, W


def features(channels=32, dtype=torch.float64):
    return torch.randn(*SHAPE, channels, dtype=dtype)


def block():
    return ToyViT(depth=1).double().blocks[0]


@given(
    plane=st.sampled_from(["HW", "DW", "DH", "DHW"]),
    pool_method=st.sampled_from(["PCg", "PCm"]),
    globals_at=st.sampled_from(["plane", "depth"]),
    slices=st.integers(1, 7),
    g=st.sampled_from([0, 1, 5]),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
)
def test_equals_algorithm_1(plane, pool_method, globals_at, slices, g, sizes):
    torch.manual_seed(0)
    layer = block()
    x, tokens = torch.randn(2, *sizes, 32, dtype=torch.float64), torch.randn(2, slices, g, 32, dtype=torch.float64)
    got_x, got_g = pcf.plane_cycle(x, tokens, lambda t, grid: layer(t), plane, pool_method, globals_at)
    want_x, want_g = naive.one_layer(x, tokens, layer, plane, pool_method)
    if globals_at == "depth":
        want_g = naive.pool(want_g, sizes[0])
    torch.testing.assert_close(got_x, want_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_g, want_g, rtol=1e-12, atol=1e-12)


def test_without_globals_and_defaults():
    x, layer = features(), block()
    got, g = pcf.plane_cycle(x, None, lambda t, grid: layer(t), "DW")
    want, _ = naive.one_layer(x, x.new_empty(2, 3, 0, 32), layer, "DW", "PCg")
    assert g is None
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plane, grid", [("HW", (4, 5)), ("DW", (3, 5)), ("DH", (3, 4)), ("DHW", (3, 4, 5))])
def test_the_layer_is_told_the_plane(plane, grid):
    seen = []
    pcf.plane_cycle(features(), None, lambda t, n: seen.append((t.shape, n)) or t, plane)
    length = torch.Size(grid).numel()
    assert seen == [(torch.Size([120 // length, length, 32]), grid)]


@pytest.mark.parametrize("plane", ["HW", "DW", "DH"])
def test_maps_run_a_cnn_layer_along_a_plane(plane):
    x, layer = features(6), nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()).double()
    got, _ = pcf.plane_cycle(x, None, lambda t, grid: layer(t), plane, layout="maps")
    axis = naive.BATCH_AXIS[plane]
    per_slice = [layer(s.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for s in x.unbind(axis)]
    torch.testing.assert_close(got, torch.stack(per_slice, axis), rtol=1e-12, atol=1e-12)
    assert got.shape == (*SHAPE, 8)


def test_gradients():
    layer = ToyBlock(4, 1).double()
    x = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    assert torch.autograd.gradcheck(
        lambda x, g: pcf.plane_cycle(x, g, lambda t, n: layer(t), "DW", "PCg", "depth"), (x, g)
    )


def keep(t, grid):
    return t


BAD = [
    (dict(x=torch.zeros(2, 3, 4, 5)), ValueError, r"x must have shape \(B, D, H, W, C\), .*, got \(2, 3, 4, 5\)"),
    (dict(x=torch.zeros(2, 3, 0, 5, 6)), ValueError, r"x must have shape .* got \(2, 3, 0, 5, 6\)"),
    (dict(x=torch.zeros(2, 3, 4, 5, 6).int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
    (dict(x=None), TypeError, "x must be a floating-point tensor, got NoneType"),
    (dict(g=torch.zeros(2, 3, 6)), ValueError, r"g must have shape \(B=2, S, g, C=6\), S >= 1, got \(2, 3, 6\)"),
    (dict(g=torch.zeros(2, 0, 1, 6)), ValueError, r"g must have shape .* got \(2, 0, 1, 6\)"),
    (dict(g=torch.zeros(1, 3, 1, 6)), ValueError, r"g must have shape .* got \(1, 3, 1, 6\)"),
    (dict(g=torch.zeros(2, 3, 1, 7)), ValueError, r"g must have shape .* got \(2, 3, 1, 7\)"),
    (dict(g="cls"), TypeError, "g must be a floating-point tensor or None, got str"),
    (
        dict(g=torch.zeros(2, 3, 1, 6).double()),
        ValueError,
        "g must have x's dtype and device, torch.float32 on cpu",
    ),
    (dict(g=torch.zeros(2, 3, 1, 6, device="meta")), ValueError, "g must have x's dtype and device, .* on meta"),
    (dict(g=torch.zeros(2, 3, 1, 6), layout="maps"), ValueError, "g must be None with layout 'maps'"),
    (dict(layout="nchw"), ValueError, "layout must be one of tokens, maps, got 'nchw'"),
    (dict(plane="WD"), ValueError, "plane must be one of HW, DW, DH, DHW, got 'WD'"),
    (dict(plane=2), TypeError, "plane must be the name of a plane, got int 2"),
    (dict(pool_method="avg"), ValueError, "pool_method must be one of PCg, PCm, got 'avg'"),
    (dict(globals_at="end"), ValueError, "globals_at must be one of depth, plane, got 'end'"),
    (dict(layer=lambda t, n: (t,)), TypeError, "layer must return a floating-point tensor, got tuple"),
    (dict(layer=lambda t, n: t.int()), TypeError, "layer must return a floating-point tensor, got torch.int32"),
    (dict(layer="conv"), TypeError, "layer must be callable, got str"),
    (dict(g="cls", layout="maps"), ValueError, "g must be None with layout 'maps', got str"),
    (
        dict(layer=lambda t, n: t[:, 1:]),
        ValueError,
        "layer must keep the size of the DW plane: it took",
    ),
    (dict(layer=lambda t, n: t[1:]), ValueError, "layer must keep the size of the DW plane"),
    (dict(layer=lambda t, n: t[0]), ValueError, "layer must keep the size of the DW plane"),
    (dict(layer=lambda t, n: t[..., ::2], layout="maps"), ValueError, "layer must keep the size of the DW plane"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(change, error, message):
    arguments = dict(x=torch.zeros(2, 3, 4, 5, 6), g=None, layer=keep, plane="DW") | change
    with pytest.raises(error, match=message):
        pcf.plane_cycle(**arguments)
