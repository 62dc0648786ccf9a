"""FSDP of both kinds on two processes, with checkpointing and compilation around blocks: as one process without."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import planecycle_fast as pcf

from ..host_models import BY_NAME

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")


def plain_name(name):
    return functools.reduce(lambda left, part: left.replace(part, ""), NAMES, name)


def each_block(lifted, change):
    for i, block in enumerate(list(lifted.blocks)):
        lifted.blocks[i] = change(block)


def checkpointed(lifted):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    each_block(lifted, checkpoint_wrapper)


def compiled(lifted):
    each_block(lifted, lambda block: torch.compile(block, backend="eager"))


def compiled_in_place(lifted):
    for block in lifted.blocks:
        block.compile(backend="eager")


def saved_on_cpu(lifted):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    each_block(lifted, offload_wrapper)


def fsdp2(reshard=None, blocks=1):
    def shard(lifted):
        from torch.distributed.fsdp import fully_shard

        held = list(lifted.blocks)
        for i in range(0, len(held), blocks):
            fully_shard(held[i : i + blocks] if blocks > 1 else held[i], reshard_after_forward=reshard)
        fully_shard(lifted, reshard_after_forward=reshard)

    return shard


def fsdp1(policy=None, size=None, original=True):
    def shard(lifted):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

        wrap = functools.partial(size_based_auto_wrap_policy, min_num_params=size)
        wrap = ModuleWrapPolicy({pcf.LiftedBlock}) if size is None else wrap
        return FullyShardedDataParallel(
            lifted, auto_wrap_policy=wrap, use_orig_params=original, device_id=torch.device("cpu")
        )

    return shard


def ddp(lifted):
    return torch.nn.parallel.DistributedDataParallel(lifted)


RECIPES = {  # in the order in which they are put around blocks
    "fsdp2, checkpointed": (checkpointed, fsdp2()),
    "fsdp1, checkpointed": (fsdp1(), checkpointed),
    "fsdp1 by blocks": (fsdp1(),),
    "fsdp2, compiled": (compiled_in_place, fsdp2()),
    "fsdp2 resharded": (fsdp2(reshard=True),),
    "fsdp2, torch.compile": (compiled, fsdp2()),
    "fsdp2, checkpointed, compiled": (checkpointed, compiled, fsdp2(reshard=True)),
    "fsdp2, compiled, checkpointed": (compiled_in_place, checkpointed, fsdp2()),
    "fsdp2 inside, checkpointed": (fsdp2(), checkpointed),
    "fsdp2 inside, compiled": (fsdp2(), compiled_in_place),
    "fsdp2 of pairs of blocks": (fsdp2(blocks=2),),
    "fsdp2, saved on the CPU": (saved_on_cpu, fsdp2()),
    "fsdp1 by size": (fsdp1(size=20_000),),
    "fsdp1 by a small size, checkpointed": (fsdp1(size=1000), checkpointed),
    "fsdp1, checkpointed before": (checkpointed, fsdp1()),
    "fsdp1, compiled": (compiled_in_place, fsdp1()),
    "fsdp1 without original parameters": (fsdp1(original=False),),
    "fsdp1 without original parameters, checkpointed": (fsdp1(original=False), checkpointed),
    "ddp": (ddp,),
    "ddp, checkpointed": (checkpointed, ddp),
}
QUICK = ("fsdp2, checkpointed", "fsdp1, checkpointed")


def trained(model, volume):
    """Features, and the features after one step of an optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    before = model(volume)
    (before.patches.square().mean() + before.pooled().sin().mean()).backward()
    gradients = {
        plain_name(name): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return before.patches.detach().clone(), gradients, model(volume).patches


def compare(recipe, name):
    host = BY_NAME[name]
    torch.manual_seed(0)
    depth = {"num_hidden_layers" if name.startswith("hf") else "depth": 3}
    model, volume = host.make(**depth), host.volume(1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, gradients, after = trained(pcf.lift(model), volume)
    assert (after - before).abs().max() > 1e-3
    model = host.make(**depth)
    model.load_state_dict(state)
    whole = lifted = pcf.lift(model)
    for change in RECIPES[recipe]:
        whole = change(lifted) or whole
    for got, expected in zip(trained(whole, volume), (before, gradients, after)):
        if not isinstance(got, dict):
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
        elif "fsdp1" not in recipe:  # its gradients are shards of a flat parameter
            assert got.keys() == gradients.keys()
            for key, value in gradients.items():
                torch.testing.assert_close(got[key], value, rtol=0, atol=1e-6, msg=key)


def main(rank, store, name, *recipes):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    torch.set_num_threads(1)
    for recipe in recipes:
        compare(recipe, name)
        print("as one process:", recipe, flush=True)
    torch.distributed.destroy_process_group()


def on_two_processes(tmp_path, name, recipes):
    program = "import sys; from planecycle_fast.runtime.torchvision_fix import mend_torchvision; mend_torchvision(); "
    program += "from tests.integrations.test_sharding import main; main(*sys.argv[1:])"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), name, *recipes], cwd=root, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for run in runs:
            out, err = run.communicate(timeout=600)
            assert run.returncode == 0, err[-3000:]
            assert [line for line in out.splitlines() if "as one process" in line] == [
                f"as one process: {recipe}" for recipe in recipes
            ]
    finally:
        for run in runs:
            run.kill()


