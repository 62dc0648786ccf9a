"""Every operation of csrc through the whole test bed, but for what only Triton's interpreter can record."""

import psutil
import pytest
import torch

pytest.importorskip("triton", reason="needs triton, whose kernels' specs it shares")
from planecycle_fast.runtime import native

if not native.ready():
    pytest.skip(f"backend 'cpu' is not usable: {native.why_not_native()}", allow_module_level=True)

from planecycle_fast.geometry.planes import DW, HW
from planecycle_fast.geometry.pooling import transition
from planecycle_fast.ops import Norm, Tables, add_norm_ref, native_ops, rope, rope_ref, swiglu, swiglu_ref
from planecycle_fast.ops import registration as custom
from planecycle_fast.ops.residual import add_norm_cpu  # fmt: skip

from ..cpu_specs import ADD_NORM, PLANE_SWITCH, ROPE, SPECS, SWIGLU
from ..kernelcheck.budget import check_bits
from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import VARIED


def cpu_tests(spec, examples):
    """`op_tests` without recorded bytes and the overflow probe, which need kernels in Triton's interpreter."""
    tests = op_tests(spec, examples)
    for name in [name for name in vars(tests) if name.startswith(("test_declared_cost", "test_overflow"))]:
        delattr(tests, name)
    return tests


TestPlaneSwitch = cpu_tests(PLANE_SWITCH, 80)
TestAddNorm = cpu_tests(ADD_NORM, 60)
TestRope = cpu_tests(ROPE, 80)
TestSwiglu = cpu_tests(SWIGLU, 60)


def test_every_operation_is_tested():
    assert {op.name for spec in SPECS for op in spec.ops} | {"add_norm_"} == set(native_ops.OPS)


def test_schemas_are_those_of_the_kernels():
    """Names, types and order of arguments and results; one operation more, in place."""
    from planecycle_fast.ops.activations import swiglu_triton  # noqa: F401

    ours = {name: str(op.overload._schema).split("::")[1] for name, op in native_ops.OPS.items()}
    theirs = {name: str(op.overload._schema).split("::")[1] for name, op in custom.OPS.items()}
    assert ours.keys() - theirs.keys() == {"add_norm_"}
    alone = {"linear_gelu", "patchify", "self_attention", "self_attention_backward"}  # which csrc does not have
    assert all(ours[name] == schema for name, schema in theirs.items() if name not in alone)
    assert not alone & ours.keys()


@pytest.mark.parametrize("layout", VARIED, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype, norm_dtype", [(torch.float32, None), (torch.bfloat16, None),
                                               (torch.float32, torch.bfloat16), (torch.float64, None)])  # fmt: skip
@pytest.mark.parametrize("rms", [False, True])
@torch.no_grad()
def test_add_norm_in_place(dtype, norm_dtype, rms, layout):
    """To the bit what the operation that writes new memory gives."""
    x, branch = torch.randn(2, 3, 5, 40, dtype=torch.float64).to(dtype)
    scale, weight = torch.randn(2, 40, dtype=torch.float64).to(dtype)
    norm = Norm(weight, None, 1e-6, rms)
    expected = add_norm_cpu.add_rows_cpu(x, branch, scale, norm, norm_dtype)
    normed = torch.empty_like(x, dtype=norm_dtype or dtype)
    before = x._version
    add_norm_in_place(x, layout(branch), layout(scale), norm, normed)
    assert x._version > before  # what saved x for backward notices
    check_bits("sum", x, expected[0])
    check_bits("norm", normed, expected[1])


def add_norm_in_place(x, branch, scale, norm, normed):
    """As csrc/blocks.cpp calls it."""
    kind = "rms" if norm.rms else "layer"
    add_norm_cpu.IN_PLACE(x, branch.contiguous(), scale, norm.weight, norm.bias, kind, norm.eps, normed)


