"""What walks through a model and writes what it found, or something else, in its place."""

import copy

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from ..engine.test_module_tree import both_are_right, walk
from ..host_models import BY_NAME
from ..hosts.test_hosts import all_tokens

families = pytest.mark.parametrize("name", ["hf-dinov2", "hf-dinov3", "timm-dinov3-s", "facebook-stand-in"])


def loop_of_children(module):
    """As bitsandbytes, and many others, replace linear layers."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Noted(child))
        else:
            setattr(module, name, loop_of_children(child))
    return module


def loop_of_modules(module):
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = Noted(child) if isinstance(child, nn.Linear) else loop_of_modules(child)
    return module


def by_submodule(module):
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, Noted(child))


class Noted(nn.Linear):
    """A layer in place of another."""

    def __init__(self, other):
        super().__init__(other.in_features, other.out_features, device="meta")
        self.weight, self.bias = other.weight, other.bias
        for name, buffer in other.named_buffers():  # LinearKMaskedBias
            self.register_buffer(name, buffer)

    def forward(self, x):
        mask = getattr(self, "bias_mask", None)
        return nn.functional.linear(x, self.weight, self.bias if mask is None else self.bias * mask.to(x.dtype))


def convert(module):
    nn.SyncBatchNorm.convert_sync_batchnorm(module)


def timms_convert(module):
    pytest.importorskip("timm.layers", reason="needs timm").convert_sync_batchnorm(module)


def freeze(module):
    utils, layers = [pytest.importorskip(f"timm.{name}", reason="needs timm") for name in ("utils", "layers")]
    names = [name for name, child in module.named_modules() if isinstance(child, pcf.LiftedBlock)]
    utils.freeze(module, names[:2])
    assert [b.requires_grad for b in module.blocks[1].parameters()].count(True) == 0
    utils.unfreeze(module, names[:2]), layers.freeze_batch_norm_2d(module), layers.unfreeze_batch_norm_2d(module)


NOTHING = {"SyncBatchNorm": convert, "timm's SyncBatchNorm": timms_convert, "timm's freeze": freeze}
REPLACES = {"children": loop_of_children, "_modules": loop_of_modules, "set_submodule": by_submodule}


@families
@pytest.mark.parametrize("what", NOTHING)
@torch.no_grad()
def test_what_finds_nothing_changes_nothing(name, what):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    expected, before, shown = lifted(volume).patches, list(walk(model)), list(walk(lifted))
    NOTHING[what](lifted)
    assert list(walk(model)) == before and list(walk(lifted)) == shown
    assert torch.equal(lifted(volume).patches, expected)
    both_are_right(host, model, volume)


@families
@pytest.mark.parametrize("what", REPLACES)
@torch.no_grad()
def test_loops_that_replace_linear_layers(name, what):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    keys, expected = list(model.state_dict()), lifted(volume).patches
    REPLACES[what](lifted)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and {type(m) for m in linears} == {Noted} and list(lifted.state_dict()) == keys
    torch.testing.assert_close(lifted(volume).patches, expected, rtol=0, atol=1e-5)
    both_are_right(host, model, volume)


class Normed(nn.Module):
    """A head with norms over a batch, behind a lifted model."""

    def __init__(self, lifted):
        super().__init__()
        self.backbone, self.head = lifted, nn.Sequential(nn.BatchNorm3d(64), nn.Conv3d(64, 2, 1))


@pytest.mark.parametrize("way", [convert, timms_convert])
def test_norms_around_and_within_are_converted(way):
    host = BY_NAME["timm-dinov3-s"]
    model = host.make()
    model.patch_embed.norm = nn.BatchNorm1d(64)
    whole = Normed(pcf.lift(model))
    before = len(list(whole.modules()))
    way(whole)
    assert isinstance(whole.head[0], nn.SyncBatchNorm) and len(list(whole.modules())) == before
    assert isinstance(model.patch_embed.norm, nn.SyncBatchNorm)
    assert not any(isinstance(module, pcf.LiftedBlock) for module in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("inplace", [False, True])
@families
@torch.no_grad()
def test_quantize_dynamic(name, inplace):
    quantization = pytest.importorskip("torch.ao.quantization", reason="needs torch.ao, which torch may drop")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs fbgemm, torch's quantised linear layers on x86")
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    before, expected = list(walk(model)), lifted(volume).patches
    alone = quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    found = quantization.quantize_dynamic(lifted, {nn.Linear}, inplace=inplace)
    assert {type(m) for m in pcf.unlift(found).modules()} == {type(m) for m in alone.modules()}
    got = found(volume).patches
    torch.testing.assert_close(got, pcf.lift(alone)(volume).patches, rtol=0, atol=1e-6)
    assert not torch.equal(got, expected)
    if inplace:
        assert found is lifted and list(dict(found.named_modules())) == list(dict(model.named_modules()))
    else:
        assert list(walk(model)) == before and torch.equal(lifted(volume).patches, expected)
        both_are_right(host, model, volume)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["hf-dinov2", "timm-dinov3-s"])
@pytest.mark.parametrize("training", [False, True])
def test_observed_layers(name, training):
    """Static quantisation and quantisation-aware training begin with ranges from inf to -inf."""
    quantization = pytest.importorskip("torch.ao.quantization", reason="needs torch.ao, which torch may drop")
    host = BY_NAME[name]
    model, volume = host.make().train(training), host.volume()
    lifted = pcf.lift(model)
    expected = lifted(volume).patches
    for module in lifted.modules():
        if type(module) is nn.Linear:
            module.qconfig = getattr(quantization, "get_default_qat_qconfig" if training else "get_default_qconfig")()
    (quantization.prepare_qat if training else quantization.prepare)(lifted, inplace=True)
    ranges = {key: t for key, t in lifted.named_buffers() if key.endswith("min_val") and not t.isfinite().all()}
    got = lifted(volume).patches
    assert ranges and all(lifted.get_buffer(key).isfinite().all() for key in ranges)
    if not training:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hf-dinov2", "timm-dinov3-s"])
@torch.no_grad()
def test_torchao(name):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, from the extra 'integrations'")
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted, alone = pcf.lift(model), copy.deepcopy(model)
    quantization.quantize_(lifted, quantization.Int8WeightOnlyConfig())
    quantization.quantize_(alone, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(lifted(volume).patches, pcf.lift(alone)(volume).patches, rtol=0, atol=1e-6)
    both_are_right(host, model, volume)


@families
@torch.no_grad()
def test_parametrized_layers(name):
    from torch.nn.utils import parametrizations, parametrize

    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    path = [n for n, m in lifted.named_modules() if type(m) is nn.Linear][-1]
    expected = lifted(volume).patches
    parametrizations.spectral_norm(lifted.get_submodule(path))
    assert parametrize.is_parametrized(model.get_submodule(path))
    assert not torch.allclose(lifted(volume).patches, expected, atol=1e-3)
    both_are_right(host, model, volume)
    parametrize.remove_parametrizations(lifted.get_submodule(path), "weight")
    both_are_right(host, model, volume)


@families
@torch.no_grad()
def test_functional_call(name):
    host = BY_NAME[name]
    model, volume, other = host.make(), host.volume(), host.make()
    lifted = pcf.lift(model)
    before = lifted(volume).patches
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    got = torch.func.functional_call(lifted, state, (volume,)).patches
    torch.testing.assert_close(got, pcf.lift(other)(volume).patches, rtol=0, atol=1e-6)
    assert torch.equal(lifted(volume).patches, before)


@families
def test_lora_by_path_reaches_the_same_layers(name):
    peft = pytest.importorskip("peft", reason="needs peft, from the extra 'lora'")
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-2:]
    got = peft.get_peft_model(pcf.lift(model), peft.LoraConfig(r=2, target_modules=paths, init_lora_weights=False))
    tuned = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in got.named_modules() if "lora_A" in n}
    assert tuned == {*paths} and all(hasattr(model.get_submodule(path), "lora_A") for path in paths)
    with torch.no_grad():
        expected = all_tokens(pcf.lift(model)(volume))
        torch.testing.assert_close(all_tokens(got(volume)), expected, rtol=0, atol=1e-6)


def test_lightnings_summary_and_configure_model():
    lightning = pytest.importorskip("lightning", reason="needs lightning, from the extra 'integrations'")
    from lightning.pytorch.utilities.model_summary import ModelSummary

    host = BY_NAME["hf-dinov2"]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = None

        def configure_model(self):
            if self.backbone is None:
                self.backbone = pcf.lift(host.make())

    module = Module()
    module.configure_model()
    names = [name.removeprefix("backbone.") for name in ModelSummary(module, max_depth=-1).layer_names]
    assert names[1:] == [name for name, _ in module.backbone.named_modules()][1:]
    assert ModelSummary(module).total_parameters == sum(p.numel() for p in module.backbone.parameters())
    module.freeze()
    assert not any(p.requires_grad for p in pcf.unlift(module.backbone).parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["hf-dinov2", "timm-dinov3-s"])
def test_full_state_dict_of_fsdp1(name, checkpointed, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    expected, state = lifted(volume).patches, {key: t.clone() for key, t in model.state_dict().items()}
    if checkpointed:
        apply_activation_checkpointing(lifted, check_fn=lambda module: isinstance(module, pcf.LiftedBlock))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy, cpu = ModuleWrapPolicy({pcf.LiftedBlock}), torch.device("cpu")
        sharded = FullyShardedDataParallel(lifted, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
            saved = sharded.state_dict()
            assert list(saved) == list(state) and all(torch.equal(saved[key], state[key]) for key in state)
            assert sharded.load_state_dict({key: t.clone() for key, t in saved.items()}) == ([], [])
        torch.testing.assert_close(sharded(volume).patches, expected, rtol=0, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