@pytest.mark.full
def test_sharded_blocks_that_are_checkpointed(tmp_path):
    on_two_processes(tmp_path, "hf-dinov2", QUICK)


@pytest.mark.full
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2", "timm-dinov2-s-reg4"])
def test_every_order_of_wrappers(tmp_path, name):
    on_two_processes(tmp_path, name, list(RECIPES))


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3", "facebook-stand-in"])
def test_a_2d_model_that_is_sharded_is_refused(alone, name):
    from torch.distributed.fsdp import fully_shard

    host = BY_NAME[name]
    model = host.make()
    earlier = pcf.lift(model)
    for block in earlier.adapter.blocks:
        fully_shard(block, mesh=alone)
    with torch.no_grad():  # blocks alone run as a whole, and gather their own weights
        assert pcf.lift(model)(host.volume(1)).patches.isfinite().all()
    fully_shard(model, mesh=alone)
    for lifted in (earlier, pcf.lift(model)):
        for run in (lifted, lifted.intermediate, lifted.attention_maps):
            with pytest.raises(ValueError, match=r"fully_shard was called on: .* expected .* lift\(model\) first"):
                run(host.volume(1))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_other_methods_of_a_sharded_model(alone):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume(1)
    with torch.no_grad():
        expected = lifted.intermediate(volume, 2)[0].patches
        fully_shard(lifted, mesh=alone)
        for method in ("intermediate", "attention_maps"):
            asked = rf"{method} of a model .*register_fsdp_forward_method\(lifted, '{method}"
            with pytest.raises(ValueError, match=asked):
                getattr(lifted, method)(volume)
            register_fsdp_forward_method(lifted, method)
        assert torch.equal(lifted.intermediate(volume, 2)[0].patches, expected)
        assert lifted.attention_maps(volume)[0].cls.isfinite().all()


def test_blocks_that_are_not_called_hand_on_to_those_that_are_one_tensor():
    """Whichever blocks are wrapped: no parameter comes into or out of them."""
    host = BY_NAME["timm-dinov2-s-reg4"]
    lifted, seen = pcf.lift(host.make()), []
    for i in (1, 2, 4):
        lifted.blocks[i].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        lifted.blocks[i].register_forward_hook(lambda module, args, out: seen.append(out))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            lifted(host.volume(1))
    assert len(seen) == 12 and all(stream.branch is None and stream.scale is None for stream in seen)
    owned = {p.untyped_storage().data_ptr() for p in lifted.parameters()}
    assert not owned & {stream.residual.untyped_storage().data_ptr() for stream in seen}


def sharded(lifted, mesh, **settings):
    from torch.distributed.fsdp import fully_shard

    for block in lifted.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(lifted, mesh=mesh, **settings)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_mixed_precision_is_that_of_a_model_in_bfloat16(alone):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    host = BY_NAME["timm-dinov2-s-reg4"]
    model, volume = host.make(), host.volume(1)
    with torch.no_grad():
        expected = pcf.lift(copy.deepcopy(model).bfloat16(), backend="reference")(volume.bfloat16())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    lifted = sharded(pcf.lift(model, backend="reference"), alone, mp_policy=policy)
    features = lifted(volume)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    features.pooled().sum().backward()
    assert {p.grad.dtype for p in lifted.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_adapters_within_frozen_blocks_that_are_sharded(alone):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra integrations")
    host = BY_NAME["timm-dinov2-s-reg4"]
    model, volume = host.make().requires_grad_(False), host.volume(1)
    lifted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv", "fc2"]), pcf.lift(model))
    for name, p in lifted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected = trained(pcf.lift(copy.deepcopy(model)), volume)
    checkpointed(lifted)
    for got, wanted in zip(trained(sharded(lifted, alone), volume), expected):
        assert not isinstance(got, dict) or (got and all("lora" in name for name in got))
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.full
def test_a_sharded_model_from_meta_and_its_checkpoint(alone, tmp_path):
    """Weights by torch.distributed.checkpoint; the buffer that it does not hold is refused until it is filled."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume(1)
    with torch.no_grad():
        expected, periods = pcf.lift(model)(volume), model.rope.periods.clone()
        dcp.save(get_model_state_dict(sharded(pcf.lift(model), alone)), checkpoint_id=tmp_path / "saved")
        empty = host.make().to("meta")
        lifted = sharded(pcf.lift(empty), alone).to_empty(device="cpu")
        state = get_model_state_dict(lifted)
        assert state.keys() == model.state_dict().keys()
        dcp.load(state, checkpoint_id=tmp_path / "saved")
        set_model_state_dict(lifted, state)
        empty.rope.periods.fill_(0.5)
        with pytest.raises(ValueError, match=r"rope.periods has other values than the model's configuration gives"):
            lifted(volume)
        empty.rope.periods.copy_(periods)
        torch.testing.assert_close(lifted(volume), expected, rtol=0, atol=1e-5)
