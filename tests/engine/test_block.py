"""Blocks on the residual stream: the host's result whatever is done to its parts, and a report that says what runs."""

import copy

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.hosts import find_adapter
from planecycle_fast.ops.choice import OPERATIONS
from planecycle_fast.runtime import backends
from planecycle_fast.runtime.attentions import check_attention

from ..host_models import BY_NAME, HOSTS
from ..hosts.test_hosts import all_tokens, host_features
from ..test_lift_parity import globals_of, naive_of_host
from ..toy import ToyViT, toy_lift

pytestmark = pytest.mark.usefixtures("on_reference")

NAMES = ["hf-dinov3", "hf-dinov3-gated", "hf-dinov2-swiglu", "timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov3-s+",
         "timm-dinov2-s-reg4", "timm-dinov2-g", "facebook-stand-in", "facebook-stand-in-untied"]  # fmt: skip
families = pytest.mark.parametrize("host", [BY_NAME[name] for name in NAMES], ids=lambda h: h.name)


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_part_of_every_host_is_replaced(host):
    lifted = pcf.lift(host.make())
    assert [block.kept for block in lifted.descriptions()] == [{}] * len(lifted.blocks)


def modules(block, *names):
    """The first attribute of a block that it has."""
    return next(getattr(block, name) for name in names if hasattr(block, name))


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.5


def attention_of(block):
    return modules(block, "attn", "attention")


def double(module, args, out):
    if isinstance(out, list):  # facebookresearch's own forward
        return [2 * t for t in out]
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


def replace_norm(block):
    block.norm1 = OwnNorm(64, eps=block.norm1.eps)


def replace_activation(block):
    mlp = block.mlp
    name = next(n for n in ("act_fn", "activation_fn", "act") if hasattr(mlp, n))
    setattr(mlp, name, nn.ReLU())


def patch_mlp(block):
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 2 * forward(x)


def hook_scale(block):
    scale = modules(block, "ls2", "layer_scale2")
    scale.register_forward_hook(double)


def train_with_drop_path(block):
    block.train()


CHANGES = {  # what is done to a block: how, and which part the host then runs
    "norm1 of an unknown kind": (replace_norm, "norm1"),
    "hook on norm2": (lambda block: block.norm2.register_forward_hook(double), "norm2"),
    "hook on attention": (lambda block: attention_of(block).register_forward_hook(double), "attention"),
    "pre-hook on attention": (
        lambda block: attention_of(block).register_forward_pre_hook(
            lambda m, args, kwargs: ((2 * args[0], *args[1:]), kwargs), with_kwargs=True
        ),
        "attention",
    ),
    "unknown activation": (replace_activation, "mlp"),
    "patched mlp": (patch_mlp, "mlp"),
    "hook on LayerScale": (hook_scale, "scale2"),
    "hook on the block": (lambda block: block.register_forward_hook(double), "block"),
}


@pytest.mark.parametrize("change", CHANGES)
@families
def test_a_part_that_cannot_be_replaced_is_the_hosts(host, change):
    model, volume = host.make(), host.volume()
    apply, part = CHANGES[change]
    block = pcf.lift(model).adapter.blocks[1]
    if change == "hook on LayerScale" and not (hasattr(block, "ls2") or hasattr(block, "layer_scale2")):
        pytest.skip("its LayerScale is a parameter")
    if change == "unknown activation" and not any(hasattr(block.mlp, n) for n in ("act_fn", "activation_fn", "act")):
        pytest.skip("its activation is a function")
    with torch.no_grad():
        plain = host_features(host, model, volume)
        apply(block)
        lifted = pcf.lift(model, mode="slice2d")
        expected = host_features(host, model, volume)
        assert not torch.allclose(expected, plain, atol=1e-3)
        assert torch.equal(all_tokens(lifted(volume)), expected)
    assert [list(block.kept) for block in lifted.descriptions()] == [[], [part], [], [], []]


@families
def test_hooks_on_linear_layers_see_what_they_return(host):
    """These are called; and what they return is not written to while a hook may hold it."""
    model, volume, seen = host.make(), host.volume(), []
    lifted = pcf.lift(model, mode="slice2d")
    linears = [m for m in lifted.adapter.blocks[0].modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out)))
    with torch.no_grad():
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))
        assert lifted.descriptions()[0].kept == {}
        ours = seen[: len(linears)] if "qkvb" not in host.name else [s for s in seen if s[0] in linears][: len(linears)]
        assert {id(m) for m, *_ in ours} == {id(m) for m in linears}
        for linear, x, out in ours:
            handles = copy.copy(linear._forward_hooks)
            linear._forward_hooks.clear()
            assert torch.equal(out, linear(x)), linear
            linear._forward_hooks.update(handles)


