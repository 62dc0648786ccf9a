"""Plans launch what bodies do: same kernels, grids, arguments and outputs, at the addresses of the tensors at hand.

Nothing is compiled: triton's kernels are replaced by what notes how they are called.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, whose launches are planned")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is planned under TRITON_INTERPRET=1", allow_module_level=True)

from planecycle_fast.ops import registration
from planecycle_fast.ops.eager import KnownCall, listed_calls
from planecycle_fast.ops.launch_plans import LaunchPlan, described, unwatched

from ..specs import SPECS

PLANNED = [spec for spec in SPECS if not spec.opaque]
CASES = [
    pytest.param(spec, case, id=f"{spec.op.name} {case.name}")
    for spec in PLANNED
    for case in (spec.typical, *spec.cases[:4], *spec.small, *spec.empty)
    if case.only is None
]


class NoGpu:
    def get_current_stream(self, device):
        return 7


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, stream, values of all parameters) of every launch on the CPU, by way of triton or of a plan."""
    found = []

    def compiled(kernel):
        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
            assert function == kernel.__name__ and (metadata, launch_metadata, enter, leave) == (
                "packed",
                None,
                None,
                None,
            )
            found.append((kernel.__name__, (x, y, z), stream, values))

        return SimpleNamespace(run=run, function=kernel.__name__, packed_metadata="packed")

    def run(kernel, *args, grid, warmup, **constants):
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args)) | {name: constants[name] for name in names if name in constants}
        found.append((kernel.__name__, (*grid, 1, 1)[:3], 7, tuple([given[name] for name in names])))
        return compiled(kernel)

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    for op in registration.OPS.values():
        monkeypatch.setattr(op.eager, "devices", ("cpu",))
        monkeypatch.setattr(op.eager, "_plans", {})
    return found


def calls_of(spec, case, seed=0):
    return spec.op_arguments(case.make(torch.float32, seed), case.settings)


def tensors_of(args):
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]


