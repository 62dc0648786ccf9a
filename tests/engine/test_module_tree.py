"""One tree of modules, whichever way one walks through a lifted model or writes to it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import planecycle_fast as pcf
from planecycle_fast.engine.module_tree import Mirror, Tree

from ..host_models import BY_NAME, EVERY_HOST
from ..hosts.test_hosts import all_tokens, host_features
from ..toy import ToyAdapter, ToyViT, toy_lift

every_host = pytest.mark.parametrize("host", EVERY_HOST)
families = pytest.mark.parametrize("name", ["hf-dinov3", "hf-dinov2", "timm-dinov3-s", "facebook-stand-in"])


def by_path(module, path):
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def walk(module, prefix=""):
    """Paths and modules, by `_modules` alone."""
    yield prefix, module
    for name in module._modules:
        if module._modules[name] is not None:
            yield from walk(module._modules[name], f"{prefix}.{name}" if prefix else name)


def path_of(lifted, module):
    return next(name for name, found in lifted.named_modules() if found is module)


def both_are_right(host, model, volume):
    """Lifted anew, slice by slice, a model gives what it gives of slices; and holds nothing of ours."""
    assert not any(isinstance(module, (pcf.LiftedBlock, Mirror)) for module in model.modules())
    with torch.no_grad():
        got = all_tokens(pcf.lift(model, mode="slice2d")(volume))
        torch.testing.assert_close(got, host_features(host, model, volume), rtol=0, atol=1e-5)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


class Low(nn.Module):
    """LoRA-like: a linear layer, and something of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.more(x)


@every_host
def test_all_ways_to_walk_agree(host):
    model = host.make()
    lifted = pcf.lift(model)
    found = dict(lifted.named_modules(remove_duplicate=False))
    assert list(found) == list(dict(model.named_modules(remove_duplicate=False)))
    assert dict(walk(lifted)) == found and {*lifted.modules()} == {*found.values()}
    for path, module in found.items():
        assert lifted.get_submodule(path) is module and by_path(lifted, path) is module
        assert list(module.named_children()) == [(n, m) for n, m in module._modules.items() if m is not None]
    seen = []
    lifted.apply(seen.append)
    assert {*seen} == {*found.values()}
    assert [n for n, _ in lifted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(lifted.state_dict()) == list(model.state_dict())
    assert lifted.blocks is lifted.blocks and list(lifted.blocks) == list(lifted.lifted_blocks)


@every_host
@torch.no_grad()
def test_hooks_by_name(host):
    lifted, volume, seen = pcf.lift(host.make()), host.volume(batch=1, depth=2), []
    expected = lifted(volume).patches
    blocks = {path_of(lifted, block): block for block in lifted.blocks}
    linear = next(n for n, m in lifted.named_modules() if isinstance(m, nn.Linear) and n.startswith(next(iter(blocks))))
    for name in [*blocks, linear]:
        lifted.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.append((name, m, out)))
    got = lifted(volume).patches
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert [(name, m) for name, m, _ in seen if name in blocks] == list(blocks.items())
    assert all(isinstance(out, pcf.Stream) for name, _, out in seen if name in blocks)
    assert [m for name, m, _ in seen if name == linear] == [lifted.get_submodule(linear)]


