"""lift(depth_position=...) against a naive transcription; what it leaves alone, and what it refuses."""

import math

import pytest
import timm
import torch
from torch.nn.functional import scaled_dot_product_attention

import planecycle_fast as pcf
from planecycle_fast.geometry.planes import PLANES
from planecycle_fast.runtime import native

from .. import naive
from ..host_models import BY_NAME
from ..toy import PATCH, ToyAdapter, ToyViT

HOSTS = ["hf-dinov2", "hf-dinov2-registers", "timm-dinov2-s"]
MORE = ["hf-vit", "hf-mae", "hf-ijepa", "hf-clip-gelu", "hf-siglip-gelu", "timm-deit3", "timm-deit-distilled",
        "timm-vit-no-globals", "timm-dinov2-s-reg4", "hf-dinov2-backbone"]  # fmt: skip
EVERY = [*HOSTS, *[pytest.param(name, marks=pytest.mark.full) for name in MORE]]
MODES = ["planecycle", "slice2d", "flatten3d"]
needs_cpu = pytest.mark.skipif(not native.ready(), reason="backend 'cpu' is not usable")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
SIZES = (4, 3, 5)
DEFAULT = ("HW", "DW", "DH", "HW")


def angles(depth, count):
    """Slice by slice from the formula."""
    return torch.tensor([
        [2 * math.pi * (2 * (d + 0.5) / depth - 1) / 100 ** (j / count) for j in range(count)] for d in range(depth)
    ])  # fmt: skip


class Plain(ToyAdapter):
    """A model of one's own that has no position along D."""

    def rope(self, dtype):
        return None


def with_code(tokens, positions, g):
    """tokens (B*D, g + L, C) of the embedded slices, and the learned positions (L', C)."""
    size = (positions - positions.mean(0)).pow(2).mean().sqrt()
    turns = angles(SIZES[0], tokens.shape[-1] // 2)
    code = math.sqrt(2) * size * torch.cat([turns.sin(), turns.cos()], 1)
    tokens = tokens.clone()
    for i in range(len(tokens)):
        tokens[i, g:] += code[i % SIZES[0]]
    return tokens


def turning(depth, inner_sizes, heads, g):
    """scaled_dot_product_attention of a host that is on a plane whose first axis is D: q and k turned before."""

    def attend(q, k, v, *rest, **settings):  # (N, heads, g + L, hd)
        half = q.shape[-1] // 2
        by_row = angles(depth, half).repeat_interleave(math.prod(inner_sizes), 0)  # (L, hd/2)

        def turn(t):
            patches = t[:, :, g:]
            a, b = patches[..., :half], patches[..., half:]
            turned = torch.cat([a * by_row.cos() - b * by_row.sin(), b * by_row.cos() + a * by_row.sin()], -1)
            return torch.cat([t[:, :, :g], turned], 2)

        return scaled_dot_product_attention(turn(q), turn(k), v, *rest, **settings)

    return attend


def expected(monkeypatch, host, model, volume, mode, kind, planes=DEFAULT, pool="PCg", globals_at="depth"):
    """Patches (B, D, H, W, C) after the last layer, before the norm: the host's own blocks on the naive planes."""
    adapter = pcf.lift(model).adapter
    g = adapter.num_globals
    tokens = adapter.embed(volume.transpose(1, 2).flatten(0, 1))
    if kind == "sincos":
        tokens = with_code(tokens, adapter.positions(), g)
    planes, pool, globals_at = naive.settings_of_mode(mode, planes, pool, globals_at)

    def make_rope(plane, sizes):
        return plane

    def call(block):
        def run(tokens, plane):
            grid = [SIZES[axis] for axis in PLANES[plane].sequence]
            with monkeypatch.context() as patch:
                if kind == "rope1d" and plane != "HW":
                    attend = turning(SIZES[0], grid[1:], None, g)
                    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
                return adapter.call_block(block, tokens, tuple(grid), None)

        return run

    blocks = [call(block) for block in adapter.blocks]
    *_, (patches, _) = naive.run(tokens, SIZES, g, blocks, planes, pool, globals_at, make_rope)
    return patches


@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_equal_to_a_naive_transcription(monkeypatch, name, mode, kind):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(batch=2, depth=4)
    wanted = expected(monkeypatch, host, model, volume, mode, kind)
    plain = expected(monkeypatch, host, model, volume, mode, "none")
    turns = kind == "sincos" or mode != "slice2d"
    assert turns != torch.allclose(wanted, plain, atol=1e-4)  # the transcription does something
    for backend in ("reference", "cpu") if native.ready() else ("reference",):
        lifted = pcf.lift(model, mode=mode, depth_position=kind, backend=backend)
        [found] = lifted.intermediate(volume, 1, norm=False)
        torch.testing.assert_close(found.patches, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
@pytest.mark.parametrize("pool, globals_at", [("PCm", "depth"), ("PCg", "plane"), ("PCm", "plane")])
@torch.no_grad()
def test_every_plane_and_way_of_pooling(monkeypatch, kind, pool, globals_at):
    host, planes = BY_NAME["hf-dinov2-registers"], ("DH", "HW", "DHW", "DW")
    model, volume = host.make(), host.volume(batch=2, depth=4)
    wanted = expected(monkeypatch, host, model, volume, "planecycle", kind, planes, pool, globals_at)
    for backend in ("reference", "cpu") if native.ready() else ("reference",):
        settings = dict(cycle_order=planes, pool_method=pool, globals_at=globals_at, backend=backend)
        [found] = pcf.lift(model, depth_position=kind, **settings).intermediate(volume, 1, norm=False)
        torch.testing.assert_close(found.patches, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_what_stays_the_same(name, backend):
    """Without it, and by rope1d where no plane contains D, to the bit; by sincos slice2d is another."""
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    settings = dict(mode="slice2d", backend=backend)
    plain, none, turned = [
        pcf.lift(model, **settings, **more)(volume)
        for more in ({}, {"depth_position": "none"}, {"depth_position": "rope1d"})
    ]
    assert all([torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, none, turned) if a is not None])
    assert not torch.allclose(pcf.lift(model, **settings, depth_position="sincos")(volume).patches, plain.patches)


@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
def test_gradients_are_those_of_the_reference(kind):
    host = BY_NAME["timm-dinov2-s"]
    model, volume, found = host.make(depth=3), host.volume(depth=3), []
    for backend in ("reference", "cpu") if native.ready() else ("reference", "reference"):
        leaf = volume.clone().requires_grad_()
        out = pcf.lift(model, depth_position=kind, backend=backend)(leaf)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(out.patches.square().mean(), [leaf, *parameters], allow_unused=True))
    for a, b in zip(*found):
        assert a is b or torch.allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, float(a.abs().max())))


