"""Activation checkpointing of every kind around lifted blocks: gradients as without it, and how much it keeps."""

import functools

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import planecycle_fast as pcf
from planecycle_fast.engine.stream import Layer, Stream
from planecycle_fast.geometry.planes import parse_plane
from planecycle_fast.geometry.pooling import between
from planecycle_fast.ops import Norm, native_ops  # noqa: F401  (registers the operations)
from planecycle_fast.ops.choice import Choice

from ..engine.test_lifted_block import gradients
from ..host_models import BY_NAME, EVERY_HOST

ATEN = torch.ops.aten
PRODUCTS = [ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default]
SDPA = [ATEN._scaled_dot_product_flash_attention_for_cpu.default, ATEN._scaled_dot_product_fused_attention_overrideable
        .default]  # fmt: skip


def of_everything(policy):
    return lambda: create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: policy)


def every_second_product():
    seen = {True: 0, False: 0}

    def policy(ctx, op, *args, **kwargs):
        seen[ctx.is_recompute] += op in PRODUCTS
        saved = op in PRODUCTS and seen[ctx.is_recompute] % 2
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def our_operations():
    def policy(ctx, op, *args, **kwargs):
        ours = op.namespace.startswith("planecycle_fast")
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.MUST_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


POLICIES = {
    "save all": of_everything(CheckpointPolicy.MUST_SAVE),
    "prefer to save": of_everything(CheckpointPolicy.PREFER_SAVE),
    "save none": of_everything(CheckpointPolicy.MUST_RECOMPUTE),
    "products": lambda: create_selective_checkpoint_contexts(PRODUCTS),
    "attention": lambda: create_selective_checkpoint_contexts(SDPA),
    "every second product": every_second_product,
    "our operations": our_operations,
}


def wrap(lifted, **settings):
    wrapper = functools.partial(checkpoint_wrapper, **settings)
    apply_activation_checkpointing(
        lifted, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, pcf.LiftedBlock)
    )
    return lifted


def check(got, expected, atol=5e-7):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol * max(1, float(value.norm())), msg=name)


QUICK = ["timm-dinov3-s", "hf-dinov3"]
HOSTS_OF_ALL = [pytest.param(p.values[0], id=p.id, marks=() if p.id in QUICK else pytest.mark.full) for p in EVERY_HOST]


@pytest.mark.parametrize("host", HOSTS_OF_ALL)
def test_every_policy_of_selective_checkpointing(host):
    model, volume = host.make().train(), host.volume(1)
    for backend in ("reference", "auto"):
        expected = gradients(pcf.lift(model, backend=backend), volume)
        for name, policy in POLICIES.items():
            got = gradients(wrap(pcf.lift(model, backend=backend), context_fn=policy), volume)
            if backend == "reference":
                assert all(torch.equal(got[key], expected[key]) for key in expected), name
            check(got, expected)


@pytest.mark.parametrize("policy", ["save all", pytest.param("prefer to save", marks=pytest.mark.full)])
@pytest.mark.parametrize("depth_position", ["rope1d", "sincos"])
def test_selective_checkpointing_with_a_position_of_depth(depth_position, policy):
    """Tables that belong to no RoPE of the model are made before its blocks as well, in the form that kernels take."""
    host = BY_NAME["timm-dinov2-s-reg4"]
    model, volume = host.make().train(), host.volume(1)
    for backend in ("reference", "auto"):
        settings = {"backend": backend, "depth_position": depth_position}
        expected = gradients(pcf.lift(model, **settings), volume)
        check(gradients(wrap(pcf.lift(model, **settings), context_fn=POLICIES[policy]), volume), expected)


