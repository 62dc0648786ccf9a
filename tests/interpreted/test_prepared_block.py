"""Blocks that repeat what they did the last time: to the bit what they compute part by part, with and without
gradients; and what makes them look again."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from planecycle_fast import lift
from planecycle_fast.engine import block as block_module
from planecycle_fast.engine.prepared_block import PreparedBlock

from ..host_models import BY_NAME

# Packed qkv, three layers, SwiGLU, no RoPE; a stand-in of facebook's, with a bias that is made anew.
HOSTS = [
    pytest.param(name, marks=[] if name == "timm-dinov3-s" else pytest.mark.full)
    for name in ("timm-dinov3-s", "hf-dinov3", "timm-dinov3-s+", "timm-dinov2-s", "facebook-stand-in")
]


def lifted_of(name="timm-dinov3-s", attention="triton", blocks=3, **settings):  # on planes HW, DW and DH
    small = {"num_hidden_layers" if name.startswith("hf") else "depth": blocks}
    return lift(BY_NAME[name].build(**small).eval(), backend="triton", attention=attention, strict=False, **settings)


def volume_for(lifted, depth=2):
    size = lifted.adapter.patch_size[0]
    return torch.randn(1, 3, depth, size, 2 * size, generator=torch.Generator().manual_seed(depth))


@pytest.fixture
def repeated(monkeypatch):
    """The blocks that were repeated."""
    found, call = [], PreparedBlock.__call__
    monkeypatch.setattr(PreparedBlock, "__call__", lambda self, *args: found.append(self) or call(self, *args))
    return found


@pytest.fixture
def part_by_part(monkeypatch):
    """What `run` returns where nothing is repeated."""

    def run_so(run):
        with monkeypatch.context() as patch:
            patch.setattr(block_module, "preparation", lambda *_: None)
            return run()

    return run_so


def features(lifted, volume):
    with torch.no_grad():
        found = lifted(volume)
    return [t.clone() for t in (found.patches, found.cls) if t is not None]


def gradients(lifted, volume):
    """Features, and gradients of all parameters and of the volume."""
    lifted.zero_grad()
    volume = volume.clone().requires_grad_()
    found = lifted(volume)
    (found.patches * torch.linspace(-1, 1, found.patches.numel()).view_as(found.patches)).sum().backward()
    return [found.patches.detach(), volume.grad, *[p.grad for p in lifted.parameters()]]


def same(found, expected):
    assert len(found) == len(expected)
    return all([(a is None and b is None) or torch.equal(a, b) for a, b in zip(found, expected)])


@pytest.mark.parametrize("run", [features, gradients])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
@pytest.mark.parametrize("name", HOSTS)
def test_what_is_repeated_is_the_same_to_the_bit(part_by_part, repeated, name, attention, run):
    lifted = lifted_of(name, attention)
    volume = volume_for(lifted)
    expected = part_by_part(lambda: run(lifted, volume))
    assert not repeated
    run(lifted, volume)
    repeated.clear()
    assert same(run(lifted, volume), expected)
    gated = run is gradients and name == "timm-dinov3-s+"  # with SwiGLU and gradients part by part
    assert len(repeated) == (0 if gated else len(lifted.blocks))


@pytest.mark.full
def test_one_axis_of_a_plane_and_other_settings(part_by_part, repeated):
    lifted = lifted_of(pool_method="PCm", globals_at="plane", cycle_order=("DH", "DW"))
    volume = volume_for(lifted, 3)
    for run in (features, gradients):
        expected = part_by_part(lambda: run(lifted, volume))  # noqa: B023
        run(lifted, volume)
        assert same(run(lifted, volume), expected)
    assert repeated


def test_frozen_parameters_get_no_gradients(part_by_part, repeated):
    lifted = lifted_of()
    for i, p in enumerate(lifted.parameters()):
        p.requires_grad_(i % 3 == 0)
    volume = volume_for(lifted)
    expected = part_by_part(lambda: gradients(lifted, volume))
    gradients(lifted, volume)
    repeated.clear()
    assert same(gradients(lifted, volume), expected) and len(repeated) == len(lifted.blocks)
    assert any(p.grad is None for p in lifted.parameters())


def moved(lifted):
    for p in lifted.parameters():
        p.data = p.data.clone() * 1.5


def cast(lifted):
    lifted.to(torch.bfloat16).to(torch.float32)


def norm_replaced(lifted):
    norm = lifted.blocks[1].norm1
    lifted.blocks[1].norm1 = nn.LayerNorm(norm.normalized_shape, eps=0.5)


def weight_replaced(lifted):
    linear = lifted.blocks[0].mlp.fc1
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def scale_replaced(lifted):
    lifted.blocks[1].gamma_1 = nn.Parameter(torch.full_like(lifted.blocks[1].gamma_1, 3.0))


def changed_in_place(lifted):
    with torch.no_grad():
        for p in lifted.parameters():
            p.mul_(0.5)


def hooked(lifted):
    lifted.blocks[0].attn.register_forward_hook(lambda module, args, out: out * 2)


def hooked_linear(lifted):
    lifted.blocks[1].mlp.fc2.register_forward_hook(lambda module, args, out: out + 1)


CHANGES = [moved, cast, norm_replaced, weight_replaced, scale_replaced, changed_in_place, hooked, hooked_linear]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", [features, pytest.param(gradients, marks=pytest.mark.full)])
def test_changes_are_noticed(part_by_part, run, change):
    lifted = lifted_of()
    volume = volume_for(lifted)
    before = [run(lifted, volume) for _ in range(2)][-1]
    change(lifted)
    expected = part_by_part(lambda: run(lifted, volume))
    assert same(run(lifted, volume), expected) and same(run(lifted, volume), expected)
    assert change is cast or not torch.equal(before[0], expected[0])


def test_others_are_not_taken_for_it(part_by_part, repeated):
    """Other sizes, dtypes, autocast, gradients: each is another kind of call."""
    lifted = lifted_of()
    volume, larger = volume_for(lifted), volume_for(lifted, 3)
    for _ in range(2):
        features(lifted, volume)
    for given in (larger, volume.expand(2, -1, -1, -1, -1), volume):
        assert same(features(lifted, given), part_by_part(lambda: features(lifted, given)))  # noqa: B023
    with torch.autocast("cpu", torch.bfloat16):
        repeated.clear()
        assert same(features(lifted, volume), part_by_part(lambda: features(lifted, volume)))
        assert not repeated


def test_checkpointed_blocks_and_whole_models(part_by_part, repeated):
    lifted = lifted_of()
    volume = volume_for(lifted)
    expected = part_by_part(lambda: gradients(lifted, volume))
    for _ in range(2):
        gradients(lifted, volume)

    def run():
        lifted.zero_grad()
        given = volume.clone().requires_grad_()
        patches = checkpoint(lambda x: lifted(x).patches, given, use_reentrant=False)
        (patches * torch.linspace(-1, 1, patches.numel()).view_as(patches)).sum().backward()
        return [patches.detach(), given.grad, *[p.grad for p in lifted.parameters()]]

    repeated.clear()
    assert same(run(), expected) and not repeated


@pytest.mark.parametrize("attention", ["triton", pytest.param("sdpa", marks=pytest.mark.full)])
def test_second_derivatives_are_refused(repeated, attention):
    lifted = lifted_of(attention=attention)
    volume = volume_for(lifted)
    for _ in range(2):
        gradients(lifted, volume)
    given = volume.clone().requires_grad_()
    repeated.clear()
    [first] = torch.autograd.grad(lifted(given).patches.square().sum(), given, create_graph=True)
    assert repeated
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        first.square().sum().backward()


def test_what_came_in_is_not_changed(repeated):
    """Intermediate features are those after each layer, although later layers are repeated."""
    lifted = lifted_of()
    volume = volume_for(lifted)
    with torch.no_grad():
        first = [f.patches.clone() for f in lifted.intermediate(volume, n=3)]
        again = [f.patches for f in lifted.intermediate(volume, n=3)]
    assert repeated and all(map(torch.equal, first, again))


def test_gradients_add_up(repeated):
    lifted = lifted_of()
    volume = volume_for(lifted)
    lifted(volume)
    out = lifted(volume).patches.sum()
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in lifted.parameters()]
    out.backward()
    assert repeated and all([torch.allclose(p.grad, 2 * grad) for p, grad in zip(lifted.parameters(), once)])


@pytest.mark.parametrize("run", [features, gradients])
def test_nothing_of_a_pass_stays_in_memory(repeated, run):
    lifted = lifted_of()
    volume = volume_for(lifted)
    rows = volume.shape[2] * (lifted.adapter.num_globals + 2)  # and patches, on HW
    for _ in range(2):
        run(lifted, volume)
    repeated.clear()
    gc.collect()
    stay = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim > 2 and t.shape[:2].numel() == rows]
    assert not stay


def test_augmented_angles_are_those_of_their_pass(repeated):
    """Drawn anew in each: blocks are repeated, attention is not."""
    lifted = lifted_of(blocks=2)
    lifted.rope.shift_coords = 0.3
    lifted.train()
    volume = volume_for(lifted)
    found = []
    for seed in (0, 0, 1, 0):
        torch.manual_seed(seed)
        found.append(gradients(lifted, volume))
    assert repeated and same(found[1], found[0]) and same(found[3], found[0])
    assert not torch.equal(found[2][0], found[0][0])
