"""The patch embedding as one matrix product is the host's own convolution, for every host, forward and backward.

Without a GPU by torch's operations, where "auto" would call the host (`embedding.may_be_product` is replaced); the
kernels that make the rows on a GPU have a test bed of their own, and run in tests/interpreted/test_lifted.py.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import planecycle_fast as pcf
from planecycle_fast.engine import embedding
from planecycle_fast.engine.stream import Own
from planecycle_fast.hosts.projection import known_projection
from planecycle_fast.ops.choice import Choice

from ..host_models import BY_NAME, HOSTS, MORE_HOSTS
from ..standins import DinoVisionTransformer
from ..toy import ToyAdapter, ToyViT

FEW = ["timm-dinov3-s", "timm-dinov2-s", "hf-dinov2-registers", "hf-dinov3", "facebook-stand-in"]


@pytest.fixture
def products(monkeypatch):
    """Every product that runs instead of a convolution, which it does wherever it can: the volume's shape."""
    found, by_product = [], embedding.by_product
    monkeypatch.setattr(embedding, "may_be_product", lambda volume, choice: True)

    def counted(projection, finish, num_globals, volume, choice):
        found.append(tuple(volume.shape))
        return by_product(projection, finish, num_globals, volume, choice)

    monkeypatch.setattr(embedding, "by_product", counted)
    return found


def own_way(lifted, volume):
    """Patches and globals, by the host's own convolution."""
    return lifted.adapter.embed_parts(volume.transpose(1, 2).flatten(0, 1))


def choice_of(volume, backend="reference"):
    return Choice.of(backend, "auto", True, volume.device)


def results(lifted, volume, embedded):
    """Tokens, and the gradients of all that made them."""
    patches, globals_ = embedded[:2]
    tokens = torch.cat([globals_.expand(len(patches), -1, -1), patches], 1)
    model = lifted.adapter.model
    held = {"volume": volume} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view(tokens.shape)
    grads = torch.autograd.grad((tokens * weights).sum(), list(held.values()), allow_unused=True)
    return {"tokens": tokens.detach()} | {n: g for n, g in zip(held, grads) if g is not None}


@pytest.mark.parametrize("name", [host.name for host in (*HOSTS, *MORE_HOSTS)])
def test_every_host_forward_and_backward(products, name):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make().double()), host.volume(dtype=torch.float64).requires_grad_()
    expected = results(lifted, volume, own_way(lifted, volume))
    got = results(lifted, volume, embedding.embed(lifted.adapter, volume, choice_of(volume)))
    assert products == [tuple(volume.shape)]
    assert got.keys() == expected.keys() and "volume" in got
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("cycle", ["HW,DW", "DW,DH", "DHW"])
@pytest.mark.parametrize("name", FEW)
def test_features_and_gradients(products, name, cycle):
    """From pixels to features: globals are written into the product, whose rows there count for nothing."""
    host = BY_NAME[name]
    settings = dict(cycle_order=cycle, backend="reference") if cycle != "DHW" else dict(mode="flatten3d")
    lifted, volume = pcf.lift(host.make().double(), **settings), host.volume(dtype=torch.float64).requires_grad_()
    found = []
    for _ in ("product", "convolution"):
        lifted.zero_grad()
        features = lifted(volume)
        grad = torch.autograd.grad(sum(t.square().sum() for t in features if t is not None), volume)[0]
        sum(t.sin().sum() for t in lifted(volume) if t is not None).backward()
        parameters = {n: p.grad for n, p in lifted.named_parameters() if p.grad is not None}
        found.append([*[t.detach() for t in features if t is not None], grad, *parameters.values()])
        if products:
            embedding.may_be_product = lambda volume, choice: False  # of the fixture, which puts it back
    assert len(products) == 2
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_the_product_is_the_stream(products, name):
    """Without a copy, positions and depth included; what is left is the globals."""
    host, seen = BY_NAME[name], []
    depth = "none" if "dinov3" in name or "facebook" in name else "sincos"
    lifted = pcf.lift(host.make(), backend="reference", mode="slice2d", depth_position=depth)
    volume = host.volume()
    lifted.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].residual.clone()))
    expected = copy.deepcopy(lifted)
    enter = pcf.lifted.enter
    try:
        pcf.lifted.enter = lambda embedded, layer: seen.append((embedded.stream, out := enter(embedded, layer))) or out
        lifted(volume)
        embedding.may_be_product = lambda volume, choice: False
        expected(volume)
    finally:
        pcf.lifted.enter = enter
    (stream, entered), tokens, (none, _), wanted = seen
    assert entered.residual is stream and type(entered) is Own and none is None
    torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patch", [14, 16])
