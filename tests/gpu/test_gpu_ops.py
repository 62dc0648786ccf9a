"""Operations on a real GPU: the same checks as in the interpreter, and what only a GPU shows."""

import pytest
import torch

import planecycle_fast as pcf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see benchmarks/results/PENDING.md"),
]
triton = pytest.importorskip("triton", reason="needs triton")

from planecycle_fast.geometry.planes import DH, DW, HW
from planecycle_fast.geometry.rope import Rope, make_periods
from planecycle_fast.ops import Axial, Tables, linear_gelu, patchify, patchify_ref, rope, rope_ref, swiglu, swiglu_ref
from planecycle_fast.ops.activations.gelu import TANH_ERROR, gelu_tanh
from planecycle_fast.ops.activations.linear_gelu import linear_gelu_tanh
from planecycle_fast.ops.multihead_attention.self_attention import self_attention
from planecycle_fast.ops.rotary.rope_within import rope_within

from ..kernelcheck import checks, layouts
from ..specs import SPECS
from ..specs.add_norm import SPEC as IN_FULL
from ..specs.add_norm import case as in_full
from ..specs.linear_gelu import SPEC as LINEAR_GELU
from ..specs.linear_gelu import case as linear_gelu_case
from ..specs.patchify import SPEC as PATCHIFY
from ..specs.patchify import case as patchify_case
from ..specs.plane_switch import SPEC as PLANE_SWITCH
from ..specs.plane_switch import case
from ..specs.self_attention import MODELS, codegen_case
from ..specs.self_attention import SPEC as SELF_ATTENTION
from ..toy import PATCH, ToyViT, toy_lift

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    pytest.param(spec, c, dtype, id=f"{spec.op.name} {c.name} {dtype}")
    for spec in SPECS for c, dtype in spec.in_dtypes()
]  # fmt: skip
SMALL = [pytest.param(spec, c, id=f"{spec.op.name} {c.name}") for spec in SPECS for c in spec.small]
LAYOUTS = pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.__name__)
VIT = case(HW, DW, (32, 16, 14), 5, 384, 2, name="ViT-S")


def on_gpu(layout=layouts.contiguous):
    return lambda t: layout(t.cuda())


def inputs(c, dtype=torch.bfloat16):
    return {name: t.cuda() for name, t in c.make(dtype).items()}