def located(launches, tensors):
    """Launches with (number of the tensor, bytes from its start) in the place of tensors and addresses."""

    def place(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if not isinstance(value, int) or value < 2**32:  # no address
            return value
        inside = [(i, value - t.data_ptr()) for i, t in enumerate(tensors) if 0 <= value - t.data_ptr() < t.nbytes]
        return inside[0] if inside else "an address of its own"

    return [(name, grid, stream, [place(value) for value in values]) for name, grid, stream, values in launches]


def outs(out):
    return [] if out is None else [out] if isinstance(out, torch.Tensor) else list(out)


def alike(a, b):
    return [(t.shape, t.stride(), t.dtype, t.device) for t in outs(a)] == [
        (t.shape, t.stride(), t.dtype, t.device) for t in outs(b)
    ]


@pytest.mark.parametrize("spec, case", CASES)
def test_plans_launch_what_bodies_do(launches, spec, case):
    first, again = calls_of(spec, case), calls_of(spec, case, seed=1)
    for (op, args), (_, others) in zip(first, again):
        launches.clear()
        by_body = unwatched(op.body, args)
        expected = located(launches, tensors_of(args) + outs(by_body))
        launches.clear()
        with torch.no_grad():
            op(*args)
            assert op.eager._plans
            launches.clear()
            out = op(*others)
        call = described(others)
        assert isinstance(op.eager._plans[call.key], LaunchPlan)
        assert located(launches, tensors_of(others) + outs(out)) == expected
        assert alike(out, by_body) and type(out) is type(by_body)


def add_norm_arguments(rows=6, channels=16, dtype=torch.float32):
    x, branch = torch.randn(2, 1, rows, channels, dtype=dtype).unbind(0)
    vectors = torch.ones(3, channels, dtype=dtype).unbind(0)
    return [x, branch, *vectors, "HW", "HW", [1, 1, rows], 0, 1, False, "layer", 1e-6, None]


@pytest.fixture
def op(launches):
    import planecycle_fast.ops.residual.add_norm_triton

    return planecycle_fast.ops.residual.add_norm_triton.OP


def test_kinds_of_calls_have_plans_of_their_own(op, launches):
    for args in (
        add_norm_arguments(), add_norm_arguments(rows=7), add_norm_arguments(channels=32),
        add_norm_arguments(dtype=torch.float64), [*add_norm_arguments()[:-3], "rms", 1e-6, None],
        [*add_norm_arguments()[:-2], 1e-3, None], [*add_norm_arguments()[:-1], torch.bfloat16],
    ):  # fmt: skip
        before = len(op.eager._plans)
        op(*args)
        op(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
        assert len(op.eager._plans) == before + 1


def test_addresses_that_are_not_aligned_are_another_kind(op):
    args = add_norm_arguments()
    op(*args)
    shifted = torch.empty(args[0].numel() + 1)[1:].view_as(args[0])
    op(shifted, *args[1:])
    assert len(op.eager._plans) == 2


def test_one_tensor_in_two_places_is_another_kind(op, launches):
    x, branch, *rest = add_norm_arguments()
    for twice in (x, branch, x.clone()):
        op(twice, twice, *rest)
        op(x, branch, *rest)
        launches.clear()
        op(twice, twice, *rest)
        op(branch, x, *rest)
        (*_, values), (*_, others) = launches
        assert values[:2] == (twice.data_ptr(), twice.data_ptr())
        assert others[:2] == (branch.data_ptr(), x.data_ptr())
    assert len(op.eager._plans) == 2


def test_few_plans_are_kept(op, monkeypatch):
    from planecycle_fast.ops import eager

    monkeypatch.setattr(eager, "MOST", 3)
    for rows in range(1, 10):
        op(*add_norm_arguments(rows))
        assert 1 <= len(op.eager._plans) <= 3


def test_hooks_on_launches_see_all(op, launches, monkeypatch):
    args = add_norm_arguments()
    op(*args)
    launches.clear()
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    op(*args)
    assert [type(value) for value in launches[0][3][:2]] == [torch.Tensor] * 2  # by triton itself


def test_bodies_that_do_more_have_no_plan(op, monkeypatch):
    body = op.eager.body
    monkeypatch.setattr(op.eager, "body", lambda *args: tuple([t.zero_() for t in body(*args)]))
    for _ in range(2):
        assert not any([t.count_nonzero() for t in op(*add_norm_arguments())])
    assert [*op.eager._plans.values()] == [None]


def test_gradients_go_by_the_same_formulas(op, launches):
    """The node of the graph has the registered formula's gradients, and launches what it launches."""
    found = []
    for run in (op, op.overload):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in map(_clone, add_norm_arguments())]
        launches.clear()
        out = run(*args)
        assert out[0].grad_fn is not None and not out[2].requires_grad
        (out[0].sum() + out[1].sum()).backward()
        assert all([a.grad.shape == a.shape for a in args[:5]])
        found.append([name for name, *_ in launches])
    assert found[0] == found[1] == ["add_norm_kernel", "add_norm_backward_kernel", "column_sums_kernel"]


def _clone(a):
    return a.detach().clone() if isinstance(a, torch.Tensor) else a


def test_what_is_written_in_place_has_a_new_version(launches):
    from planecycle_fast.ops.rotary.rope_triton import IN_PLACE

    x, table = torch.randn(1, 4, 2, 8), torch.zeros(4, 4)
    arguments = False, 0, 2, False, [4], [table], [table + 1], [], [], "", False, False, torch.float32, torch.float32
    for expected in (1, 2):
        assert IN_PLACE(x, *arguments) is None and x._version == expected
    [kept] = IN_PLACE.eager._plans.values()
    assert isinstance(kept, LaunchPlan)


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_operation(op):
    args = add_norm_arguments()
    with Watching() as watching:
        op(*args)
    assert op.overload in watching.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(*args)
    assert any([event.key == "planecycle_fast::add_norm" for event in profile.key_averages()])
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: op(x, *args[1:])[0])(args[0])
    assert op.overload in {node.target for node in graph.graph.nodes}


def test_other_tensors_go_through_the_dispatcher(op):
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    seen, args = [], add_norm_arguments()
    op(args[0].as_subclass(Own), *args[1:])
    assert op.overload in seen
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    with mock.patch.object(op.eager, "run", side_effect=AssertionError):
        assert op(*meta)[0].device.type == "meta"


def test_known_calls(op, launches):
    args = add_norm_arguments()
    with listed_calls() as calls:
        op(*args)
    known = KnownCall(calls[0], 2)
    assert known.holds()
    launches.clear()
    x, branch = torch.randn_like(args[0]), torch.randn_like(args[1])
    out = known(x, branch)
    [(_, _, _, values)] = launches
    assert values[:3] == (x.data_ptr(), branch.data_ptr(), args[2].data_ptr()) and out[0].shape == x.shape
    args[3].data = args[3].data.clone()
    assert not known.holds()
