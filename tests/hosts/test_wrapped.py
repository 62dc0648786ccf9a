"""Hosts as frameworks leave them: every module that adapters read or call, plain, wrapped, parametrised, quantised."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

import planecycle_fast as pcf
from planecycle_fast.hosts.wrapped import own_class, read, unwrapped

from ..host_models import BY_NAME
from .test_hosts import all_tokens, host_features

HOSTS = ["timm-dinov2-s", "timm-dinov3-s", "timm-dinov3-s-qkvb", "facebook-stand-in"]
HOSTS += [name for name in ("facebook-mlp",) if name in BY_NAME]
OUTER = ["patch_embed", "patch_embed.proj", "pos_drop", "norm_pre", "norm", "rope", "blocks"]
INNER = ["norm1", "attn", "attn.qkv", "attn.proj", "ls1", "drop_path1", "mlp", "mlp.fc1", "mlp.act"]  # of a block


class Own(nn.Module):
    """Somebody's own wrapper, which computes something else."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.tensor(1.3))

    def forward(self, *args, **settings):
        return self.gain * self.inner(*args, **settings)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.3


def put(around):
    def change(model, name):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, around(model.get_submodule(name)))

    return change


def lora(model, name, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False, **settings)
    peft.inject_adapter_in_model(config, model)


def trained_as_a_whole(model, name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["blocks.0.mlp.fc2"], modules_to_save=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for p in model.get_submodule(name).modules_to_save["default"].parameters():
            p.mul_(1.2)


def parametrised(model, name):
    module = model.get_submodule(name)
    for each, _ in list(module.named_parameters(recurse=False)):
        parametrize.register_parametrization(module, each, Scaled())


def quantised(model, name):
    put(lambda m: torch.ao.quantization.quantize_dynamic(nn.Sequential(m), {nn.Linear})[0])(model, name)


KINDS = {  # and the modules that each can be put around
    "lora": (lora, ("patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1")),
    "dora": (lambda model, name: lora(model, name, use_dora=True), ("patch_embed.proj", "attn.qkv")),
    "trained as a whole": (trained_as_a_whole, ("patch_embed", "patch_embed.proj", "norm", "norm1", "attn", "mlp")),
    "own wrapper": (
        put(Own),
        ("patch_embed.proj", "pos_drop", "norm_pre", "norm", "norm1", "attn.proj", "drop_path1", "mlp"),
    ),
    "weight norm": (lambda m, n: parametrizations.weight_norm(m.get_submodule(n)), ("patch_embed.proj", "attn.qkv")),
    "weight norm, old": (lambda m, n: nn.utils.weight_norm(m.get_submodule(n)), ("patch_embed.proj", "attn.qkv")),
    "parametrised": (parametrised, ("", "patch_embed.proj", "norm", *INNER)),
    "compiled": (put(lambda m: torch.compile(m, backend="eager")), ("patch_embed", "rope", "blocks", "attn", "ls1")),
    "checkpointed": (put(checkpoint_wrapper), (*OUTER[:-1], *INNER)),
    "quantised": (quantised, ("attn.proj", "attn.qkv", "mlp.fc1")),
    "scripted": (put(torch.jit.script), ("patch_embed.proj", "norm", "norm1", "attn.qkv", "mlp.fc1", "mlp.act")),
}


LACKS = {  # what a family has not, or its own forward does not call
    "timm-dinov2-s": ("rope",),
    "timm-dinov3-s": ("ls1", "blocks"),
    "facebook": ("pos_drop", "norm_pre", "rope", "blocks", "drop_path1"),
}


TRAINS = ("lora", "dora", "own wrapper", "trained as a whole")
SLOW = ("compiled", "dora", "weight norm, old", "scripted")


def cases():
    """Host, kind, module; in make test all of the first host, and of the others what is outside the blocks."""
    for host in HOSTS:
        lacks = next(names for family, names in LACKS.items() if host.startswith(family))
        for kind, (_, modules) in KINDS.items():
            for module in modules:
                if module in lacks or (host == "facebook-stand-in" and (kind, module) == ("scripted", "norm")):
                    continue
                inner = module in INNER
                full = [pytest.mark.full] if inner and (host != HOSTS[0] or kind in SLOW) else []
                yield pytest.param(host, kind, f"blocks.1.{module}" if inner else module, marks=full)


def expected_of(host, model, volume):
    """By the host, which is told to call qkv where it else passes its bare weight to a function."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if "qkv_bias_separate" in vars(module):
            module.qkv_bias_separate = True
    return host_features(host, model, volume)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name, kind, module", list(cases()))
def test_wrapped_modules_are_called_and_trained(name, kind, module):
    host = BY_NAME[name]
    model, volume = host.make(depth=2).eval(), host.volume(batch=1, depth=3, grid=(2, 3))
    with torch.no_grad():
        plain = host_features(host, model, volume)
        KINDS[kind][0](model, module)
        expected = expected_of(host, model.eval(), volume)
        assert not (changes(kind, module) and torch.allclose(expected, plain, atol=1e-6))
        for backend in ("reference", "cpu"):
            got = all_tokens(pcf.lift(model, mode="slice2d", backend=backend, strict=False)(volume))
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    if kind == "quantised":
        return
    lifted = pcf.lift(model).train()
    lifted(volume).patches.square().mean().backward()
    added = [p for n, p in model.named_parameters() if any(a in n for a in ("lora_", ".gain", "modules_to_save"))]
    assert all(p.grad is not None and p.grad.any() for p in added) and bool(added) == (kind in TRAINS)


def changes(kind, module):
    """Whether the model's features must change, so that a module that is not called shows."""
    if kind == "parametrised":
        return module.rpartition(".")[2] not in ("attn", "drop_path1", "mlp", "act")  # without parameters of their own
    return kind in TRAINS


@pytest.mark.parametrize("name", ["timm-dinov2-s", "facebook-stand-in"])
def test_lora_on_all_that_is_called_qkv_or_proj(name):
    peft = pytest.importorskip("peft")
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    assert type(model.patch_embed.proj).__module__.startswith("peft.")
    with torch.no_grad():
        got = all_tokens(pcf.lift(model, mode="slice2d")(volume))
        torch.testing.assert_close(got, host_features(host, model, volume), rtol=0, atol=1e-5)


def test_lora_on_the_patch_embedding_of_the_authors_model(build):
    peft = pytest.importorskip("peft")
    model, volume = build(), torch.randn(1, 3, 3, 8, 12)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False), model)
    with torch.no_grad():
        expected = model.forward_features(volume)["x_norm_patchtokens"]
        pcf.accelerate(model)
        torch.testing.assert_close(model.forward_features(volume)["x_norm_patchtokens"], expected, rtol=0, atol=1e-5)
        model.report()


