"""Transforms of torch.func, and forward mode, of lifted models: each against the same without transforms."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import planecycle_fast as pcf
from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition

from ..host_models import BY_NAME, HOSTS

LAYERS = {"hf": "num_hidden_layers"}
PACKED = ["timm-dinov3-s", "facebook-stand-in"]
QUICK = [*PACKED, "hf-dinov3", "timm-vit-no-globals"]  # packed queries, keys and values, in three, and no globals


def lifted(name, backend="auto", attention="auto", **settings):
    host = BY_NAME[name]
    model = host.make(**{LAYERS.get(name[:2], "depth"): 2}).double()
    return pcf.lift(model, backend=backend, attention=attention, **settings)


def volumes(name, count=2):
    return BY_NAME[name].volume(count, 3, dtype=torch.float64, grid=(2, 2))


def loss(features):
    return sum([t.square().mean() for t in features if t is not None])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def patches(model):
    return lambda x: model(x).patches


def gradient(model, x, direction=None):
    """Of the loss for x; with a direction the second derivative along it. By autograd alone."""
    x = x.detach().requires_grad_()
    [first] = torch.autograd.grad(loss(model(x)), x, create_graph=direction is not None)
    return first if direction is None else torch.autograd.grad((first * direction).sum(), x)[0]


def along(model, x, direction):
    """The derivative of patches along a direction, by autograd in reverse, twice: linear in what the first one gets."""
    x, ones = x.detach().requires_grad_(), torch.ones_like(model(x).patches, requires_grad=True)
    [back] = torch.autograd.grad(model(x).patches, x, ones, create_graph=True)
    return torch.autograd.grad((back * direction).sum(), ones)[0]


def check_vmap(model, plain, x):
    close(vmap(lambda v: model(v[None]).patches[0])(x), torch.cat([plain(v[None]).patches for v in x]))


def check_vmap_without_gradients(model, plain, x):
    with torch.no_grad():
        check_vmap(model, plain, x)


def check_vjp(model, plain, x):
    out, back = vjp(patches(model), x)
    other = x.detach().requires_grad_()
    close(back(out.detach())[0], torch.autograd.grad(plain(other).patches, other, out.detach())[0])


def check_grad(model, plain, x):
    close(grad(lambda v: loss(model(v)))(x), gradient(plain, x))


def check_jvp(model, plain, x):
    direction = torch.randn_like(x)
    close(jvp(patches(model), (x,), (direction,))[1], along(plain, x, direction))


def check_forward_mode(model, plain, x):
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)).patches).tangent
    close(tangent, along(plain, x, direction))


def check_jacobians(model, plain, x):
    def few(scale):  # of one number, so that there are few columns
        return model(scale * x).pooled()[0, :3]

    one = torch.ones((), dtype=x.dtype, requires_grad=True)
    out = plain(one * x).pooled()[0, :3]
    expected = torch.stack([torch.autograd.grad(t, one, retain_graph=True)[0] for t in out])
    close(jacrev(few)(one.detach()), expected)
    close(jacfwd(few)(one.detach()), expected)


def check_hessian_vector(model, plain, x):
    direction = torch.randn_like(x)
    got = jvp(grad(lambda v: loss(model(v))), (x,), (direction,))[1]
    close(got, gradient(plain, x, direction))


def check_per_sample_gradients(model, plain, x):
    weights, buffers = {k: p.detach() for k, p in model.named_parameters()}, dict(model.named_buffers())

    def of_one(weights, v):
        return loss(functional_call(model, (weights, buffers), (v[None],)))

    got = vmap(grad(of_one), in_dims=(None, 0))(weights, x)
    for i, v in enumerate(x):
        named = dict(plain.named_parameters())
        found = torch.autograd.grad(loss(plain(v[None])), [*named.values()], allow_unused=True)
        for name, expected in zip(named, found):
            close(got[name][i], torch.zeros_like(named[name]) if expected is None else expected)


def check_ensemble(model, plain, x):
    models = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    weights, buffers = stack_module_state(models)
    got = vmap(lambda w, b: functional_call(model, (w, b), (x,)).patches)(weights, buffers)
    close(got, torch.stack([m(x).patches for m in models]))


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")}
EVERY = [
    pytest.param(host.name, backend, check, marks=[] if quick else [pytest.mark.full])
    for host in HOSTS
    for backend in ("auto", "reference")
    for check in CHECKS
    for quick in [host.name in QUICK and (backend == "auto") == (host.name != "facebook-stand-in")]
]


@pytest.mark.parametrize("name, backend, check", EVERY)
def test_a_transform_is_what_a_loop_computes(name, backend, check):
    model = lifted(name, backend)
    plain = pcf.lift(pcf.unlift(model), backend="reference", attention="reference")  # has every derivative
    CHECKS[check](model, plain, volumes(name))


@pytest.mark.parametrize("mode", ["slice2d", "flatten3d"])
@pytest.mark.parametrize("check", ["vmap", "jvp", "ensemble"])
def test_other_modes(mode, check):
    model = lifted("timm-dinov3-s", mode=mode)
    plain = pcf.lift(pcf.unlift(model), mode=mode, backend="reference", attention="reference")
    CHECKS[check](model, plain, volumes("timm-dinov3-s"))


@pytest.mark.parametrize("name", PACKED)
def test_intermediate(name):
    model, x = lifted(name), volumes(name)
    plain = pcf.lift(pcf.unlift(model), backend="reference", attention="reference")

    def of(model):
        return lambda scale: torch.stack([each.pooled()[0, :2] for each in model.intermediate(scale * x, [0, 1])])

    one = torch.ones((), dtype=x.dtype)
    expected = torch.autograd.functional.jacobian(of(plain), one)
    close(jacrev(of(model))(one), expected)
    close(jvp(of(model), (one,), (one,))[1], expected)


def test_vmap_over_one_parameter():
    """Of any: whichever tensor is batched, what comes after it is."""
    model, x = lifted("timm-dinov3-s"), volumes("timm-dinov3-s", 1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name in [n for n in weights if n.startswith(("cls", "reg", "patch", "blocks.0", "norm."))]:
        two = torch.stack([weights[name], 1.1 * weights[name] + 0.01])

        def of(w, name=name):
            return functional_call(model, {name: w}, (x,)).patches

        with torch.no_grad():
            close(vmap(of)(two), torch.stack([of(w) for w in two]))


def test_tied_weights():
    host = BY_NAME["timm-dinov3-s"].make(depth=2).double()
    host.blocks[1].mlp.fc1.weight = host.blocks[0].mlp.fc1.weight
    model, x = pcf.lift(host), volumes("timm-dinov3-s")
    twice = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    got = functional_call(model, twice, (x,)).patches
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert other.blocks[1].mlp.fc1.weight is other.blocks[0].mlp.fc1.weight
    close(got, other(x).patches)


def test_attention_maps():
    model, x = lifted("timm-dinov3-s"), volumes("timm-dinov3-s")
    got = vmap(lambda v: model.attention_maps(v[None], 2, (1, 0, 1))[1].patch)(x)
    close(got, torch.stack([model.attention_maps(v[None], 2, (1, 0, 1))[1].patch for v in x]))


def test_any_layer():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1).double()

    def switched(x):  # (B, D, H, W, C)
        return pcf.plane_cycle(x, None, lambda t, grid: conv(t), "DW", layout="maps")[0]

    x = torch.randn(2, 1, 4, 2, 5, 3, dtype=torch.float64)
    close(vmap(switched)(x), torch.stack([switched(v) for v in x]))


@pytest.mark.parametrize("batched", ["rows", "globals"])
def test_globals_of_their_own(batched):
    """Whichever of the two is batched: rows that are not cannot be written into those that are, nor the other way."""
    rows, globals_ = torch.randn(2, 3, 20, 8), torch.randn(2, 1, 2, 8)
    m = transition(3, 4, 3)

    def switched(x, g):
        return pcf.ops.plane_switch(x, HW, DW, (3, 4, 5), 2, m, globals_=g)

    if batched == "rows":
        got = vmap(lambda x: switched(x, globals_[0]))(rows)
        close(got, torch.stack([switched(x, globals_[0]) for x in rows]))
    else:
        got = vmap(lambda g: switched(rows[0], g))(globals_)
        close(got, torch.stack([switched(rows[0], g) for g in globals_]))


def test_a_backend_by_name_says_what_it_lacks():
    model, auto, x = lifted("timm-dinov3-s", "cpu"), lifted("timm-dinov3-s"), volumes("timm-dinov3-s")
    transforms = [
        lambda: vmap(lambda v: model(v[None]).patches)(x),
        lambda: jvp(patches(model), (x,), (x,)),
        lambda: grad(lambda v: loss(model(v)))(x),
    ]
    for transform in transforms:
        with pytest.raises(NotImplementedError, match="no torch.func transforms on backend 'cpu'; use backend='ref"):
            transform()
    with pcf.use_backend("cpu"), pytest.raises(NotImplementedError, match="use backend='reference'"):
        vmap(lambda v: auto(v[None]).patches)(x)


def test_nothing_is_left_behind():
    """After a transform the model computes on as before, in place again."""
    model, x = lifted("timm-dinov3-s"), volumes("timm-dinov3-s")
    with torch.no_grad():
        before = model(x).patches
        check_vmap(model, model, x)
        assert torch.equal(model(x).patches, before)
