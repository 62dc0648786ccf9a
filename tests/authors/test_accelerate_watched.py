"""Accelerated models whose blocks are watched, wrapped or patched: everything sees what it saw before."""

import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import planecycle_fast as pcf

from .. import standins
from .test_accelerate import BLOCK_TYPES, VOLUME, assert_same, outputs


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda m, args, output: calls.append((m, args, output)))
    return calls


def test_hooks_on_a_converted_block_see_what_they_always_saw(build):
    model, volume = build(), torch.randn(VOLUME)
    watched, inner = calls_of(model.blocks[1]), calls_of(model.blocks[2].blk2d)
    outputs(model, volume)
    outputs(pcf.accelerate(model), volume)
    for theirs, ours in (watched, inner):
        assert theirs[0] is ours[0]
        torch.testing.assert_close(ours[1][0], theirs[1][0], rtol=0, atol=2e-5)
        torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=2e-5)
    assert watched[0][1][1] == watched[1][1][1] == (2, 3, 5, 3, 64)


def test_a_hook_that_changes_the_output_has_effect(build):
    model, volume = build(), torch.randn(VOLUME)
    model.blocks[1].register_forward_hook(lambda m, args, output: output * 2)
    model.blocks[2].register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    expected = outputs(model, volume)
    assert_same(outputs(pcf.accelerate(model), volume), expected, 1e-4)


def test_blocks_wrapped_for_checkpointing(build):
    model, volume = build(), torch.randn(VOLUME)
    expected = gradients(model, volume)
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "PlaneCycleBlock")
    calls = calls_of(model.blocks[0].blk2d.norm1)
    for got, theirs in zip(gradients(pcf.accelerate(model), volume), expected):
        torch.testing.assert_close(got, theirs, rtol=0, atol=2e-5)
    assert len(calls) == 2  # and once more in backward


def gradients(model, volume):
    model.zero_grad()
    outputs(model, volume)["x_norm_patchtokens"].square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("block_type", ["Slice2D", "Flatten3D"])
def test_hooks_on_plain_blocks_see_lists_in_forward_and_tensors_elsewhere(build, block_type):
    model, volume = build(block_type), torch.randn(VOLUME)
    calls = calls_of(model.blocks[1])
    for each in (model, pcf.accelerate(model)):
        outputs(each, volume)
        each.get_intermediate_layers(volume)
    for theirs, ours in (calls[::2], calls[1::2]):
        assert_same(ours[1], theirs[1])
        assert_same(ours[2], theirs[2])
    assert isinstance(calls[2][2], list) and isinstance(calls[3][2], torch.Tensor)


def backward_hook(block):
    block.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2, *inputs[1:]))


def patch_forward(block):
    forward = block.forward
    block.forward = lambda x, shape: forward(x, shape) * 2


def patch_rope(block):
    if hasattr(block, "_get_rope"):  # the authors' block
        block._get_rope = lambda shape: None
    else:
        patch_forward(block)


def compile_it(block):
    block.compile(backend=lambda graph, inputs: lambda *args: [t * 2 for t in graph(*args)])


def hook_the_op(block):
    block.planecycleop.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))


@pytest.mark.parametrize("watch", [backward_hook, patch_forward, patch_rope, compile_it, hook_the_op])
def test_whatever_is_done_to_a_block_has_effect(build, watch):
    model, volume = build(), torch.randn(VOLUME)
    if watch is hook_the_op and isinstance(model, standins.DinoVisionTransformer):
        pytest.skip("the stand-in's planecycleop only holds a setting")
    plain = gradients(model, volume)
    watch(model.blocks[1])
    expected = gradients(model, volume)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain, expected))
    for a, b in zip(gradients(pcf.accelerate(model), volume), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_global_hooks_see_every_block(build):
    model, volume, seen = pcf.accelerate(build()), torch.randn(VOLUME), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        outputs(model, volume)
    finally:
        handle.remove()
    assert [block for block in seen if any(block is b for b in model.blocks)] == list(model.blocks)


def test_replicas_are_refused(build):
    model = pcf.accelerate(build())
    with pytest.raises(TypeError, match="cannot be replicated by DataParallel; use DistributedDataParallel"):
        model._replicate_for_data_parallel()


def test_methods_that_something_wrapped_are_not_restored(build):
    model = pcf.accelerate(build())
    model.get_intermediate_layers = lambda *args: None
    with pytest.raises(ValueError, match="methods as accelerate left them, got another get_intermediate_layers"):
        pcf.restore(model)
    assert "forward_features_list" in model.__dict__


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_lora(build, block_type):
    peft = pytest.importorskip("peft")
    model, volume = build(block_type), torch.randn(VOLUME)
    fast = pcf.accelerate(copy.deepcopy(model))
    config = peft.LoraConfig(
        r=4, target_modules=["proj", "fc1"], exclude_modules=["patch_embed.proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    expected = outputs(peft.inject_adapter_in_model(config, model), volume)
    torch.manual_seed(0)
    assert_same(outputs(peft.inject_adapter_in_model(config, fast), volume), expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # the dictionary holds views, as it always did
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded_blocks(build, when, tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model, volume = build(), torch.randn(VOLUME)
        expected = gradients(model, volume)
        if when == "before":
            pcf.accelerate(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if when == "after":
            pcf.accelerate(model)
        for got, theirs in zip(gradients(model, volume), expected):
            torch.testing.assert_close(got.full_tensor(), theirs, rtol=0, atol=2e-5)
    finally:
        torch.distributed.destroy_process_group()