@every_host
@torch.no_grad()
def test_submodules_that_are_set(host):
    model = host.make()
    lifted, volume = pcf.lift(model), host.volume(batch=1, depth=2)
    expected, keys = lifted(volume).patches, list(model.state_dict())
    path = path_of(lifted, lifted.blocks[1])

    # Around a block: in the lifted tree alone.
    around = Around(lifted.blocks[1])
    lifted.set_submodule(path, around)
    assert lifted.get_submodule(path) is around is lifted.blocks[1] and lifted.lifted_blocks[1] is around.inner
    assert model.get_submodule(path) is lifted.lifted_blocks[1].host and list(model.state_dict()) == keys
    torch.testing.assert_close(lifted(volume).patches, expected, rtol=0, atol=1e-5)
    assert around.calls == 1
    lifted.train(), lifted.double()
    assert around.training
    lifted.eval(), lifted.float()
    assert not around.training
    both_are_right(host, model, volume)
    lifted.set_submodule(path, around.inner)
    assert lifted.blocks[1] is lifted.lifted_blocks[1]

    # A layer of a block, by path: in both.
    name = [n for n, m in lifted.named_modules() if n.startswith(f"{path}.") and type(m) is nn.Linear][-1]
    parent, _, last = name.rpartition(".")
    setattr(by_path(lifted, parent), last, Low(lifted.get_submodule(name)))
    assert model.get_submodule(name) is lifted.get_submodule(name) and isinstance(model.get_submodule(name), Low)
    assert list(lifted.state_dict()) == list(model.state_dict()) != keys
    assert not torch.allclose(lifted(volume).patches, expected, atol=1e-3)
    both_are_right(host, model, volume)

    # Another block: in both.
    lifted.set_submodule(path, copy.deepcopy(model.get_submodule(path)))
    assert lifted.blocks[1].host is model.get_submodule(path)
    both_are_right(host, model, volume)


@families
@torch.no_grad()
def test_setting_what_was_found_does_nothing(name):
    model = BY_NAME[name].make()
    lifted, volume = pcf.lift(model), BY_NAME[name].volume()
    before, expected = list(walk(model)), lifted(volume).patches
    for module in [*lifted.modules()]:
        for key, child in [*module._modules.items()]:
            module._modules[key] = child
            if child is not None:
                module.add_module(key, child), module.register_module(key, child), setattr(module, key, child)
        module._modules.update(dict(module._modules))
    lifted.blocks = lifted.blocks
    assert list(walk(model)) == before and torch.equal(lifted(volume).patches, expected)
    both_are_right(BY_NAME[name], model, volume)


@families
def test_layers_wrapped_twice_and_keys(name):
    model = BY_NAME[name].make()
    lifted = pcf.lift(model)
    keys, alike = list(model.state_dict()), copy.deepcopy(model)  # wrapped as it is
    for i, block in enumerate(lifted.blocks):
        lifted.blocks[i] = checkpoint_wrapper(checkpoint_wrapper(block))
        path = path_of(lifted, lifted.blocks[i])
        alike.set_submodule(path, checkpoint_wrapper(checkpoint_wrapper(alike.get_submodule(path))))
    assert list(lifted.state_dict()) == keys == list(model.state_dict())
    assert [n for n, _ in lifted.named_parameters()] == [n for n, _ in alike.named_parameters()]
    assert [n for n, _ in lifted.named_modules()] == [n for n, _ in alike.named_modules()]
    state = {key: torch.zeros_like(t) for key, t in lifted.state_dict().items()}
    assert lifted.load_state_dict(state) == ([], [])
    assert not any(p.any() for p in model.parameters())
    for copied in (copy.deepcopy(lifted), pickle.loads(pickle.dumps(lifted))):
        assert [type(block) for block in copied.blocks] == [type(block) for block in lifted.blocks]
        assert list(copied.state_dict()) == keys and copied.lifted_blocks[0].host is copied.adapter.blocks[0]
        assert {*copied.parameters()} == {*pcf.unlift(copied).parameters()}


def test_lists_of_blocks_change_as_the_hosts_do():
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    hosts = list(model.blocks)
    lifted.blocks[0], lifted.blocks[1] = lifted.blocks[1], lifted.blocks[0]
    assert list(model.blocks) == [hosts[1], hosts[0], *hosts[2:]]
    both_are_right(host, model, volume)
    del lifted.blocks[4]
    assert list(model.blocks) == [hosts[1], hosts[0], *hosts[2:4]] and len(lifted.blocks) == len(lifted.blocks) == 4
    lifted.blocks.append(lifted.blocks[0])
    lifted.blocks.insert(0, hosts[4])
    assert list(model.blocks) == [hosts[4], hosts[1], hosts[0], *hosts[2:4], hosts[1]]
    lifted.blocks[2] = copy.deepcopy(lifted.blocks[3])
    assert model.blocks[2] not in hosts and lifted.blocks[2].host is model.blocks[2]
    both_are_right(host, model, volume)
    model.blocks = nn.Sequential(*hosts)
    assert [block.host for block in lifted.blocks] == hosts and isinstance(lifted._modules["blocks"], Mirror)
    blocks = lifted.blocks
    del lifted.blocks
    assert not hasattr(model, "blocks") and "blocks" not in lifted._modules
    lifted.add_module("blocks", blocks)
    assert list(model.blocks) == hosts
    both_are_right(host, model, volume)
    assert isinstance(lifted._modules, Tree)