@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
@torch.no_grad()
def test_order_of_slices_is_seen(kind):
    """Reversed volumes have reversed features without it, class tokens aside; not with it."""
    host = BY_NAME["timm-vit-no-globals"]
    model, volume = host.make(), host.volume(depth=4)
    plain, known = pcf.lift(model), pcf.lift(model, depth_position=kind)
    for lifted, same in ((plain, True), (known, False)):
        back = lifted(volume.flip(2)).patches.flip(1)
        assert torch.allclose(back, lifted(volume).patches, atol=1e-4) == same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
@torch.no_grad()
def test_other_dtypes(kind, dtype):
    host = BY_NAME["hf-dinov2"]
    model, volume = host.make(), host.volume()
    wanted = pcf.lift(model, depth_position=kind)(volume).patches
    found = pcf.lift(model.to(dtype), depth_position=kind)(volume.to(dtype)).patches
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.2)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sincos", "rope1d"])
def test_compiled_sizes_are_no_constants(kind):
    torch._dynamo.reset()
    host = BY_NAME["timm-dinov2-s"]
    lifted = pcf.lift(host.make(depth=1), cycle_order="DW", depth_position=kind, backend="reference")
    host.check_one_graph(lifted)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["hf-dinov3", "timm-dinov3-s", "timm-eva02-s", "timm-rope-mixed", "facebook-stand-in"])
def test_hosts_with_rotary_embeddings_are_refused(name):
    with pytest.raises(ValueError, match="depth_position must be 'none'.*rotary embeddings follow every plane already"):
        pcf.lift(BY_NAME[name].build(), depth_position="rope1d")


def test_other_refusals():
    beit, plain = BY_NAME["timm-beit"].build(), BY_NAME["hf-dinov2"].make()
    with pytest.raises(ValueError, match="got 'sincos': biases of relative positions follow every plane already"):
        pcf.lift(beit, depth_position="sincos")
    with pytest.raises(ValueError, match="depth_position must be one of none, sincos, rope1d, got 'rope'"):
        pcf.lift(plain, depth_position="rope")
    bare = timm.create_model("vit_tiny_patch16_224", depth=1, pos_embed="none", num_classes=0)
    with pytest.raises(ValueError, match="got 'sincos': it has no learned positions"):
        pcf.lift(bare, depth_position="sincos")
    with pytest.raises(ValueError, match="got 'sincos': it has no learned positions"):
        pcf.lift(ToyViT(), adapter=Plain, depth_position="sincos")


def test_attention_of_the_model_s_own_does_not_turn():
    """A hook on it, a block as a whole, another attention: each is said, and nothing is silently without a turn."""
    host = BY_NAME["hf-dinov2"]
    model = host.make()
    lifted, volume = pcf.lift(model, depth_position="rope1d"), host.volume()
    for module in (model.encoder.layer[1], lifted.adapter.parts(model.encoder.layer[2]).attention().module):
        handle = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"rope1d' needs attention that can be taken apart, got block [12].*hooks"):
            lifted(volume)
        handle.remove()
    lifted(volume)
    toy = pcf.lift(ToyViT(), adapter=Plain, depth_position="rope1d")
    with pytest.raises(ValueError, match="got block 0, whose own code runs: its adapter does not take blocks apart"):
        toy(torch.randn(1, 3, 2, 2 * PATCH, 2 * PATCH))


def test_report_and_repr(capsys):
    model = BY_NAME["hf-dinov2"].make()
    pcf.lift(model).report()
    assert "depth:" not in capsys.readouterr().out and "depth_position" not in repr(pcf.lift(model))
    pcf.lift(model, depth_position="rope1d").report()
    assert capsys.readouterr().out.endswith("depth: queries and keys turned by rope on planes DW, DH\n")
    pcf.lift(model, mode="slice2d", depth_position="rope1d").report()
    assert capsys.readouterr().out.endswith("by rope nowhere, as no plane contains D\n")
    lifted = pcf.lift(model, depth_position="sincos")
    lifted.report()
    assert "depth: sine and cosine added to the patches, of size 0." in capsys.readouterr().out
    assert "depth_position=sincos" in repr(lifted)
