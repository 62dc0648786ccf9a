"""Lifted models compute what the naive transcription computes, in float64 to 1e-12."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import planecycle_fast as pcf

from . import naive
from .host_models import HOSTS
from .toy import PATCH, ToyViT, toy_lift

MODES = ("planecycle", "slice2d", "flatten3d")
PLANE_NAMES = ("HW", "DW", "DH", "DHW")

case = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(MODES + ("planecycle",) * 3),
        "cycle": st.lists(st.sampled_from(PLANE_NAMES), min_size=1, max_size=5),
        "pool_method": st.sampled_from(["PCg", "PCm"]),
        "globals_at": st.sampled_from(["depth", "plane"]),
        "g": st.sampled_from([0, 1, 5]),
        "batch": st.integers(1, 3),
        "sizes": st.permutations(range(1, 10)).map(lambda p: tuple(p[:3])),  # D, H, W all different
        "rope": st.sampled_from([None, "separate", "min", "max"]),
        "depth": st.integers(1, 5),
        "seed": st.integers(0, 2**16),
    }
)


def check(mode, cycle, pool_method, globals_at, g, batch, sizes, rope, depth, seed):
    torch.manual_seed(seed)
    model = ToyViT(g, depth, rope=rope is not None, normalize=rope or "separate").double()
    d, h, w = sizes
    volume = torch.randn(batch, 3, d, h * PATCH, w * PATCH, dtype=torch.float64)
    arguments = {"cycle_order": cycle, "pool_method": pool_method, "globals_at": globals_at}
    lifted = toy_lift(model, mode=mode, **arguments)

    planes, pool_method, globals_at = naive.settings_of_mode(mode, cycle, pool_method, globals_at)
    make_rope = naive.make_rope(16, rope) if rope else lambda *_: None
    embedded = model.embed(volume.movedim(2, 1).flatten(0, 1))
    layers = list(naive.run(embedded, sizes, g, model.blocks, planes, pool_method, globals_at, make_rope))

    same(lifted(volume), *layers[-1], model.norm)
    for norm in (True, False):
        got = lifted.intermediate(volume, range(depth), norm=norm)
        assert len(got) == depth
        for features, layer in zip(got, layers):
            same(features, *layer, model.norm if norm else lambda t: t)


def same(features, x, globals_, norm):
    close(features.patches, norm(x))
    count = globals_.shape[2]
    if count == 0:
        assert features.cls is None and features.registers is None
        close(features.pooled(), norm(x).mean((1, 2, 3)))
        return
    globals_ = norm(globals_)
    close(features.cls, globals_[:, :, 0])
    close(features.pooled(), globals_[:, :, 0].mean(1))
    if count == 1:
        assert features.registers is None
    else:
        close(features.registers, globals_[:, :, 1:])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


SPECIAL = dict(globals_at="depth", g=5, batch=2, rope="separate", depth=4, seed=1)


@settings(max_examples=500)
@given(case=case)
@example(case=dict(SPECIAL, mode="planecycle", cycle=["HW"], pool_method="PCm", sizes=(4, 3, 2)))
@example(case=dict(SPECIAL, mode="planecycle", cycle=["DW"], pool_method="PCg", sizes=(4, 2, 3)))
@example(case=dict(SPECIAL, mode="planecycle", cycle=["DW"], pool_method="PCm", sizes=(5, 3, 2)))
@example(case=dict(SPECIAL, mode="planecycle", cycle=["DH", "DHW"], pool_method="PCg", sizes=(1, 2, 9)))
def test_equals_the_naive_transcription(case):
    check(**case)


@pytest.mark.full
@settings(max_examples=10_000)
@given(case=case)
def test_equals_the_naive_transcription_long(case):
    check(**case)


def naive_of_host(host, model, volume, sizes, mode, settings_):
    """The transcription around a library's own blocks and RoPE, fp64."""
    planes, pool_method, globals_at = naive.settings_of_mode(mode, *settings_)
    images = volume.movedim(2, 1).flatten(0, 1)
    if host.name.startswith("hf"):
        embedded = model.embeddings(images)
        layers = pcf.lift(model).adapter.blocks  # where they are depends on transformers' version
        norm = norm_globals = model.norm if host.rope else model.layernorm
    elif host.name.startswith("facebook"):
        embedded, layers, norm = model.prepare_tokens_with_masks(images)[0], model.blocks, model.norm
        norm_globals = model.cls_norm or model.norm
    else:
        patches = model.patch_embed(images)
        embedded = model._pos_embed(patches)
        embedded = embedded[0] if host.rope else embedded
        layers, norm, norm_globals = model.blocks, model.norm, model.norm

    def call(block):
        def run(tokens, sincos):
            if sincos is None:
                return block(tokens)
            sin, cos = sincos[0].to(volume.dtype), sincos[1].to(volume.dtype)
            if host.name.startswith("hf"):
                return block(tokens, position_embeddings=(cos, sin))
            if host.name.startswith("facebook"):
                return block(tokens, (sin, cos))
            return block(tokens, rope=torch.cat([sin, cos], -1))

        return run

    make_rope = naive.make_rope(host.head_dim, host.normalize) if host.rope else lambda *_: None
    blocks = [call(b) for b in layers]
    *_, (x, g) = naive.run(embedded, sizes, host.num_globals, blocks, planes, pool_method, globals_at, make_rope)
    return norm(x), norm_globals(g)


@pytest.mark.parametrize("globals_at", ["depth", "plane"])
@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("mode", ["planecycle", "flatten3d"])
@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_adapter_in_three_dimensions(host, mode, pool_method, globals_at):
    model = host.make().double()
    volume, sizes = host.volume(dtype=torch.float64), (4, 3, 5)
    cycle = ("DW", "HW", "DH", "DHW") if mode == "planecycle" else ("HW",)
    lifted = pcf.lift(model, mode=mode, cycle_order=cycle, pool_method=pool_method, globals_at=globals_at)
    with torch.no_grad():
        features = lifted(volume)
        patches, globals_ = naive_of_host(host, model, volume, sizes, mode, (cycle, pool_method, globals_at))
    # Hosts compute RoPE coordinates and periods in float32, whatever their dtype.
    tolerance = dict(rtol=0, atol=1e-5 if host.rope else 1e-12)
    torch.testing.assert_close(features.patches, patches, **tolerance)
    got = globals_of(features)
    assert (got is None) == (host.num_globals == 0)
    if got is not None:
        torch.testing.assert_close(got, globals_, **tolerance)


def globals_of(features):
    """Class and register tokens together, (B, S, g, C), or None."""
    parts = [features.cls[:, :, None]] if features.cls is not None else []
    parts += [features.registers] if features.registers is not None else []
    return torch.cat(parts, 2) if parts else None