@pytest.mark.parametrize("policy", ["save all", pytest.param("products", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["hf-dinov3", pytest.param("hf-dinov2-registers", marks=pytest.mark.full)])
def test_selective_checkpointing_by_hugging_face(name, policy):
    host = BY_NAME[name]
    model, volume = host.make().train(), host.volume(1)
    expected = gradients(pcf.lift(model), volume)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": POLICIES[policy]})
    check(gradients(pcf.lift(model), volume), expected)


def test_selective_checkpointing_of_blocks_of_which_some_run_as_a_whole():
    """The tables that the model's own attention takes are made before its block as well."""
    host = BY_NAME["timm-dinov3-s"]
    model, volume = host.make().train(), host.volume(1)
    model.blocks[0].register_forward_hook(lambda *_: None)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    expected = gradients(pcf.lift(model, cycle_order="HW"), volume)
    check(gradients(wrap(pcf.lift(model, cycle_order="HW"), context_fn=POLICIES["save all"]), volume), expected)


def test_reentrant_checkpointing_around_a_block_is_refused():
    host = BY_NAME["timm-dinov3-s"]
    lifted = wrap(pcf.lift(host.make()), checkpoint_impl=CheckpointImpl.REENTRANT)
    with pytest.raises(TypeError, match="got tuple; hooks .* checkpointing around a block must not be reentrant"):
        lifted(host.volume(1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_attention_maps_of_checkpointed_blocks():
    host = BY_NAME["hf-dinov3"]
    model, volume = host.make(), host.volume(1)

    def of(lifted):
        lifted.zero_grad()
        maps = lifted.attention_maps(volume, 2)
        sum([found.cls.square().sum() for found in maps]).backward()
        return {name: p.grad for name, p in pcf.unlift(lifted).named_parameters() if p.grad is not None}

    expected = of(pcf.lift(model))
    check(of(wrap(pcf.lift(model), context_fn=POLICIES["save all"])), expected, atol=1e-6)
    check(of(wrap(pcf.lift(model))), expected, atol=1e-6)


class Kept(TorchDispatchMode):
    """Which results of operations are still there, but for views of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.sizes, self.own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own:
                self.sizes[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return out

    def bytes(self):
        return sum(size for ref, size in self.sizes.items() if not ref.expired())


def own_of_timm(model):
    model.set_grad_checkpointing()
    return pcf.lift(model)


def own_of_hugging_face(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return pcf.lift(model)


WAYS = {
    "wrapper, timm": ("timm-dinov3-s", "depth", lambda model: wrap(pcf.lift(model))),
    "wrapper, Hugging Face": ("hf-dinov2", "num_hidden_layers", lambda model: wrap(pcf.lift(model))),
    "timm's own": ("timm-dinov2-s-reg4", "depth", own_of_timm),
    "Hugging Face's own": ("hf-dinov3", "num_hidden_layers", own_of_hugging_face),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_checkpointed_block_keeps_one_tensor(way, backend):
    """4 C bytes per row in float32, as much as the 2D model keeps: not residual and branch."""
    name, depth, make = WAYS[way]
    host, kept = BY_NAME[name], []
    with pcf.use_backend(backend):
        for blocks in (3, 5):
            lifted = make(host.make(**{depth: blocks}).train())
            with Kept(lifted) as mode:
                features = lifted(host.volume(1, grid=(4, 4)))  # all planes have 4 sequences of 16 patches
            kept.append(mode.bytes())
            assert features.patches.requires_grad
    assert kept[1] - kept[0] == 2 * 4 * (host.num_globals + 16) * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_where_summing_first_is_exact(backend, dtype):
    """Everywhere but for globals of half precision, which kernels pool before the sum is rounded."""
    if pcf.backends()[backend] is not None:
        pytest.skip(f"backend {backend!r} is not usable")
    sizes, g, channels = (4, 3, 5), 5, 64
    for old, new, method in (("HW", "DW", "PCg"), ("DW", "DH", "PCm"), ("DH", "HW", "PCg")):
        old, new = parse_plane(old), parse_plane(new)
        choice = Choice.of(backend, "auto", True, torch.device("cpu"))
        layer = Layer(old, new, sizes, g, between(old, new, sizes, method, "depth"), choice)
        residual = torch.randn(2 * old.slices(sizes), g + old.length(sizes), channels, dtype=dtype)
        stream = Stream(residual, torch.randn_like(residual), torch.randn(channels, dtype=dtype))
        norm = Norm(torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype), 1e-6)
        one = layer.one(stream, old)
        assert one.branch is None and one.scale is None
        at_once, first = layer.switch(stream, norm), layer.switch(one, norm)
        exact = backend == "reference" or dtype.itemsize >= 4
        for a, b in zip(at_once, first):
            assert torch.equal(a[:, g:], b[:, g:])
            assert torch.equal(a, b) == exact