@pytest.fixture(autouse=True)
def _runs_here(request):
    """Skips what this GPU is not for."""
    spec = getattr(request.node, "callspec", None) and request.node.callspec.params.get("spec")
    major = torch.cuda.get_device_capability()[0]
    if spec is not None and not [arch for arch in spec.architectures if arch // 10 == major]:
        pytest.skip(f"{spec.op.name} is not for compute capability {major}.x")


@pytest.mark.parametrize("spec, c, dtype", CASES)
def test_error_budget(spec, c, dtype):
    checks.error_budget(spec, c, dtype, on_gpu(), on_gpu())


@pytest.mark.parametrize("channels", [384, 768, 1024, 1280, 4096])
@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget_of_vit_shapes(channels, pool_method, dtype):
    for spec, make in ((PLANE_SWITCH, case), (IN_FULL, in_full)):
        checks.error_budget(spec, make(DW, DH, (9, 8, 7), 5, channels, 1, pool_method), dtype, on_gpu(), on_gpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_self_attention_of_vit_shapes(model, dtype):
    """Each of its kernels, forward and backward; cases for the interpreter have few rows."""
    checks.error_budget(SELF_ATTENTION, codegen_case(model), dtype, on_gpu(), on_gpu())


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_of_vit_shapes(channels, patch):
    c = patchify_case((channels, 5, 224, 230), (patch, patch), 5, 2, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        checks.error_budget(PATCHIFY, c, dtype, on_gpu(), on_gpu())


@LAYOUTS
@pytest.mark.parametrize("spec, c", SMALL)
def test_layouts(spec, c, layout):
    if layout in layouts.VARIED:
        checks.error_budget(spec, c, torch.bfloat16, on_gpu(layout), on_gpu(layout))
    for dtype in spec.dtypes:
        checks.layouts(spec, c, dtype, on_gpu(layout))


@LAYOUTS
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_opcheck(spec, layout):
    checks.opcheck(spec, spec.typical, on_gpu(layout))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor_in_full(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(IN_FULL.fast, fullgraph=True, dynamic=dynamic)
    for c in (in_full(HW, DW, (32, 16, 14), 5, 384, 2), in_full(DH, HW, (9, 7, 5), 5, 384, 1, "PCm")):
        got = checks.run(compiled, inputs(c), c.settings, upstream=on_gpu())
        expected = checks.run(IN_FULL.fast, inputs(c), c.settings, upstream=on_gpu())
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(PLANE_SWITCH.fast, fullgraph=True, dynamic=dynamic)
    for c in (VIT, case(DH, HW, (9, 7, 5), 5, 384, 1, "PCm")):
        got = checks.run(compiled, inputs(c), c.settings, upstream=on_gpu())
        expected = checks.run(PLANE_SWITCH.fast, inputs(c), c.settings, upstream=on_gpu())
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


needs_linear_gelu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs a GPU of compute capability 9.0 or 10.x; see benchmarks/results/PENDING.md",
)


@needs_linear_gelu
@pytest.mark.parametrize("dtype", LINEAR_GELU.dtypes, ids=str)
@pytest.mark.parametrize("channels", [384, 768, 1024])
def test_linear_gelu_of_vit_shapes(channels, dtype):
    checks.error_budget(LINEAR_GELU, linear_gelu_case((40_001,), channels, 4 * channels), dtype, on_gpu(), on_gpu())


@needs_linear_gelu
@torch.no_grad()
def test_linear_gelu_compiled_and_captured():
    """To the bit what it is eager; a graph takes its descriptors along."""
    tensors = list(inputs(linear_gelu_case((5001,), 384, 1536)).values())
    expected = LINEAR_GELU.fast(*tensors)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(linear_gelu, fullgraph=True)(*tensors, backend="triton"), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear_gelu(*tensors, backend="triton")
    tensors[0].neg_()
    graph.replay()
    assert torch.equal(got, LINEAR_GELU.fast(*tensors)) and not torch.equal(got, expected)


@needs_linear_gelu
@torch.no_grad()
def test_tanh_epilogue_is_cublas_and_within_its_error():
    x, weight, bias = inputs(linear_gelu_case((5001,), 384, 1536), torch.float32).values()
    got, exact = linear_gelu_tanh(x, weight, bias), linear_gelu(x, weight, bias, backend="reference")
    assert (got - gelu_tanh(torch.nn.functional.linear(x, weight, bias))).abs().max() < 1e-4
    assert 2e-4 < (got - exact).abs().max() < TANH_ERROR + 1e-4


@pytest.mark.parametrize(
    "spec, c", [(PLANE_SWITCH, VIT), *[(SELF_ATTENTION, codegen_case(model)) for model in list(MODELS)[:4]]]
)
def test_a_thousand_times_the_same_bits(spec, c):
    [x] = inputs(c).values()
    x.requires_grad_()
    g = torch.randn_like(spec.fast(x, **c.settings))

    def run():
        out = spec.fast(x, **c.settings)
        return out.detach(), *torch.autograd.grad(out, x, g)

    first = run()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_new_sizes_compile_nothing():
    from planecycle_fast.ops.plane_change.plane_switch_triton import plane_switch_kernel

    def compiled():
        return sum(len(caches[0]) for caches in plane_switch_kernel.device_caches.values())

    def run(sizes, batch):
        c = case(DW, DH, sizes, 5, 384, batch)
        checks.run(PLANE_SWITCH.fast, inputs(c), c.settings, upstream=on_gpu())

    run((16, 14, 14), 1)
    before = compiled()
    assert before >= 2  # forward and backward
    for sizes, batch in (((1, 1, 1), 1), ((17, 16, 16), 3), ((64, 4, 4), 16), ((31, 2, 9), 1)):
        run(sizes, batch)
    assert compiled() == before


@pytest.mark.alone
def test_it_allocates_its_output_and_nothing_else():
    x = inputs(VIT)["x"]
    PLANE_SWITCH.fast(x, **VIT.settings)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = PLANE_SWITCH.fast(x, **VIT.settings)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + 512


@pytest.mark.alone
def test_a_side_stream():
    x = inputs(VIT)["x"]
    expected = PLANE_SWITCH.fast(x, **VIT.settings)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = PLANE_SWITCH.fast(late, **VIT.settings)  # on another stream it would read zeros
    stream.synchronize()
    assert torch.equal(got, expected)


def test_graph_capture_and_replay():
    x = inputs(VIT)["x"]
    PLANE_SWITCH.fast(x, **VIT.settings)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = PLANE_SWITCH.fast(x, **VIT.settings)
    for seed in range(3):
        x.copy_(VIT.make(torch.bfloat16, seed)["x"])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, PLANE_SWITCH.fast(x, **VIT.settings))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    tensors = {name: t.to("cuda:1") for name, t in VIT.make(torch.bfloat16).items()}
    with torch.cuda.device(0):
        got = checks.run(PLANE_SWITCH.fast, tensors, VIT.settings, upstream=lambda g: g.to("cuda:1"))
    expected = checks.run(PLANE_SWITCH.fast, inputs(VIT), VIT.settings, upstream=on_gpu())
    for name in expected:
        assert torch.equal(got[name].cpu(), expected[name].cpu())


@pytest.mark.alone
def test_more_than_2_to_the_31_elements():
    sizes, g, channels, batch = (64, 128, 128), 1, 1024, 3  # 3.2e9 elements
    if torch.cuda.mem_get_info()[0] < 8 * batch * 64 * 128 * 128 * channels * 2:
        pytest.skip("needs 48 GiB of free GPU memory")
    c = case(HW, DH, sizes, g, channels, batch)
    rows = batch * sizes[0] * (g + sizes[1] * sizes[2])
    ids = torch.arange(rows, device="cuda") % 251  # exact in bf16
    x = (ids[:, None] + torch.zeros(channels, device="cuda", dtype=torch.int64)).to(torch.bfloat16)
    x = x.view(batch * sizes[0], -1, channels)
    assert x.numel() > 2**31
    out = PLANE_SWITCH.fast(x, **c.settings)
    few = PLANE_SWITCH.reference(x[..., -8:].contiguous(), **c.settings)
    assert torch.equal(out[..., -8:][:, g:], few[:, g:]) and torch.equal(out[:, g:, :8], few[:, g:])


@pytest.mark.alone
def test_more_than_2_to_the_31_elements_in_full():
    sizes, g, channels, batch = (64, 128, 128), 1, 1024, 3  # 3.2e9 elements
    if torch.cuda.mem_get_info()[0] < 20 * batch * 64 * 128 * 128 * channels:
        pytest.skip("needs 60 GiB of free GPU memory")
    c = in_full(HW, DH, sizes, g, channels, batch)
    rows = torch.arange(batch * sizes[0] * (g + sizes[1] * sizes[2]), device="cuda") % 251  # exact in bf16
    wave = torch.arange(channels, device="cuda") % 2 * 2 - 1  # norms to 1 and -1
    x = (rows[:, None] * wave).to(torch.bfloat16).view(batch * sizes[0], -1, channels)
    vectors = {name: torch.ones(channels, device="cuda", dtype=torch.bfloat16) for name in ("scale", "weight", "bias")}
    with torch.no_grad():
        out, normed = IN_FULL.fast(x=x, branch=torch.zeros_like(x), **vectors, **c.settings)
    few = PLANE_SWITCH.reference(x[..., -8:].contiguous(), **case(HW, DH, sizes, g, 8, batch).settings)
    assert torch.equal(out[..., -8:][:, g:], few[:, g:])
    signs = (out[:, g:, -8:] != 0) * wave[-8:] + 1
    assert ((normed[:, g:, -8:].float() - signs).abs() < 0.02).all()


@pytest.fixture
def past_2_31():
    """Rows of zeros and a last one of random values, (2, 1100*1000, 1024) in bfloat16: 4.2 GiB."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(2, 1100 * 1000, 1024, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1, -1] = torch.randn(1024, device="cuda")
    return x


@pytest.mark.alone
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_rope_past_2_31(past_2_31, inplace):
    angles = [torch.rand(n, 256, device="cuda") for n in (1100, 1000)]
    tables = Tables(tuple([a.sin() for a in angles]), tuple([a.cos() for a in angles]))
    last = Tables(*[tuple([t[-1:] for t in ts]) for ts in tables])
    expected = rope_ref(past_2_31[-1:, -1:, None].clone(), last, 0)
    got = rope(past_2_31[:, :, None], tables, 0, inplace=inplace, backend="triton")
    torch.testing.assert_close(got[-1:, -1:], expected)
    assert not got[0, 0].any()


@pytest.mark.alone
@torch.no_grad()
def test_swiglu_past_2_31(past_2_31):
    expected = swiglu_ref(past_2_31[-1, -1], past_2_31[-1, -1])
    got = swiglu(past_2_31, past_2_31.clone(), inplace=True, backend="triton")
    torch.testing.assert_close(got[-1, -1], expected)
    assert not got[0, 0].any()


@pytest.mark.alone
@pytest.mark.parametrize("grid", [(4, 4), (32, 32)], ids=str)
def test_self_attention_past_2_31(grid):
    """Sequences of zeros and a last one, which comes out as it does alone; gradients too."""
    rows = 5 + grid[0] * grid[1]
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    packed = torch.zeros(2**31 // (rows * 18 * 64) + 2, rows, 18, 64, dtype=torch.bfloat16, device="cuda")
    assert packed.numel() > 2**31
    packed[-1] = torch.randn(rows, 18, 64, device="cuda")
    grad = torch.zeros(len(packed), rows, 6, 64, dtype=torch.bfloat16, device="cuda")
    grad[-1] = torch.randn(rows, 6, 64, device="cuda")
    angles = Axial(Rope(make_periods(16, 100.0).cuda()), grid)

    def run(qkv, upstream):
        qkv = qkv.detach().requires_grad_()
        out = self_attention(qkv, None, None, angles, 5, backend="triton")
        return out.detach(), *torch.autograd.grad(out, qkv, upstream)

    for whole, alone in zip(run(packed, grad), run(packed[-1:], grad[-1:])):
        assert torch.equal(whole[-1:], alone) and not whole[0].any()


@pytest.mark.alone
def test_patchify_past_2_31():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    volume = torch.zeros(1, 1, 2050, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    assert volume.numel() > 2**31
    volume[:, :, -1] = torch.randn(1024, 1024, device="cuda")
    got = patchify(volume, (16, 16), 5, backend="triton")
    assert torch.equal(got[-1:, 5:], patchify_ref(volume[:, :, -1:], (16, 16), 5)[:, 5:]) and not got[0, 5:].any()


@needs_linear_gelu
@pytest.mark.alone
@torch.no_grad()
def test_linear_gelu_past_2_31():
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    x, weight, bias = inputs(linear_gelu_case((2,), 64, 1536)).values()
    many = torch.zeros(2**31 // 1536 + 2, 64, dtype=x.dtype, device="cuda")
    x[0], many[-1] = 0, x[1]
    got = linear_gelu(many, weight, bias, backend="triton")
    assert got.numel() > 2**31
    assert torch.equal(got[[0, -1]], linear_gelu(x, weight, bias, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_and_keys_turned_within_a_packed_qkv(dtype):
    """Outputs and gradients to the bit those of the operation out of place."""
    angles = Axial(Rope(make_periods(16, 100.0).cuda()), (14, 12))
    leaf = torch.randn(3, 5 + 14 * 12, 18, 64, dtype=dtype, device="cuda", requires_grad=True)
    grads = [torch.randn_like(t) for t in leaf.split(6, 2)]
    expected = rope(leaf, angles, 5, 12, backend="triton").split(6, 2)
    got = rope_within(leaf * 1, angles, 5, False, "triton")
    wanted, found = [torch.autograd.grad(outs, leaf, grads)[0] for outs in (expected, got)]
    for ours, theirs in zip((*got, found), (*expected, wanted)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["planecycle", "slice2d", "flatten3d"])
@pytest.mark.parametrize("pool_method", ["PCg", "PCm"])
def test_lifted_models(mode, pool_method):
    model = ToyViT().double().cuda()
    volume = torch.randn(2, 3, 5, 3 * PATCH, 4 * PATCH, dtype=torch.float64, device="cuda")
    expected = toy_lift(model, mode=mode, pool_method=pool_method, backend="reference")(volume)
    got = toy_lift(model, mode=mode, pool_method=pool_method, backend="triton")(volume)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_auto_takes_triton_for_tensors_on_the_gpu():
    from planecycle_fast.runtime.backends import pick

    assert pcf.backends()["triton"] is None
    assert pick("auto", torch.device("cuda")) == "triton"
    assert pick("auto", torch.device("cpu")) in ("cpu", "reference")
    with pytest.raises(ValueError, match="backend 'triton' is not usable: it needs tensors on a CUDA device, got cpu"):
        pick("triton", torch.device("cpu"))