@pytest.mark.parametrize("stem", ["plane_switch", "rope"])
def test_rows_of_any_strides(stem):
    """csrc reads them, and in place it writes them."""
    x = torch.randn(4, 16, 5 + 6 if stem == "rope" else 6).transpose(1, 2)
    if stem == "plane_switch":
        op, rest, calls = native_ops.OPS[stem], ("HW", "DW", [4, 3, 2], 0, 4, False, False), ()
    else:
        x, tables = x.unflatten(2, (2, 8)).transpose(2, 3).contiguous().transpose(2, 3), [torch.randn(6, 4)]
        rest = (False, 5, 2, False, [6], tables, tables, [], [], "", False, False, torch.float32, torch.float32)
        op, calls = native_ops.OPS[stem], (native_ops.OPS["rope_"],)
    assert not x.is_contiguous()
    expected = op(x.contiguous(), *rest)
    check_bits(stem, op(x, *rest), expected)
    for in_place in calls:
        own, before = x.clone(memory_format=torch.preserve_format), x._version
        assert own.stride() == x.stride() and own.stride(-1) != 1
        in_place(own, *rest)
        assert own._version > before
        check_bits("in place", own.contiguous(), expected)


def test_in_place_refuses_what_it_cannot_write():
    x = torch.zeros(2, 3, 8)
    norm = Norm(None, None, 1e-6)
    with pytest.raises(ValueError, match="x must have the dtype of the sum to be written to"):
        add_norm_in_place(x, x.double(), None, norm, torch.empty_like(x))
    with pytest.raises(ValueError, match="normed must be contiguous and of x's shape"):
        add_norm_in_place(x, x.clone(), None, norm, torch.empty(2, 3, 4))
    with pytest.raises(ValueError, match="x must be contiguous"):
        add_norm_in_place(x.mT, x.mT.contiguous(), None, norm, torch.empty_like(x.mT))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op.name)
def test_any_number_of_threads_gives_the_same_bits(spec):
    from ..kernelcheck.checks import run

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append([run(spec.fast, c.make(torch.float32), c.settings) for c in (spec.typical, *spec.plain)])
        finally:
            torch.set_num_threads(1)
    for got in results[1:]:
        for a, b in zip(got, results[0]):
            for name in b:
                check_bits(name, a[name], b[name])


