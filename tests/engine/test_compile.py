"""torch.compile takes a lifted model as one graph and changes nothing."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

import planecycle_fast as pcf

from ..host_models import BY_NAME, MORE_HOSTS

FEW = ["hf-dinov3", "hf-dinov2", "timm-dinov3-s", "facebook-stand-in"]
MORE = ["timm-dinov3-s-qkvb", "timm-dinov2-s-reg4", *[host.name for host in MORE_HOSTS]]
ONE_GRAPH = [*FEW, *[pytest.param(name, marks=pytest.mark.full) for name in MORE]]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_forward(name):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make()), host.volume()
    compiled = torch.compile(lifted, backend="eager", fullgraph=True)
    with torch.no_grad():
        for got, expected in zip(compiled(volume), lifted(volume)):
            assert got is expected is None or torch.equal(got, expected)


SLOW = {*FEW, "timm-dinov2-s-reg4"} - {"timm-dinov3-s"}


@pytest.mark.parametrize("name", ["timm-dinov3-s", *[pytest.param(n, marks=pytest.mark.full) for n in sorted(SLOW)]])
def test_sizes_are_no_constants_of_the_graph(name):
    """Nothing but the operations in plain torch, so that it also runs quickly with other versions of torch."""
    host = BY_NAME[name]
    host.check_one_graph(pcf.lift(host.make(), backend="reference"))


def test_blocks_that_are_compiled_already():
    host = BY_NAME["timm-dinov3-s-qkvb"]
    model, volume = host.make(), host.volume()
    with torch.no_grad():
        expected = pcf.lift(model, backend="reference")(volume).patches
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")
        assert torch.equal(pcf.lift(model, backend="reference")(volume).patches, expected)


def test_gradients():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), pool_method="PCm"), host.volume()

    def gradients(model):
        lifted.zero_grad()
        features = model(volume)
        (features.patches.square().mean() + features.pooled().square().mean()).backward()
        return {name: p.grad for name, p in lifted.named_parameters()}

    expected = gradients(lifted)
    got = gradients(torch.compile(lifted, backend="aot_eager", fullgraph=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_a_compiled_model_follows_use_backend():
    host = BY_NAME["hf-dinov2"]
    compiled = torch.compile(pcf.lift(host.make()), backend="eager")
    with torch.no_grad():
        compiled(host.volume())
        with pcf.use_backend("reference"):
            compiled(host.volume())
        with pytest.raises(ValueError, match="backend 'triton' is not usable"), pcf.use_backend("triton"):
            compiled(host.volume())


SHAPES = [  # batch, depth, patches of a slice: any, equal or not
    (2, 4, (2, 5)), (3, 5, (3, 6)), (3, 4, (4, 4)), (2, 4, (4, 4)), (4, 2, (2, 2)),
    (2, 6, (5, 3)), (3, 3, (3, 3)), (2, 7, (2, 3)), (5, 2, (6, 2)), (2, 3, (5, 5)),
]  # fmt: skip


@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_one_graph_serves_all_sizes(pool_method):
    host = BY_NAME["timm-dinov3-s"]
    lifted, counter = pcf.lift(host.make(depth=3), pool_method=pool_method), CompileCounter()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True), torch.no_grad():  # dinov3 switches it off
        compiled = torch.compile(lifted, backend=counter, fullgraph=True)
        for batch, depth, grid in SHAPES:
            volume = host.volume(batch, depth, grid=grid)
            for got, expected in zip(compiled(volume), lifted(volume)):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert counter.frame_count <= 3  # the first, and at most two more


def test_inductor_copies_nothing_between_operations():
    """Of its generated code: q and k are written once, v is the linear layer's own output, GELU is in place."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(depth=2), cycle_order=("HW", "DW"), backend="reference"), host.volume()
    with torch.no_grad():
        expected = lifted(volume).patches
        out, codes = run_and_get_code(torch.compile(lifted, fullgraph=True), volume)
    torch.testing.assert_close(out.patches, expected, rtol=0, atol=1e-5)
    code = "\n".join(codes)
    kernels = re.findall(r"^(cpp_fused\w*) = ", code, re.MULTILINE)
    assert [name for name in kernels if "clone" in name] == [kernels[0]]  # the volume's slices, for the convolution
    assert "aten.copy_" not in code and "aten.clone.default" not in code
    linear = set(re.findall(r"extern_kernels\.\w*mm\(.*out=(buf\d+)\)", code))
    attentions = re.findall(r"flash_attention_for_cpu\.default\(.*\)", code)
    assert len(attentions) == 2
    for call in attentions:
        q, k, v = re.findall(r"reinterpret_tensor\((buf\d+), ", call)
        assert q == k and v in linear and q not in linear
    pointers = re.findall(r"^cpp_fused_gelu\w* = async_compile.cpp_pybinding\((\[.*?\])", code, re.MULTILINE)
    assert pointers == ["['float*']"] * 2


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.full
def test_with_less_overhead(name, training):
    """mode="reduce-overhead", whose CUDA graphs are tests/gpu/test_gpu_graphs.py's: one graph, the same values."""
    host = BY_NAME[name]
    lifted = pcf.lift(host.make(**{"num_hidden_layers" if "hf" in name else "depth": 2}), graphs=True)
    compiled = torch.compile(lifted, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        found, volume = [], host.volume()
        for run in (compiled, lifted):
            lifted.zero_grad()
            with torch.set_grad_enabled(training):
                out = run(volume)
            if training:
                out.patches.square().mean().backward()
            found.append([t for t in (*out, *[p.grad for p in lifted.parameters()]) if t is not None])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