@pytest.mark.parametrize("drop", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_that_is_active_runs_the_hosts_part(drop):
    host = BY_NAME["timm-dinov2-s"]
    lifted = pcf.lift(host.make(**{drop: 0.3}))
    assert all(block.kept == {} for block in lifted.eval().descriptions())
    parts = {"proj_drop_rate": {"attention", "mlp"}, "attn_drop_rate": {"attention"}}.get(drop, {"scale1", "scale2"})
    found = lifted.train().descriptions()[-1].kept
    assert set(found) == parts and all("it drops 0.3 in training" in reason for reason in found.values())


def test_other_attentions_of_hugging_face_are_kept():
    host = BY_NAME["hf-dinov3"]
    model, volume = host.make(), host.volume()
    model.set_attn_implementation("eager")
    lifted = pcf.lift(model, mode="slice2d")
    assert {tuple(block.kept) for block in lifted.descriptions()} == {("attention",)}
    assert "the model's attention is 'eager'; only 'sdpa' is replaced" in lifted.descriptions()[0].kept["attention"]
    with torch.no_grad():
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))


def test_attentions_by_name():
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    with torch.no_grad():
        expected = pcf.lift(model)(volume).patches
        assert torch.equal(pcf.lift(model, attention="sdpa")(volume).patches, expected)
        got = pcf.lift(model, attention="reference")(volume).patches
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_attention_by_name_never_falls_back():
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, attention="reference")
    lifted(volume)
    model.blocks[2].attn.register_forward_hook(lambda *_: None)
    message = (
        "attention 'reference' would leave block 2's attention to the model's own code: EvaAttention: it has hooks"
    )
    with pytest.raises(ValueError, match=message):
        lifted(volume)
    pcf.lift(model, attention="reference", strict=False)(volume)
    pcf.lift(model)(volume)
    with pytest.raises(
        ValueError, match="attention 'sdpa' would leave block 0's block to .* does not take blocks apart"
    ):
        toy_lift(ToyViT(rope=False), attention="sdpa")(torch.randn(1, 3, 2, 4, 6))


needs_cpu = pytest.mark.skipif(pcf.backends()["cpu"] is not None, reason=f"{pcf.backends()['cpu']}")


@needs_cpu
def test_a_backend_by_name_never_falls_back(capsys):
    host = BY_NAME["timm-dinov3-s+"]  # SwiGLU
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, backend="cpu")
    lifted(volume)
    model.blocks[3].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="backend 'cpu' would leave block 3's norm2 to the model's own code: it has h"):
        lifted(volume)
    with pcf.use_backend("cpu"), pytest.raises(ValueError, match="backend 'cpu' would leave block 3's norm2"):
        pcf.lift(model)(volume)
    pcf.lift(model, backend="cpu", strict=False)(volume)
    lifted = toy_lift(ToyViT(rope=False), backend="cpu")  # an adapter that takes no block apart promises nothing
    lifted(torch.randn(1, 3, 2, 4, 6))


@needs_cpu
@pytest.mark.parametrize("missing", OPERATIONS)
def test_a_backend_without_an_operation(monkeypatch, missing):
    monkeypatch.setitem(backends.LACKS, "cpu", (missing, "patchify"))
    host = BY_NAME["timm-dinov3-s+"]  # SwiGLU
    model, volume = host.make(), host.volume()
    with pytest.raises(ValueError, match=f"backend 'cpu' is not usable: it has no {missing} yet; usable: .*reference"):
        pcf.lift(model, backend="cpu")(volume)
    with torch.no_grad():
        got = pcf.lift(model, backend="cpu", strict=False)(volume).patches
        torch.testing.assert_close(got, pcf.lift(model, backend="reference")(volume).patches)


