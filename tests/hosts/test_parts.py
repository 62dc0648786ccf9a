"""What of a host counts as known: its library's own classes, with just the contents that they are known to have."""

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.hosts.known import known_activation, known_dropout, known_norm

from ..host_models import BY_NAME
from .test_hosts import all_tokens, host_features

pytestmark = pytest.mark.usefixtures("on_reference")

FAMILIES = ["hf-dinov3", "hf-dinov3-gated", "hf-dinov2", "hf-dinov2-swiglu", "hf-dinov2-registers",
            "timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov3-s+", "timm-dinov2-s", "timm-dinov2-g",
            "facebook-stand-in", "facebook-stand-in-untied"]  # fmt: skip


def attention_of(block):
    return block.attn if hasattr(block, "attn") else block.attention


def scale_of(block):
    return next((getattr(block, n) for n in ("ls1", "layer_scale1") if hasattr(block, n)), None)


def own_class(module, **members):
    """Makes a module's class somebody's own, of the same name."""
    module.__class__ = type(type(module).__name__, (type(module),), {"__module__": __name__} | members)


def doubled(forward):
    def own(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    return own


def own_forward(module):
    own_class(module, forward=doubled(type(module).forward))


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def replace_drops(block):
    for name in ("drop_path", "drop_path1", "drop_path2"):
        if hasattr(block, name):
            setattr(block, name, Half())


CHANGES = {  # what is done to a block: how, and the parts that the host then runs
    "attention of another forward": (lambda b: own_forward(attention_of(b)), {"attention"}),
    "attention with a norm of queries": (lambda b: attention_of(b).add_module("query_norm", Half()), {"attention"}),
    "attention with sinks": (lambda b: attention_of(b).register_parameter("sinks", nn.Parameter(torch.ones(2))),
                             {"attention"}),
    "attention with a table": (lambda b: attention_of(b).register_buffer("bias_table", torch.ones(2)), {"attention"}),
    "mlp of another forward": (lambda b: own_forward(b.mlp), {"mlp"}),
    "mlp with a norm": (lambda b: b.mlp.add_module("inner_norm", Half()), {"mlp"}),
    "LayerScale of another forward": (lambda b: own_forward(scale_of(b)), {"scale1"}),
    "LayerScale with a shift": (lambda b: scale_of(b).register_parameter("shift", nn.Parameter(torch.ones(64))),
                                {"scale1"}),
    "block with a third norm": (lambda b: b.add_module("norm3", Half()), {"block"}),
    "not dropout": (replace_drops, {"scale1", "scale2"}),
}  # fmt: skip
UNTOUCHED = {"attention with a norm of queries", "attention with sinks", "attention with a table", "mlp with a norm",
             "LayerScale with a shift", "block with a third norm"}  # fmt: skip
NAMED_ONLY = {"attention of another forward", "mlp of another forward", "LayerScale of another forward"}


FEW = ("hf-dinov3", "hf-dinov2-swiglu", "timm-dinov3-s", "timm-dinov2-g", "facebook-stand-in")  # one of each kind


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in FAMILIES]
)
def test_what_is_not_known_is_the_hosts(name, change):
    host, (apply, parts) = BY_NAME[name], CHANGES[change]
    model, volume = host.make(), host.volume()
    block = pcf.lift(model).adapter.blocks[1]
    if "LayerScale" in change and not isinstance(scale_of(block), nn.Module):
        pytest.skip("its LayerScale is a parameter")
    if change == "not dropout" and name.startswith("facebook"):
        pytest.skip("it leaves out sequences, without a module")
    if change in NAMED_ONLY and name.startswith("facebook"):
        pytest.skip("its repository has no package by which a class could be known")
    with torch.no_grad():
        plain, early = host_features(host, model, volume), pcf.lift(model, mode="slice2d")
        assert torch.equal(all_tokens(early(volume)), plain)
        apply(block)
        expected = host_features(host, model, volume)
        assert torch.equal(expected, plain) == (change in UNTOUCHED)
        lifted = pcf.lift(model, mode="slice2d")
        for one in (lifted, early):  # whether it has seen the block before or not
            assert torch.equal(all_tokens(one(volume)), expected)
    assert [set(block.kept) for block in lifted.descriptions()] == [set(), parts, set(), set(), set()]
    assert all("is of an unknown kind" in reason for reason in lifted.descriptions()[1].kept.values())


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("facebook")])
def test_a_class_whose_forward_was_replaced(name, monkeypatch):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, mode="slice2d")
    kind = type(lifted.adapter.blocks[0].mlp)
    with torch.no_grad():
        lifted(volume)
        monkeypatch.setattr(kind, "forward", doubled(kind.forward))
        for one in (lifted, pcf.lift(model, mode="slice2d")):
            assert torch.equal(all_tokens(one(volume)), host_features(host, model, volume))
            assert [set(block.kept) for block in one.descriptions()] == [{"mlp"}] * 5