def test_sums_of_many_rows_are_the_same_for_any_number_of_threads():
    """Of more rows than a chunk has, and close to float64."""
    x, grad = torch.randn(2, 40, 300, 64)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        weight, bias, scale = (torch.ones(64, requires_grad=True) for _ in range(3))
        outs = add_norm_cpu.add_rows_cpu(x, grad, scale, Norm(weight, bias, 1e-6))
        found.append(torch.autograd.grad(outs, (weight, bias, scale), (grad, x)))
    torch.set_num_threads(1)
    leaves = [torch.ones(64, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outs = add_norm_ref(x.double(), grad.double(), leaves[2], Norm(*leaves[:2], 1e-6))
    exact = torch.autograd.grad(outs, leaves, (grad.double(), x.double()))
    for i, name in enumerate(("weight", "bias", "scale")):
        assert all(torch.equal(of_one[i], found[0][i]) for of_one in found), name
        torch.testing.assert_close(found[0][i].double(), exact[i], rtol=1e-5, atol=1e-4)


def test_layouts_are_copied_not_misread():
    spec = ADD_NORM
    tensors = spec.typical.make(torch.float32)
    expected = spec.fast(**tensors, **spec.typical.settings)
    for layout in VARIED:
        got = spec.fast(**{name: layout(t) for name, t in tensors.items()}, **spec.typical.settings)
        for a, b in zip(got, expected):
            check_bits(layout.__name__, a, b)


def _bad_calls():
    """Calls of torch.ops by themselves, which no public function checks."""
    ops = torch.ops.planecycle_fast_cpu
    x, flat = torch.zeros(2, 7, 8), torch.zeros(4, 6)
    where = ("HW", "DW", [2, 2, 3], 1)
    none = [None] * 4
    yield "sizes", lambda: ops.plane_switch(x, "HW", "DW", [2, 2], 1, 2, False, False)
    yield "a size of zero", lambda: ops.plane_switch(x, "HW", "DW", [2, 0, 3], 1, 2, False, False)
    yield "rows", lambda: ops.plane_switch(x, "HW", "DW", [2, 2, 2], 1, 2, False, False)
    yield "via", lambda: ops.plane_switch(x, *where, 0, False, False)
    yield "plane", lambda: ops.plane_switch(x, "HV", "DW", [2, 2, 3], 1, 2, False, False)
    yield "norm", lambda: ops.add_norm(x, *none, *where, 2, False, "batch", 1e-6, None)
    yield "a short weight", lambda: ops.add_norm(x, None, None, x[0, 0, :3], None, *where, 2, False, "rms", 1e-6, None)
    yield "a weight of two axes", lambda: ops.add_norm_(x, x, None, flat, None, "rms", 1e-6, x.clone())
    yield "branch", lambda: ops.add_norm(x, x[:1], None, None, None, *where, 2, False, "rms", 1e-6, None)
    backward = (x, x.new_zeros(2, 7), x.new_zeros(2, 7), None, None, None, "HW", "HW", [2, 2, 3], 1, 2, False)
    rest = ([False] * 3, torch.float32, None, torch.float32)
    yield "no gradient", lambda: ops.add_norm_backward(None, None, *backward, "none", *rest)
    yield "gradient", lambda: ops.add_norm_backward(x[:, :3], None, *backward, "none", *rest)
    heads, table = torch.zeros(2, 7, 3, 8), [torch.zeros(6, 4)]
    settings = ([], [], "", False, False, torch.float32, torch.float32)
    yield "turned", lambda: ops.rope(heads, False, 1, 4, False, [6], table, table, *settings)
    yield "tables", lambda: ops.rope(heads, False, 1, 3, False, [6], [t[:, :3] for t in table], table, *settings)
    yield "length", lambda: ops.rope(heads, False, 2, 3, False, [6], table, table, *settings)
    yield "value", lambda: ops.swiglu(flat, flat[:2])
    yield "grad", lambda: ops.swiglu_backward(flat[:, :2], flat, flat)


@pytest.mark.parametrize("call", [call for _, call in _bad_calls()], ids=[name for name, _ in _bad_calls()])
def test_operations_called_by_themselves_refuse_what_would_crash(call):
    with pytest.raises(ValueError):
        call()


def test_nothing_in_place():
    empty = torch.empty(0, 3, 8)
    torch.ops.planecycle_fast_cpu.add_norm_(empty, empty.clone(), None, None, None, "layer", 1e-6, empty.clone())


SIZES = (2, 1100, 1000)  # with 1,024 channels more than 2^31 elements


@pytest.fixture
def past_2_31():
    """Rows of zeros and a last one of random values, (2, 1100*1000, 1024) in bfloat16: 4.2 GiB."""
    if psutil.virtual_memory().available < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    x = torch.zeros(2, 1100 * 1000, 1024, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1, -1] = torch.randn(1024)
    return x


@pytest.mark.full
@torch.no_grad()
def test_plane_switch_past_2_31(past_2_31):
    out = PLANE_SWITCH.fast(past_2_31, HW, DW, SIZES, 0, transition(2, 1100, 2))
    assert torch.equal(out[-1, -1], past_2_31[-1, -1]) and not out[-1, :-1].any() and not out[0, 0].any()


@pytest.mark.full
@torch.no_grad()
def test_add_norm_past_2_31(past_2_31):
    norm, branch = Norm(None, None, 1e-6), past_2_31.clone()
    expected = add_norm_ref(past_2_31[-1:, -1:], branch[-1:, -1:], None, norm)
    normed = torch.empty_like(past_2_31)
    add_norm_in_place(past_2_31, branch, None, norm, normed)
    torch.testing.assert_close((past_2_31[-1:, -1:], normed[-1:, -1:]), expected)
    assert not normed[0, 0].any()


@pytest.mark.full
@torch.no_grad()
def test_rope_past_2_31(past_2_31):
    angles = [torch.rand(n, 256) for n in SIZES[1:]]
    tables = Tables(tuple([a.sin() for a in angles]), tuple([a.cos() for a in angles]))
    last = Tables(*[tuple([t[-1:] for t in ts]) for ts in tables])
    expected = rope_ref(past_2_31[-1:, -1:, None].clone(), last, 0)
    got = rope(past_2_31[:, :, None], tables, 0, inplace=True, backend="cpu")
    torch.testing.assert_close(got[-1:, -1:], expected)
    assert not got[0, 0].any()


@pytest.mark.full
@torch.no_grad()
def test_swiglu_past_2_31(past_2_31):
    expected = swiglu_ref(past_2_31[-1, -1], past_2_31[-1, -1])
    got = swiglu(past_2_31, past_2_31.clone(), inplace=True, backend="cpu")
    torch.testing.assert_close(got[-1, -1], expected)
    assert not got[0, 0].any()