def test_what_would_be_left_out_is_refused():
    vit, eva, facebook = (BY_NAME[n].make(depth=1) for n in ("timm-dinov2-s", "timm-dinov3-s", "facebook-stand-in"))
    vit.blocks = Own(vit.blocks)
    with pytest.raises(ValueError, match=r"model\.blocks are within a Own, whose own code .*; expected a Sequential"):
        pcf.lift(vit)
    eva.rope = Own(eva.rope)
    with pytest.raises(ValueError, match="model must be of a supported class"):
        pcf.lift(eva)
    facebook.rope_embed = Own(facebook.rope_embed)
    with pytest.raises(ValueError, match=r"model\.rope_embed is a Own, whose angles on other planes are not known"):
        pcf.lift(facebook)
    with pytest.raises(ValueError, match=r"model\._orig_mod is supported: lift that"):
        pcf.lift(torch.compile(BY_NAME["timm-dinov2-s"].make(depth=1), backend="eager"))


def test_reading_a_module():
    conv = nn.Conv2d(5, 2, 1)
    for wrapped in (conv, Own(conv), checkpoint_wrapper(conv), torch.compile(conv), nn.DataParallel(conv)):
        assert read(nn.Sequential(wrapped), "in_channels", 3) == 5
        assert unwrapped(wrapped) is (wrapped if isinstance(wrapped, Own) else conv)
    parametrised(conv, "")
    assert type(conv) is not nn.Conv2d and own_class(conv) is nn.Conv2d
    assert read(nn.Sequential(nn.Linear(1, 1)), "in_channels", 3) == 3