def test_it_rounds_as_the_convolution(patch, dtype):
    """In 16 bits the two are one rounding apart at most."""
    conv, volume = nn.Conv2d(3, 96, patch, patch).to(dtype), torch.randn(2, 3, 3, 4 * patch, 5 * patch).to(dtype)
    images = volume.transpose(1, 2).flatten(0, 1)
    exact = F.conv2d(images.double(), conv.weight.double(), conv.bias.double(), patch).flatten(2).mT
    with torch.no_grad():
        got = embedding.by_product(conv, lambda t, *_: (t, t[:1, :0]), 0, volume, choice_of(volume)).patches
    if dtype == torch.float32:
        own = (conv(images).flatten(2).mT - exact).abs().max()
        assert (got - exact).abs().max() <= 2 * own + torch.finfo(dtype).eps
    else:
        assert ((got - exact).abs() <= torch.finfo(dtype).eps * exact.abs().clamp(min=2**-6)).all()


def _changed(change):
    def make():
        conv = nn.Conv2d(3, 8, 4, 4)
        return change(conv) or conv

    return make


WATCHED = {
    "a hook": _changed(lambda conv: conv.register_forward_hook(lambda *_: None) and None),
    "a hook before it": _changed(lambda conv: conv.register_forward_pre_hook(lambda *_: None) and None),
    "a patched forward": _changed(lambda conv: setattr(conv, "forward", lambda x: x)),
    "parametrised": _changed(lambda conv: parametrize.register_parametrization(conv, "weight", nn.Identity()) and None),
    "a subclass": lambda: type("Mine", (nn.Conv2d,), {})(3, 8, 4, 4),
    "something around it": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4)),
    "overlapping": lambda: nn.Conv2d(3, 8, 4, 2),
    "apart": lambda: nn.Conv2d(3, 8, 4, 5),
    "padded": lambda: nn.Conv2d(3, 8, 4, 4, padding=1),
    "dilated": lambda: nn.Conv2d(3, 8, 4, 4, dilation=2),
    "in groups": lambda: nn.Conv2d(4, 8, 4, 4, groups=2),
    "a tensor of another kind": _changed(lambda conv: setattr(conv, "weight", nn.Parameter(_Odd(conv.weight.data)))),
}


class _Odd(torch.Tensor):
    pass


@pytest.mark.parametrize("why", WATCHED)
def test_projections_that_are_called(why):
    assert known_projection(WATCHED[why]()) is None


def test_projections_that_are_known():
    for conv in (nn.Conv2d(3, 8, 4, 4), nn.Conv2d(1, 8, (2, 3), (2, 3), bias=False, padding="valid")):
        assert known_projection(conv) is conv