def test_report(capsys):
    host = BY_NAME["timm-dinov2-s"]
    model = host.make()
    lifted = pcf.lift(model)
    lifted.report()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["blocks", "part"], *[["0-4", part] for part in ("plane_switch", "attention", "add_norm", "mlp")]
    ]  # fmt: skip
    assert lines[1].split()[2] == "reference" and lines[2].endswith("rope: reference, attention: sdpa")
    model.blocks[2].norm1.register_forward_hook(lambda *_: None)
    model.blocks[2].mlp.register_forward_hook(lambda *_: None)
    model.blocks[3].register_forward_hook(lambda *_: None)
    lifted.report()
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if not line.startswith(("0-1", "4"))]
    assert "norm1: it has hooks" in lines[1] and lines[1].split()[:3] == ["2", "plane_switch", "reference"]
    assert "the model's own" in lines[4] and "mlp: Mlp: it has hooks" in lines[4]
    assert lines[5].split()[:3] == ["3", "planes", "reference"]
    assert lines[6].split()[:2] == ["3", "block"] and "the model's own" in lines[6] and "it has hooks" in lines[6]
    toy_lift(ToyViT()).report()
    assert "its adapter does not take blocks apart" in capsys.readouterr().out


def test_report_of_an_accelerated_model(build, capsys):
    model = pcf.accelerate(build())
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.report()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"blocks", "0", "1", "2-4"}
    (why,) = [line for line in lines if line.split()[:2] == ["1", "block"]]
    assert "the model's own" in why and "it, or its plane change, is watched or wrapped" in why
    assert not hasattr(pcf.restore(model), "report") or model.__dict__.get("report") is None


GRADIENTS = [BY_NAME[name] for name in ("hf-dinov3", "timm-dinov3-s-qkvb", "timm-dinov2-s", "facebook-stand-in")]


@pytest.mark.parametrize("host", GRADIENTS, ids=lambda h: h.name)
def test_gradients_under_autocast_are_as_good_as_the_plain_codes(host):
    """float32 parameters under bfloat16 autocast: every gradient at most twice as far from float64 as theirs."""
    model, volume, settings = host.make(), host.volume(depth=6), (("DW", "HW", "DH"), "PCg", "depth")

    def gradients(run, dtype):
        model.to(dtype).zero_grad()
        patches, globals_ = run(volume.to(dtype))
        (patches.double().square().mean() + globals_.double().mul(1.7).sin().mean()).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    def naive(volume):
        return naive_of_host(host, model, volume, (6, 3, 5), "planecycle", settings)

    def ours(volume):
        features = pcf.lift(model, cycle_order=settings[0])(volume)
        return features.patches, globals_of(features)

    exact = gradients(naive, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, got = gradients(naive, torch.float32), gradients(ours, torch.float32)
    assert got.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        allowed = 2 * (theirs[name] - truth).abs().mean() + 1e-7 * truth.abs().mean()
        assert (got[name] - truth).abs().mean() <= allowed + 1e-12, name


@pytest.mark.parametrize("host", GRADIENTS, ids=lambda h: h.name)
def test_gradients_in_float64_are_the_plain_codes(host):
    model, volume, settings = host.make().double(), host.volume(dtype=torch.float64), (("DW", "DH"), "PCm", "plane")

    def gradients(patches, globals_):
        model.zero_grad()
        (patches.square().mean() + globals_.sin().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    features = pcf.lift(model, cycle_order=settings[0], pool_method="PCm", globals_at="plane")(volume)
    got = gradients(features.patches, globals_of(features))
    theirs = gradients(*naive_of_host(host, model, volume, (4, 3, 5), "planecycle", settings))
    assert got.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6, msg=name)  # RoPE tables are float32


def test_checks_come_before_any_work(monkeypatch):
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make(), attention="sdpa")
    lifted.adapter.blocks[4].attention.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(lifted.adapter, "embed_parts", lambda images: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="block 4's attention"):
        lifted(BY_NAME["hf-dinov2"].volume())


def test_names_are_checked_when_lifting():
    with pytest.raises(ValueError, match="attention 'triton' is not usable: no CUDA device was found; us"):
        check_attention("triton")


@pytest.mark.parametrize("method", ["embed", "call_block", "norm"])
def test_a_subclass_of_a_familys_adapter_is_obeyed(method):
    """What it overrides is not bypassed by the stream's shortcuts."""
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make(), host.volume()
    family = find_adapter(model)

    def doubled(self, *args):
        return 2 * getattr(family, method)(self, *args)

    own = type("Own", (family,), {method: doubled})
    with torch.no_grad():
        plain, got = pcf.lift(model, mode="slice2d")(volume), pcf.lift(model, mode="slice2d", adapter=own)(volume)
        if method == "norm":
            torch.testing.assert_close(got.patches, 2 * plain.patches)
        assert not torch.allclose(got.patches, plain.patches, atol=1e-3)
    blocks = pcf.lift(model, adapter=own).descriptions()
    assert all((block.whole is not None) == (method == "call_block") for block in blocks)
