"""Hugging Face: what frameworks leave in place of modules that adapters read, and another convolution.

LoRA, PEFT's copies, torch.compile, activation checkpointing, parametrisation, quantised weights.
"""

import pytest
import torch
from torch import nn

import planecycle_fast as pcf

from ..host_models import BY_NAME
from .test_hosts import all_tokens, host_features
from .test_more_hosts_hf import core


def convolution(model):
    """Where the patch embedding is: its parent, and its name there."""
    found = core(model).embeddings
    name = next(name for name, m in found.named_modules() if isinstance(m, nn.Conv2d))
    return found.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]


def lora(model):
    peft = pytest.importorskip("peft")
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    config = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    parent, name = convolution(model)
    assert "lora" in type(getattr(parent, name.split(".")[0])).__module__ or "lora" in type(parent).__module__


def to_save(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query"], modules_to_save=["embeddings"])
    peft.inject_adapter_in_model(config, model)
    assert type(core(model).embeddings).__name__ == "ModulesToSaveWrapper"


class Rounded(nn.Module):
    """Weights kept as whole numbers, in the manner of a quantisation."""

    def forward(self, whole):
        return whole.float() / 100


def quantised(model):
    parent, name = convolution(model)
    conv = getattr(parent, name)
    conv.weight = nn.Parameter((conv.weight.detach() * 100).round().to(torch.int8), requires_grad=False)
    nn.utils.parametrize.register_parametrization(conv, "weight", Rounded(), unsafe=True)


def parametrised(model):
    parent, name = convolution(model)
    nn.utils.parametrizations.weight_norm(getattr(parent, name))


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


def compiled(module):
    return torch.compile(module, backend="eager")


def wrapped(part, wrap):
    def change(model):
        parent, name = (core(model), "embeddings") if part == "embeddings" else convolution(model)
        setattr(parent, name, wrap(getattr(parent, name)))

    return change


def another_norm(model):
    """Final norms in a wrapper, where there are some."""
    for name in ("norm", "layernorm", "post_layernorm"):
        if hasattr(core(model), name):
            setattr(core(model), name, compiled(getattr(core(model), name)))


WRAPPED = {
    "LoRA": lora,
    "modules to save": to_save,
    "quantised": quantised,
    "parametrised": parametrised,
    "checkpointed convolution": wrapped("convolution", checkpointed),
    "checkpointed embeddings": wrapped("embeddings", checkpointed),
    "compiled convolution": wrapped("convolution", compiled),
    "compiled embeddings": wrapped("embeddings", compiled),
    "compiled norm": another_norm,
}
WRAPPED_HOSTS = ["hf-dinov3", "hf-dinov2-registers", "hf-vit", "hf-clip", *(
    pytest.param(name, marks=pytest.mark.full) for name in ("hf-mae", "hf-ijepa", "hf-siglip", "hf-dinov2-backbone")
)]  # fmt: skip


@pytest.mark.parametrize("change", WRAPPED)
@pytest.mark.parametrize("name", WRAPPED_HOSTS)
def test_modules_that_adapters_read_may_be_wrapped(name, change, on_reference):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(depth=2)
    with torch.no_grad():
        plain = host_features(host, model, volume)
        early = pcf.lift(model, mode="slice2d")
        WRAPPED[change](model.eval())
        expected = host_features(host, model, volume)
        for lifted in (early, pcf.lift(model, mode="slice2d")):
            assert torch.equal(all_tokens(lifted(volume)), expected)
    if change in ("LoRA", "quantised"):  # which change what is computed
        assert not torch.equal(plain, expected)


@pytest.mark.parametrize("wrap", [checkpointed, pytest.param(compiled, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["hf-dinov3", "hf-dinov2-swiglu", "hf-vit", "hf-clip-gelu", "hf-siglip"])
def test_every_module_of_a_block_may_be_wrapped(name, wrap, on_reference):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(batch=1, depth=2)
    block = pcf.lift(model).adapter.blocks[1]
    with torch.no_grad():
        expected = host_features(host, model, volume)
        for path in [path for path, _ in block.named_modules() if path]:
            parent, at = block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            plain = getattr(parent, at)
            setattr(parent, at, wrap(plain))
            torch._dynamo.reset()
            assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), expected), path
            setattr(parent, at, plain)


@pytest.mark.parametrize("name", ["hf-dinov3", "hf-dinov2", "hf-vit", "hf-clip", "hf-siglip"])
def test_lora_on_the_patch_embedding_is_trained(name):
    host = BY_NAME[name]
    model, volume = host.make().bfloat16(), host.volume(depth=2, dtype=torch.bfloat16)
    lora(model)
    lifted = pcf.lift(model)
    lifted(volume).patches.float().square().mean().backward()
    found = {key: p.grad for key, p in lifted.named_parameters() if "lora" in key}
    assert len(found) == 2 and all(grad is not None and grad.any() for grad in found.values())


@pytest.mark.parametrize("name", ["hf-dinov3", "hf-clip", "hf-siglip", "hf-vit", "hf-dinov2"])
def test_channels_are_those_of_the_convolution(name, on_reference):
    """Somebody's own convolution for one channel, as for CT: the configuration still says three."""
    host = BY_NAME[name]
    model = host.make()
    parent, at = convolution(model)
    old = getattr(parent, at)
    setattr(parent, at, nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None))
    if hasattr(parent, "num_channels"):  # these check it
        parent.num_channels = 1
    volume = host.volume(depth=2)[:, :1]
    assert model.config.num_channels == 3
    with torch.no_grad():
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume))
    with pytest.raises(ValueError, match=r"must have shape \(B, 1, D, height, width\), got \(2, 3, 2,"):
        pcf.lift(model)(host.volume(depth=2))
