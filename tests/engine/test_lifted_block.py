"""Lifted blocks: in the tree of modules in place of the host's, and safe to wrap, shard and replace."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import planecycle_fast as pcf

from ..host_models import BY_NAME, EVERY_HOST
from ..hosts.test_hosts import all_tokens, host_features
from ..toy import ToyAdapter, ToyViT

NAMES = ["hf-dinov3", "hf-dinov2", "timm-dinov3-s", "timm-dinov2-s-reg4", "facebook-stand-in"]
families = pytest.mark.parametrize("host", [BY_NAME[name] for name in NAMES], ids=lambda h: h.name)


@pytest.mark.parametrize("host", EVERY_HOST)
def test_walking_through_a_lifted_model_meets_lifted_blocks(host):
    model = host.make()
    lifted = pcf.lift(model)
    ours, theirs = dict(lifted.named_modules()), dict(model.named_modules())
    assert list(ours) == list(theirs)
    found = [module for module in ours.values() if isinstance(module, pcf.LiftedBlock)]
    assert found == list(lifted.blocks) and len(found) == len(lifted.adapter.blocks)
    hosts = set(lifted.adapter.blocks)
    assert not hosts & set(ours.values()) and hosts <= set(theirs.values())
    reached = set()

    def walk(module):
        reached.add(module)
        for child in module.children():
            walk(child)

    walk(lifted)
    assert reached == set(ours.values())
    inside = {name: m for name, m in theirs.items() if m not in hosts and not any(b in hosts for b in m.children())}
    inside = {name: m for name, m in inside.items() if not any(b in hosts for b in m.modules())}
    assert all(ours[name] is module for name, module in inside.items())


def test_a_list_of_blocks_is_a_list():
    lifted = pcf.lift(BY_NAME["timm-dinov3-s"].make())
    blocks = lifted.blocks
    assert len(blocks) == 5 and blocks[-1] is list(blocks)[4] and list(blocks[1:3]) == [blocks[1], blocks[2]]
    assert blocks is lifted.blocks and blocks[0] is lifted.blocks[0]
    assert blocks.training == lifted.training
    lifted.train()
    assert blocks.training and blocks[0].training and pcf.unlift(lifted).blocks.training


def test_blocks_that_are_exchanged_in_the_host():
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    first, last = lifted.blocks[0], lifted.blocks[4]
    model.blocks[4] = copy.deepcopy(model.blocks[3])
    assert lifted.blocks[0] is first and lifted.blocks[4] is not last
    with torch.no_grad():
        assert torch.equal(lifted(volume).patches, pcf.lift(model)(volume).patches)
    del model.blocks[2:]
    assert len(lifted.blocks) == 2 and len(lifted.intermediate(volume, 2)) == 2
    assert not any("blocks.2" in name for name, _ in lifted.named_modules())


def test_blocks_that_are_no_modules_of_the_model():
    class Listed(ToyAdapter):
        def __init__(self, model):
            super().__init__(model)
            self.kept = [*model.blocks]

        @property
        def blocks(self):
            return self.kept

    model = ToyViT(rope=False)
    del model._modules["blocks"]
    model.__dict__["blocks"] = ToyViT(rope=False).blocks
    lifted = pcf.lift(model, adapter=Listed)
    assert len(lifted.blocks) == 4 and lifted(torch.randn(1, 3, 2, 4, 6)).patches.shape == (1, 2, 2, 3, 32)


def test_without_the_host_inside_it_is_small():
    """A pickled lifted model has every tensor once, although blocks stand in it twice."""
    lifted = pcf.lift(BY_NAME["hf-dinov3"].make())
    _ = lifted.blocks
    both, alone = io.BytesIO(), io.BytesIO()
    torch.save(lifted, both)
    torch.save(pcf.unlift(lifted), alone)
    assert both.tell() < 1.1 * alone.tell()
    both.seek(0)
    loaded = torch.load(both, weights_only=False)
    assert [block.host for block in loaded.blocks] == list(loaded.adapter.blocks)
    assert all(a is b for a, b in zip(loaded.parameters(), pcf.unlift(loaded).parameters()))


def gradients(lifted, volume):
    lifted.zero_grad()
    torch.manual_seed(3)  # hosts draw in training
    features = lifted(volume)
    (features.patches.square().mean() + features.pooled().sin().mean()).backward()
    return {name: p.grad for name, p in pcf.unlift(lifted).named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@families
def test_activation_checkpointing_around_lifted_blocks(host, backend):
    """Bit for bit on the reference; kernels sum before the planes change instead of within, and round otherwise."""
    model, volume = host.make().train(), host.volume()
    lifted = pcf.lift(model, cycle_order=("DW", "HW"), backend=backend)
    expected, calls = gradients(lifted, volume), []
    apply_activation_checkpointing(lifted, check_fn=lambda module: isinstance(module, pcf.LiftedBlock))
    assert {type(block).__name__ for block in lifted.blocks} == {"CheckpointWrapper"}
    mlp = lifted.adapter.blocks[2].mlp
    first = next(m for m in mlp.modules() if isinstance(m, nn.Linear))  # computing again stops before the last
    first.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(lifted, volume)
    assert len(calls) == 2  # forward, and once more in backward
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) or backend == "auto"
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-8, msg=name)
    assert list(lifted.state_dict()) == list(model.state_dict())


def test_lifted_blocks_do_not_get_into_the_host():
    model = BY_NAME["timm-dinov3-s"].make()
    lifted = pcf.lift(model)
    lifted.blocks = lifted.blocks  # as some wrappers do
    assert not any(isinstance(m, pcf.LiftedBlock) for m in model.modules())
    with pytest.raises(TypeError, match=r"blocks cannot be set to a module that holds lifted blocks; set blocks\[i\]"):
        lifted.blocks = nn.ModuleList(lifted.blocks)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["hf-dinov3", "hf-dinov2"])
def test_the_hosts_own_checkpointing_of_both_kinds(name, reentrant):
    host = BY_NAME[name]
    model, volume = host.make().train(), host.volume().requires_grad_()
    expected = gradients(pcf.lift(model), volume)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(pcf.lift(model), volume)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.fixture
def mesh(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # what a linear layer returns is a view
@families
def test_fully_sharded_blocks(host, mesh):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    lifted, volume = pcf.lift(host.make(), cycle_order=("DW", "HW")), host.volume()
    expected = gradients(lifted, volume)
    for block in lifted.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(lifted, mesh=mesh)
    assert all(isinstance(block, FSDPModule) for block in lifted.blocks) and isinstance(lifted, FSDPModule)
    shards = [p for block in lifted.blocks for p in block.parameters()]
    assert all(type(p).__name__ == "DTensor" for p in shards)
    got = gradients(lifted, volume)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].full_tensor(), value, rtol=0, atol=1e-6, msg=name)
    assert all(block.kept == {} for block in lifted.descriptions())  # sharded, and still in parts
    optimizer = torch.optim.SGD(lifted.parameters(), 0.1)
    optimizer.step()
    after = gradients(lifted, volume)
    assert any((after[name].full_tensor() - expected[name]).abs().max() > 1e-4 for name in expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_fully_sharded_blocks_in_mixed_precision(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.no_grad():
        expected = lifted(volume).patches
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in lifted.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(lifted, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
    got = lifted(volume).patches
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
    got.square().mean().backward()
    assert all(p.grad is not None for p in lifted.blocks.parameters())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_attention_maps_of_sharded_blocks(mesh):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    host = BY_NAME["hf-dinov2"]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1)
    with torch.no_grad():
        expected = lifted.attention_maps(volume, 2)
        for block in lifted.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(lifted, mesh=mesh)
        register_fsdp_forward_method(lifted, "attention_maps")
        for got, before in zip(lifted.attention_maps(volume, 2), expected, strict=True):
            torch.testing.assert_close(got.cls, before.cls, rtol=0, atol=1e-6)


def test_a_block_is_called_once_per_layer_and_hands_on_no_parameter():
    host = BY_NAME["timm-dinov3-s"]
    lifted, calls = pcf.lift(host.make()), []
    for block in lifted.blocks:
        block.register_forward_hook(lambda m, args, out: calls.append((m, out)))
    lifted(host.volume())
    assert [m for m, _ in calls] == list(lifted.blocks)
    for _, out in calls:
        assert isinstance(out, pcf.Stream) and out.branch is None and out.scale is None
        assert not isinstance(out.residual, nn.Parameter) and out.residual.requires_grad


@families
def test_lora_on_every_linear_layer_of_the_blocks(host):
    peft = pytest.importorskip("peft")
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, mode="slice2d")
    linears = {n for b in lifted.adapter.blocks for n, m in b.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = peft.LoraConfig(r=2, target_modules=names, exclude_modules=r".*patch_embed.*", init_lora_weights=False)
    with torch.no_grad():
        plain = lifted(volume).patches
    peft.inject_adapter_in_model(config, lifted)
    with torch.no_grad():
        got, expected = all_tokens(lifted(volume)), host_features(host, model, volume)
        assert not torch.allclose(lifted(volume).patches, plain, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert all(block.kept == {} for block in lifted.descriptions())
    lifted(volume).patches.square().mean().backward()
    lora = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert len(lora) == 2 * 5 * len(linears) and all(p.grad is not None and p.grad.any() for p in lora.values())
