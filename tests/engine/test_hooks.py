"""Hooks on lifted blocks and on the host's: what they see, in which order of rows, and what they change."""

import pytest
import torch

import planecycle_fast as pcf

from ..host_models import BY_NAME
from ..test_sharing import families, run
from ..toy import ToyViT, toy_lift

SHAPES = [(8, 15), (6, 20), (10, 12), (8, 15), (8, 15)]  # B*P and L along HW, DW, DH, HW, HW


def watch_shapes(blocks):
    """[(block, "in" or "out", shape)] that hooks on blocks will see."""
    seen = []

    def see(way, i, block):
        def hook(module, args, out=None):
            assert module is block  # not a copy: what a hook keeps on it stays
            value = args[0] if out is None else out
            seen.append((i, way, value.tokens().shape if isinstance(value, pcf.Stream) else value.shape))

        return hook

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(see("in", i, block))
        block.register_forward_hook(see("out", i, block))
    return seen


@families
def test_hooks(host):
    """On lifted blocks: the stream, in the order of the previous plane, then of their own."""
    lifted, volume = pcf.lift(host.make()), host.volume(batch=2, depth=4)  # 3 x 5 patches per slice
    expected, whole = run(lifted, volume), []
    seen = watch_shapes(lifted.blocks)
    lifted.register_forward_hook(lambda m, args, out: whole.append(out))
    features = lifted(volume)
    assert whole == [features]
    shapes = [torch.Size([n, host.num_globals + length, 64]) for n, length in SHAPES]
    before = [shapes[0], *shapes]
    assert seen == [(i, way, s[i]) for i in range(5) for way, s in (("in", before), ("out", shapes))]
    assert torch.equal(features.patches, expected)


@families
def test_hooks_on_the_hosts_blocks(host):
    """Tokens in the order of the block's own plane, before and after."""
    lifted, volume = pcf.lift(host.make()), host.volume(batch=2, depth=4)
    expected = run(lifted, volume)
    seen = watch_shapes(lifted.adapter.blocks)
    got = run(lifted, volume)
    shapes = [torch.Size([n, host.num_globals + length, 64]) for n, length in SHAPES]
    assert seen == [(i, way, shape) for i, shape in enumerate(shapes) for way in ("in", "out")]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@families
def test_a_hook_changes_the_stream(host):
    lifted, volume = pcf.lift(host.make()), host.volume()
    before = run(lifted, volume)
    handles = [
        lifted.blocks[1].register_forward_hook(lambda m, args, out: pcf.Stream(2 * out.tokens())),
        lifted.blocks[1].register_forward_pre_hook(lambda m, args: (pcf.Stream(args[0].tokens() + 1), args[1])),
    ]
    changed = run(lifted, volume)
    assert not torch.allclose(changed, before)
    for handle in handles:
        handle.remove()
    assert torch.equal(run(lifted, volume), before)
    hosts = lifted.adapter.blocks[1]
    hosts.register_forward_hook(lambda m, args, out: 2 * out)
    hosts.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    torch.testing.assert_close(run(lifted, volume), changed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("host", [BY_NAME["timm-dinov3-s"]])
def test_the_mode_that_a_hook_leaves_behind_holds_for_the_blocks_after_it(host):
    """Gradients from a layer on, or autocast: as if all blocks were called, whether or not they run several at once."""
    lifted, volume, autocast = pcf.lift(host.make()), host.volume(), torch.autocast("cpu", dtype=torch.bfloat16)
    modes = {
        "gradients": (lambda: torch.set_grad_enabled(True), lambda: torch.set_grad_enabled(False)),
        "autocast": (autocast.__enter__, lambda: autocast.__exit__(None, None, None)),
    }
    for mode, (begin, end) in modes.items():
        handle = lifted.blocks[1].register_forward_hook(lambda *_: begin() and None)  # noqa: B023
        found = []
        for called in (False, True):
            hooks = [block.register_forward_hook(lambda *_: None) for block in lifted.blocks if called]
            with torch.no_grad():
                found.append(lifted(volume).patches)
                end()
            for hook in hooks:
                hook.remove()
        handle.remove()
        tolerance = 1e-5 if mode == "gradients" else 0.05
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)
        assert found[0].requires_grad == (mode == "gradients")
        assert torch.equal(run(lifted, volume), found[0]) == (mode == "gradients")
        if mode == "gradients":
            found[0].square().mean().backward()
            assert [block.norm1.weight.grad is not None for block in lifted.blocks] == [False, False, True, True, True]


def test_a_hook_that_returns_no_stream_is_told():
    lifted = toy_lift(ToyViT(rope=False))
    lifted.blocks[1].register_forward_hook(lambda m, args, out: out.tokens())
    with pytest.raises(TypeError, match="stream must be a planecycle_fast.Stream, got Tensor; hooks must return one"):
        lifted(torch.randn(1, 3, 2, 4, 6))