REFUSED = {
    "a list": lambda m: setattr(m, "blocks", nn.ModuleList(m.blocks)),
    "around the list": lambda m: setattr(m, "blocks", checkpoint_wrapper(m.blocks)),
    "by add_module": lambda m: m.add_module("blocks", nn.Sequential(*m.blocks)),
    "by _modules": lambda m: m._modules.update(norm=Around(m.blocks[0])),
    "around another": lambda m: m.blocks.__setitem__(0, Around(m.blocks[1])),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_stand_in_a_model_is_refused_before_damage(what):
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    before, shown = list(walk(model)), list(walk(lifted))
    with pytest.raises(TypeError, match=r"cannot be set to a module that holds lifted blocks; set blocks\[i\] one by"):
        REFUSED[what](lifted)
    assert list(walk(model)) == before and list(walk(lifted)) == shown
    both_are_right(host, model, volume)


def test_the_layers_of_a_model_that_calls_them_otherwise():
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make())
    lifted.blocks = lifted.blocks
    with pytest.raises(TypeError, match=r"blocks cannot be set to a module: it is an attribute of lifted models"):
        lifted.blocks = nn.ModuleList([nn.Identity()])
    assert "blocks" not in pcf.unlift(lifted)._modules


def test_blocks_that_are_spread_over_a_model():
    class Stages(ToyAdapter):
        @property
        def blocks(self):
            return [*self.model.blocks, *self.model.late]

    model = ToyViT(rope=False)
    model.late, model.blocks = model.blocks[2:], model.blocks[:2]
    lifted, volume = pcf.lift(model, adapter=Stages), torch.randn(1, 3, 2, 4, 6)
    expected = lifted(volume).patches
    around = Around(lifted.blocks[3])
    lifted.blocks[3] = around
    assert lifted.late[1] is around and torch.equal(lifted(volume).patches, expected) and around.calls == 1
    lifted.blocks[0] = new = copy.deepcopy(model.blocks[1])
    assert model.blocks[0] is new and lifted.blocks[0].host is new
    with pytest.raises(TypeError, match="blocks cannot be taken out here"):
        del lifted.blocks[0]
    model.register_module("head", None)  # no place for a block that is added
    with pytest.raises(TypeError, match="blocks cannot be added here"):
        lifted.blocks.append(copy.deepcopy(new))
    assert model.head is None and len(lifted.blocks) == 4


class Container(nn.ModuleList):
    """A container of blocks with something of its own."""

    factor = 2

    def twice(self):
        return self.factor * len(self)

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def test_containers_and_blocks_answer_as_the_hosts_do():
    model = ToyViT(rope=False)
    model.blocks = Container(model.blocks)
    model.blocks[1].note = "of the host"
    lifted = toy_lift(model)
    assert lifted.blocks.twice() == 8 and lifted.blocks[1].note == "of the host"
    lifted.blocks.factor, lifted.blocks[1].note = 3, "set"
    assert model.blocks.twice() == 12 and model.blocks[1].note == "set"
    del lifted.blocks[1].note
    assert not hasattr(model.blocks[1], "note") and not hasattr(lifted.blocks[1], "note")
    lifted.blocks.train()
    assert model.blocks[1].training and not model.blocks[0].training and not lifted.blocks[0].training
    with pytest.raises(AttributeError, match="nothing"):
        _ = lifted.blocks.nothing