@pytest.mark.parametrize("where", ["the projection", "what holds it"])
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_hooks_are_called(products, name, where):
    model, calls = BY_NAME[name].make(), []
    lifted = pcf.lift(model)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    holder = next((m for m in model.modules() if conv in m.children()), None)
    (conv if where == "the projection" else holder).register_forward_hook(lambda *_: calls.append(1))
    lifted(BY_NAME[name].volume())
    assert calls and not products


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_channel_that_is_expanded_is_read_once(monkeypatch, products, needs_grad):
    host, seen, rows = BY_NAME["timm-dinov3-s"], [], embedding.patchify_on
    lifted = pcf.lift(host.make().double())
    one = torch.randn(2, 1, 3, 48, 32, dtype=torch.float64)
    volume = one.expand(-1, 3, -1, -1, -1).requires_grad_(needs_grad)
    monkeypatch.setattr(embedding, "patchify_on", lambda *args: seen.append(args[1].shape[1]) or rows(*args))
    got = embedding.embed(lifted.adapter, volume, choice_of(volume))
    patches, _ = own_way(lifted, volume)
    torch.testing.assert_close(got.patches, patches, rtol=1e-12, atol=1e-12)
    assert seen == [3 if needs_grad else 1]
    weight = lifted.patch_embed.proj.weight
    torch.testing.assert_close(
        torch.autograd.grad(got.patches.square().sum(), weight), torch.autograd.grad(patches.square().sum(), weight)
    )


@pytest.mark.parametrize("frozen", ["nothing", "projection", "all but positions"])
def test_frozen_parts(products, frozen):
    """Positions are written into the product only where nobody needs what was there before."""
    host = BY_NAME["timm-dinov2-s"]
    lifted, volume = pcf.lift(host.make().double()), host.volume(dtype=torch.float64)
    for name, p in lifted.named_parameters():
        p.requires_grad_(frozen == "nothing" or (frozen == "projection") != name.startswith("patch_embed"))
        p.requires_grad_(p.requires_grad if frozen != "all but positions" else "pos_embed" in name)
    volume.requires_grad_()
    expected = results(lifted, volume, own_way(lifted, volume))
    got = results(lifted, volume, embedding.embed(lifted.adapter, volume, choice_of(volume)))
    assert products and got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_autocast_keeps_dtypes(products, name, dtype):
    """Those of the convolution's: globals that are wider widen the stream."""
    host = BY_NAME[name]
    lifted, volume, seen = pcf.lift(host.make().to(dtype), backend="reference"), host.volume(dtype=dtype), []
    lifted.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].residual))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lifted(volume)
        embedding.may_be_product = lambda volume, choice: False
        lifted(volume)
    (a, b) = seen
    assert len(products) == 1 and a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name, sizes", [
    ("timm-dinov3-s", {"depth": 1}),
    pytest.param("hf-dinov2-registers", {"num_hidden_layers": 1}, marks=pytest.mark.full),
    pytest.param("facebook-stand-in", {"depth": 1}, marks=pytest.mark.full),
])  # fmt: skip
def test_recorded(products, name, sizes):
    """torch.compile in one graph, with gradients; torch.export; transforms of torch.func."""
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make(**sizes), backend="reference"), host.volume()
    compiled = torch.compile(lifted, backend="aot_eager", fullgraph=True)
    for p in lifted.parameters():  # others may have no gradient that torch calls deterministic
        p.requires_grad_(p.ndim == 4)
    expected, weight = lifted(volume).patches, next(p for p in lifted.parameters() if p.ndim == 4)
    got = compiled(volume).patches
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got.sum(), weight), torch.autograd.grad(expected.sum(), weight)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        exported = torch.export.export(lifted, (volume,), strict=False).module()
        torch.testing.assert_close(exported(volume).patches, expected, rtol=1e-4, atol=1e-4)
        many = torch.vmap(lambda v: lifted(v).patches)(volume[None])
        torch.testing.assert_close(many[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 15, 40, 61, 200])
@torch.no_grad()
def test_rounds_on_a_cpu(monkeypatch, products, rows):
    """Whole slices of one volume, or several small volumes at once."""
    monkeypatch.setattr(embedding, "ROWS", rows)
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make().double()), host.volume(batch=5, depth=3, dtype=torch.float64)
    got = embedding.embed(lifted.adapter, volume, choice_of(volume))
    torch.testing.assert_close(got.patches, own_way(lifted, volume)[0], rtol=1e-12, atol=1e-12)


