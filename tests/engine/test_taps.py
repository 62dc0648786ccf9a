"""LiftedModel.tap: what hooks see there and may change, GradCAM by hand, and that it costs nothing without them."""

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.engine import passes

from ..host_models import BY_NAME, GRID

HOSTS = ["timm-dinov3-s", "hf-dinov2-registers", "timm-vit-no-globals", "facebook-stand-in"]
MODES = ["planecycle", "slice2d", "flatten3d"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_a_hook_sees_the_maps_of_its_layer(name, mode):
    host = BY_NAME[name]
    lifted, volume, seen = pcf.lift(host.make(), mode=mode), host.volume(), {}
    plain = lifted(volume)
    count = len(lifted.blocks)
    for i in range(count):
        lifted.tap(i).register_forward_hook(lambda tap, args, maps: seen.update({tap.layer: maps}))
    with_hooks = lifted(volume)
    for a, b in zip(with_hooks, plain):
        assert a is b or torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert list(seen) == [*range(count)]
    for i, features in enumerate(lifted.intermediate(volume, range(count), norm=False)):
        assert torch.equal(seen[i], features.maps)


@pytest.mark.parametrize("globals_at", ["depth", "plane"])
def test_what_comes_after_is_computed_from_it(globals_at):
    """The output of a later layer changes with what a hook returns, as it does with the stream itself."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), globals_at=globals_at), host.volume()
    noise = torch.randn(2, 64, 4, *GRID)

    def on_the_stream(block, args, stream):  # the same by a hook on the block: DW order (B*H, g + D*W, C)
        tokens = stream.tokens().clone()
        rows = noise.permute(0, 3, 2, 4, 1).reshape(2 * GRID[0], 4 * GRID[1], 64)
        tokens[:, 5:] += rows
        return pcf.Stream(tokens)

    with torch.no_grad():
        handle = lifted.blocks[1].register_forward_hook(on_the_stream)
        wanted = lifted(volume)
        handle.remove()
        handle = lifted.tap(1).register_forward_hook(lambda tap, args, maps: maps + noise)
        found = lifted(volume)
        handle.remove()
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def grad_cam(maps, gradients, axes):
    """maps and gradients with channels at 1; the mean gradient of each channel weighs it. Before its relu."""
    return (gradients.mean(axes, keepdim=True) * maps).sum(1)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("name", HOSTS)
def test_grad_cam_of_slices_is_that_of_the_2d_model(name, layer):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(batch=1)
    lifted, kept = pcf.lift(model, mode="slice2d"), {}
    blocks = list(lifted.adapter.blocks)
    g, weight = lifted.adapter.num_globals, torch.randn(64)

    def keep(name):
        def hook(module, args, out):
            kept[name] = out[0] if isinstance(out, (tuple, list)) else out
            kept[name].retain_grad()

        return hook

    handle = blocks[layer].register_forward_hook(keep("2d"))
    tokens = host.tokens(model, volume[0].transpose(0, 1))  # (D, g + L, C)
    (tokens[:, g:].mean(1) @ weight).sum().backward()
    handle.remove()
    two = [t[:, g:].mT.unflatten(-1, GRID) for t in (kept["2d"].detach(), kept["2d"].grad)]  # (D, C, H, W)
    wanted = grad_cam(*two, (2, 3))

    lifted.tap(layer).register_forward_hook(keep("3d"))
    (lifted(volume).patches.mean((2, 3)) @ weight).sum().backward()
    found = grad_cam(kept["3d"].detach(), kept["3d"].grad, (3, 4))[0]
    assert wanted.std() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_nothing_runs_without_hooks(monkeypatch):
    host, calls = BY_NAME["timm-dinov3-s"], []
    lifted, volume = pcf.lift(host.make()), host.volume()
    tap = lifted.tap(1)
    plain = lifted(volume)
    forward = type(tap).forward
    monkeypatch.setattr(type(tap), "forward", lambda self, maps: calls.append(self.layer) or forward(self, maps))
    called, run = [], passes._run_next

    def counted(steps, held):
        called.append(len(steps))
        return run(steps, held)

    monkeypatch.setattr("planecycle_fast.engine.passes._run_next", counted)
    again, number = lifted(volume), len(called)
    assert calls == [] and all([torch.equal(a, b) for a, b in zip(again, plain)])
    handle = tap.register_forward_hook(lambda *_: None)
    lifted(volume)
    assert calls == [1]
    handle.remove()
    called.clear()
    lifted(volume)
    assert calls == [1] and len(called) == number
    assert lifted.tap(1) is tap and lifted.tap(-4) is tap
    assert tap not in set(lifted.modules()) and tap not in set(pcf.unlift(lifted).modules())


def test_refused():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume(depth=2)
    for layer, error in ((5, ValueError), (-6, ValueError), ("1", TypeError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="layer must"):
            lifted.tap(layer)
    for returned, error, match in (
        (lambda maps: (maps,), TypeError, "tap of layer 2 must return a tensor, got tuple"),
        (lambda maps: maps[..., :1], ValueError, r"of the same shape, \(2, 64, 2, 3, 5\), got \(2, 64, 2, 3, 1\)"),
    ):
        handle = lifted.tap(2).register_forward_hook(lambda tap, args, maps, returned=returned: returned(maps))
        with pytest.raises(error, match=match):
            lifted(volume)
        handle.remove()
