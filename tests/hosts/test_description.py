"""Parts of a block are read once, and again as soon as anything that they were read from has changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.hosts.description import Reading

from ..host_models import BY_NAME

NAMES = ["timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov2-s", "hf-dinov3", "hf-dinov2-swiglu", "facebook-stand-in"]


def lifted(name="timm-dinov3-s"):
    found = pcf.lift(BY_NAME[name].make())
    assert len(found.blocks) == len(found.lifted_blocks)  # made when they are asked for
    return found


@pytest.mark.parametrize("name", NAMES)
def test_unchanged_blocks_are_read_once(name):
    found = lifted(name)
    volume = BY_NAME[name].volume()
    with torch.no_grad():
        found(volume)
        before = [block.reading.now() for block in found.lifted_blocks]
        found(volume)
    assert all(block.reading.now() is snapshot for block, snapshot in zip(found.lifted_blocks, before))
    assert len({id(snapshot) for snapshot in before}) == len(before)


def hook(block):
    return block.mlp.fc1.register_forward_hook(lambda *_: None)


def remove_hook(block):
    hook(block).remove()
    handle = hook(block)
    yield
    handle.remove()


def move_hook(block):
    handle = hook(block)
    yield
    handle.remove()
    block.mlp.act.register_forward_hook(lambda *_: None)


CHANGES = {  # of a timm block: what is done to it before it was read, and after
    "a hook": hook,
    "a hook goes": remove_hook,
    "a hook moves": move_hook,
    "a hook on the block": lambda block: block.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.attn.register_full_backward_hook(lambda *_: None),
    "another layer": lambda block: setattr(block.attn, "proj", nn.Linear(64, 64)),
    "another weight": lambda block: setattr(block.norm1, "weight", nn.Parameter(torch.ones(64))),
    "no bias": lambda block: setattr(block.norm2, "bias", None),
    "another LayerScale": lambda block: setattr(block, "gamma_1", nn.Parameter(torch.ones(64))),
    "another epsilon": lambda block: setattr(block.norm1, "eps", 0.5),
    "another activation": lambda block: setattr(block.mlp, "act", nn.SiLU()),
    "an approximation": lambda block: setattr(block.mlp.act, "approximate", "tanh"),
    "a patched forward": lambda block: setattr(block.mlp, "forward", block.mlp.forward),
    "compiled": lambda block: block.attn.compile(backend="eager"),
    "dropout": lambda block: setattr(block.mlp.drop1, "p", 0.5),
    "training": lambda block: block.train(),
    "no fused attention": lambda block: setattr(block.attn, "fused_attn", False),
    "other heads": lambda block: setattr(block.attn, "num_heads", 4),
    "an attribute goes": lambda block: delattr(block.attn, "fused_attn"),
    "a layer more": lambda block: block.mlp.add_module("more", nn.Identity()),
    "another class": lambda block: setattr(block.norm1, "__class__", type("Other", (type(block.norm1),), {})),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_blocks_are_read_again(change):
    found = lifted()
    block = found.lifted_blocks[1]
    done = CHANGES[change]
    steps = done(block.host) if change in ("a hook goes", "a hook moves") else None
    if steps is not None:
        next(steps)
    others, before = [b.reading.now() for b in found.lifted_blocks if b is not block], block.reading.now()
    if steps is not None:
        next(steps, None)
    else:
        done(block.host)
    if change == "an attribute goes":
        with pytest.raises(AttributeError, match="fused_attn"):
            block.reading.now()
    else:
        assert block.reading.now() is not before
        assert block.reading.now() is block.reading.now()
    assert all(b.reading.now() is other for b, other in zip([b for b in found.lifted_blocks if b is not block], others))


def test_hooks_of_all_modules():
    reading = lifted().lifted_blocks[0].reading
    before = reading.now()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert reading.now() is not before and "all modules have hooks" in reading.now().whole
    finally:
        handle.remove()
    assert reading.now().whole is None


def test_the_attention_that_a_configuration_names():
    host = BY_NAME["hf-dinov3"]
    model = host.make()
    found = pcf.lift(model)
    assert found.descriptions()[0].kept.get("attention") is None
    model.set_attn_implementation("eager")
    assert "eager" in found.descriptions()[0].kept["attention"]
    model.set_attn_implementation("sdpa")
    assert found.descriptions()[0].kept.get("attention") is None


def test_copies_read_themselves():
    found = lifted()
    before = found.lifted_blocks[0].reading.now()
    other = copy.deepcopy(found)
    reading = other.lifted_blocks[0].reading
    assert reading.now() is not before and reading.now() is reading.now()
    assert reading.parts.block is other.lifted_blocks[0].host
    other.lifted_blocks[0].host.mlp.register_forward_hook(lambda *_: None)
    assert "mlp" in reading.now().kept
    assert found.lifted_blocks[0].reading.now() is before


def test_pickled_readings_read_themselves():
    block = BY_NAME["timm-dinov3-s"].make().blocks[0]
    reading = Reading(pcf.lift(BY_NAME["timm-dinov3-s"].make()).adapter.parts(block))
    reading.now()
    again = pickle.loads(pickle.dumps(reading))
    assert again.now().kept == {} and again.parts.block is not block


@pytest.mark.parametrize("change", ["weight", "layer", "LayerScale"])
@torch.no_grad()
def test_outputs_follow_what_is_exchanged(change):
    model, volume = BY_NAME["timm-dinov3-s"].make(), BY_NAME["timm-dinov3-s"].volume()
    found = pcf.lift(model)
    before = found(volume).patches
    block = model.blocks[2]
    if change == "weight":
        block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight * 2)
    elif change == "layer":
        block.attn.proj = nn.Linear(64, 64)
    else:
        block.gamma_2 = nn.Parameter(block.gamma_2 * 2)
    after = found(volume).patches
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, pcf.lift(model, backend="reference")(volume).patches)
