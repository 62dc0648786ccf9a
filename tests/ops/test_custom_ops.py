"""The route to the GPU, seen without one: torch.compile sees through an operation to its kernel."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton", reason="needs triton")
if triton.knobs.runtime.interpret:
    pytest.skip("torch cannot wrap kernels under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition
from planecycle_fast.ops.plane_change.plane_switch_triton import plane_switch_triton

from ..kernelcheck.launches import NoGpu


def switch(x, sizes=(3, 4, 5), g=2):
    m = transition(sizes[0], sizes[1], sizes[0])
    return plane_switch_triton(x, HW, DW, sizes, g, m)


def test_a_fake_needs_no_gpu():
    with FakeTensorMode():
        out = switch(torch.empty(6, 22, 384, device="cuda", dtype=torch.bfloat16))
    assert out.shape == (8, 17, 384) and out.device.type == "cuda" and out.is_contiguous()
    assert switch(torch.empty(6, 22, 384, device="meta")).shape == (8, 17, 384)


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())


def graphs_of(function, *args, dynamic=False):
    """The forward and the backward graph that torch.compile hands to its compiler."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        (outputs,) = graph.graph.output_node().args
        shapes = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in outputs]

        def run(*_):  # without a GPU nothing can be computed
            return [torch.zeros([int(n) for n in v.shape]) if isinstance(v, torch.Tensor) else v for v in shapes]

        return make_boxed_func(run)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)(*args).sum().backward()
    return graphs


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compilers_see_the_kernel_and_nothing_else(dynamic):
    graphs = graphs_of(switch, torch.zeros(6, 22, 384, requires_grad=True), dynamic=dynamic)
    assert len(graphs) == 2  # forward and backward
    for graph in graphs:
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert len([call for call in calls if call.startswith("triton_kernel_wrapper")]) == 1, calls
        assert not [call for call in calls if "planecycle_fast" in call], calls
        assert not [call for call in calls if any(name in call for name in ("clone", "copy", "cat", "index"))], calls


@pytest.mark.parametrize("sizes, g", [((2048, 1024, 1024), 0), ((2**15, 2**15, 1), 2**15), ((40000, 40, 1), 1)])
def test_volumes_that_are_too_large_are_refused(sizes, g):
    """Programs and places within a volume are counted in 32 bits; rows, in 64, have no such limit."""
    x = torch.empty(sizes[0], g + sizes[1] * sizes[2], 8, device="meta")
    with pytest.raises(ValueError, match="x is too large for backend 'triton': .* expected at most"):
        switch(x, sizes, g)


def test_rows_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="tokens of 1073741832 channels, .* expected at most"):
        switch(torch.empty(2, 3, 2**30 + 8, device="meta"), (2, 3, 1), 0)


def test_many_rows_are_not_too_large():
    sizes = (1000, 1000, 1000)
    assert switch(torch.empty(1000, 5 + 1000 * 1000, 4096, device="meta"), sizes, 5).shape == (1000, 1000005, 4096)