def test_norms_and_activations_whose_forward_was_replaced(monkeypatch):
    for module, known in (
        (nn.LayerNorm(4), lambda m: known_norm(m)[0] is not None),
        (nn.GELU(), lambda m: known_activation(m, "gelu")),
        (nn.SiLU(), lambda m: known_activation(m, "silu")),
        (nn.Dropout(), known_dropout),
    ):
        assert known(module)
        monkeypatch.setattr(type(module), "forward", doubled(type(module).forward))
        assert not known(module)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf")])
def test_attention_with_a_mask_is_the_hosts(name):
    host = BY_NAME[name]
    model = host.make()
    for module in attention_of(pcf.lift(model).adapter.blocks[2]).modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    lifted, volume = pcf.lift(model, mode="slice2d"), host.volume()
    with torch.no_grad():
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))
    assert [block.kept for block in lifted.descriptions()] == [{}, {}, {"attention": "it is causal"}, {}, {}]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf")])
def test_a_scale_of_its_own_is_read(name):
    host = BY_NAME[name]
    model = host.make()
    for block in pcf.lift(model).adapter.blocks:
        for module in attention_of(block).modules():
            if hasattr(module, "scaling"):
                module.scaling = 0.7
    lifted, volume = pcf.lift(model, mode="slice2d"), host.volume()
    with torch.no_grad():
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))
    assert [block.kept for block in lifted.descriptions()] == [{}] * 5


@pytest.mark.parametrize("change", ["another forward", "another token"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf")])
def test_embeddings_that_are_not_known_are_the_hosts(name, change):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    with torch.no_grad():
        plain = host_features(host, model, volume)
        if change == "another forward":
            own_forward(model.embeddings)
        else:
            model.embeddings.register_parameter("extra_token", nn.Parameter(torch.ones(1, 1, 64)))
        expected = host_features(host, model, volume)
        assert torch.equal(plain, expected) == (change == "another token")
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), expected)


class Library:
    """Parts of DINOv2 as other versions of transformers have them, as if they were its own."""

    class SelfAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.num_attention_heads, self.scaling = config, 2, 32**-0.5
            self.is_causal, self.dropout_prob = False, 0.0
            self.query, self.key, self.value = [nn.Linear(64, 64) for _ in range(3)]

        def forward(self, x):
            q, k, v = [f(x).unflatten(-1, (2, 32)).transpose(1, 2) for f in (self.query, self.key, self.value)]
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class SelfOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.dropout = nn.Linear(64, 64), nn.Dropout(0.0)

        def forward(self, x):
            return self.dropout(self.dense(x))

    class Attention(nn.Module):
        def __init__(self, config, returns_weights):
            super().__init__()
            self.attention, self.output = Library.SelfAttention(config), Library.SelfOutput()
            self.returns_weights = returns_weights

        def forward(self, x, **_):
            out = self.output(self.attention(x))
            return (out, None) if self.returns_weights else out

    class PackedSwiglu(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights_in, self.weights_out = nn.Linear(64, 96), nn.Linear(48, 64)

        def forward(self, x):
            gate, value = self.weights_in(x).chunk(2, -1)
            return self.weights_out(nn.functional.silu(gate) * value)


@pytest.mark.parametrize("theirs", [True, False])
def test_names_of_another_version(theirs, monkeypatch):
    """Attention within attention, gate and value in one: known as transformers' own, not as anybody else's."""
    host = BY_NAME["hf-dinov2"]
    model, volume = host.make(), host.volume()
    kinds = [kind for kind in vars(Library).values() if isinstance(kind, type)]
    for kind in kinds if theirs else ():
        monkeypatch.setattr(kind, "__module__", "transformers.models.dinov2.modeling_dinov2")
        monkeypatch.setattr(kind.forward, "__module__", "transformers.models.dinov2.modeling_dinov2")
    returns_weights = isinstance(model.encoder.layer[0].attention(torch.zeros(1, 2, 64)), tuple)
    for layer in model.encoder.layer:
        layer.attention = Library.Attention(model.config, returns_weights).eval()
        layer.mlp = Library.PackedSwiglu()
    lifted = pcf.lift(model, mode="slice2d")
    with torch.no_grad():
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))
    assert [set(block.kept) for block in lifted.descriptions()] == [set() if theirs else {"attention", "mlp"}] * 5
    if not theirs:
        return
    for change in ("dropout", "weights"):
        dropout, within = model.encoder.layer[3].attention.output.dropout, model.encoder.layer[3].attention.attention
        dropout.p, within.dropout_prob = (0.2, 0.0) if change == "dropout" else (0.0, 0.2)
        assert set(lifted.eval().descriptions()[3].kept) == set()
        assert "it drops 0.2" in lifted.train().descriptions()[3].kept["attention"]