def test_where_it_is_taken():
    """On a GPU always; on a CPU for inference on backend "cpu", in bfloat16 or of one channel."""

    def taken(volume, **settings):
        given = dict(patchify="reference", plane_switch="cpu", writes=True, grad=False, autocast=None)
        return embedding.may_be_product(volume, SimpleNamespace(**given | settings))

    volume = torch.zeros(1, 3, 2, 4, 4)
    gray, narrow = volume[:, :1].expand(-1, 3, -1, -1, -1), volume.bfloat16()
    assert taken(volume, patchify="triton", plane_switch="triton", grad=True, writes=False)
    assert not taken(volume) and taken(gray) and taken(narrow) and taken(volume, autocast=torch.bfloat16)
    assert not taken(gray.half()) and not taken(gray.double())
    for settings in (dict(grad=True), dict(writes=False), dict(plane_switch="reference")):
        assert not taken(gray, **settings) and not taken(narrow, **settings)


def test_adapters_of_ones_own():
    """Nothing changes for them; one that embeds otherwise than its family loses the family's shortcut."""
    from planecycle_fast.hosts.timm_eva import TimmDINOv3

    class Other(TimmDINOv3):
        def embed_parts(self, images):
            patches, globals_ = super().embed_parts(images)
            return patches + 1, globals_

    model = BY_NAME["timm-dinov3-s"].make()
    assert TimmDINOv3(model).patch_projection() is model.patch_embed.proj and Other(model).patch_projection() is None
    assert ToyAdapter(ToyViT()).patch_projection() is None
    with pytest.raises(NotImplementedError, match="ToyAdapter has a patch_projection"):
        ToyAdapter(ToyViT()).from_patches(torch.zeros(1, 2, 4), 2, 2, False)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_accelerated_models(monkeypatch, needs_grad):
    """Sizes that fill no patch included: a rest is lost."""
    from planecycle_fast.authors import accelerated

    model = DinoVisionTransformer(block_type="Slice2D", patch_size=4).double().eval()
    fast = pcf.accelerate(copy.deepcopy(model), backend="reference")
    volume = torch.randn(2, 3, 3, 14, 21, dtype=torch.float64)
    expected, calls, by_product = fast.get_intermediate_layers(volume)[0], [], accelerated.by_product
    monkeypatch.setattr(accelerated, "may_be_product", lambda volume, choice: True)
    monkeypatch.setattr(accelerated, "by_product", lambda *args: calls.append(1) or by_product(*args))
    with torch.set_grad_enabled(needs_grad):
        got = fast.get_intermediate_layers(volume)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert calls == [1]


@pytest.mark.parametrize(
    "settings, error, told",
    [
        ({"volume": torch.zeros(1, 3, 2, 8, 8).int()}, TypeError, "volume must be a floating.* got torch.int32"),
        ({"volume": torch.zeros(3, 2, 8, 8)}, ValueError, r"volume must have shape .* got \(3, 2, 8, 8\)"),
        ({"patch": (16, 4)}, ValueError, "volume must have .* at least 16 x 4 pixels"),
        ({"patch": 4}, ValueError, "patch must be two ints .* got 4"),
        ({"patch": (4.0, 4)}, ValueError, r"patch must be two ints .* got \(4.0, 4\)"),
        ({"num_globals": -1}, ValueError, "num_globals must be an int, at least 0, got -1"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point dtype or None, got torch.int32"),
        ({"backend": "triton"}, ValueError, "backend 'triton' is not usable"),
    ],
)
def test_what_patchify_refuses(settings, error, told):
    with pytest.raises(error, match=told):
        pcf.ops.patchify(**{"volume": torch.zeros(1, 3, 2, 8, 8), "patch": (4, 4)} | settings)
