"""What every operation must pass, each a function of a `Spec` and a `Case` that raises AssertionError.

`harness.op_tests` turns all of them on for an operation; `test_planted_faults.py` shows what each one catches.
"""

import itertools
import math

import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

from .budget import BudgetError, Errors, check, check_bits, check_footprint, errors
from .interpreter import poisoned
from .layouts import contiguous
from .recorder import recording
from .traffic import Traffic

ELEMENTS = 4096  # that a reference's largest error is taken from, where eight random inputs have as many


def run(function, tensors, settings, needed=None, upstream=contiguous, seed=0):
    """Outputs and gradients of one call, by name; of the tensors in `needed`, or all. Empty memory is poisoned.

    Incoming gradients are random, by `seed`, and laid out by `upstream`.
    """
    needed = list(tensors) if needed is None else needed
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in tensors.items()}
    with poisoned():
        outs = function(**leaves, **settings)
        outs = outs if isinstance(outs, tuple) else (outs,)
        results = {f"out[{i}]" if len(outs) > 1 else "out": out.detach() for i, out in enumerate(outs)}
        differentiable = [out for out in outs if out.requires_grad]
        if differentiable:
            grads = [upstream(_like(out, 1000 * seed + i)) for i, out in enumerate(differentiable)]
            inputs = [leaves[name] for name in needed]
            found = torch.autograd.grad(differentiable, inputs, grads, allow_unused=True)
            results |= {f"grad of {name}": g for name, g in zip(needed, found)}
    return results


def _like(out, seed):
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return values.to(out.dtype)


def _each_group(spec, settings, *results):
    """(name, tensors, whether exact) of every group of every result."""
    for name in results[0]:
        parts = [spec.groups(result[name], settings) for result in results]
        for group in parts[0]:
            yield f"{name}, {group}", [part[group] for part in parts], group in spec.exact


def error_budget(spec, case, dtype, layout=contiguous, upstream=contiguous):
    """Outputs and every gradient within the budget, groups that only move bit for bit.

    The reference's largest error is that of several random inputs: a few elements have errors of zero by luck.
    """

    def compute(seed):
        tensors = {name: layout(t) for name, t in case.make(dtype, seed).items()}
        wide = {name: t.double() for name, t in tensors.items()}
        reference = run(spec.reference, tensors, case.settings, upstream=upstream, seed=seed)
        exact = run(spec.reference, wide, case.settings, None, lambda g: upstream(g.to(dtype)).double(), seed)
        return tensors, reference, exact

    measured = {}
    draws = min(8, 1 + ELEMENTS // (1 + min(math.prod(shape) for shape in case.tensors.values())))
    for seed in reversed(range(draws)):
        tensors, reference, exact = compute(seed)
        for name, (b, c), moves in _each_group(spec, case.settings, reference, exact):
            if not moves:
                measured[name] = errors(name, b, c).worse(measured.get(name, Errors()))
    got = run(spec.fast, tensors, case.settings, upstream=upstream)
    for name, (a, b, c), moves in _each_group(spec, case.settings, got, reference, exact):
        if moves:
            check_bits(name, a, b)
        else:
            check(name, a, c, measured[name])


def derivatives(spec, case):
    """gradcheck in float64; double backward and forward mode right, or an error."""
    tensors = case.make(torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    call = _call(spec, case)
    try:
        torch.autograd.gradcheck(call, leaves, check_forward_ad=spec.forward_mode, check_batched_grad=False)
        if spec.twice:
            torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(f"gradcheck: {error}") from error
    if not spec.forward_mode:
        _raises(lambda: _forward_mode(call, leaves), "forward mode")
    if not spec.twice:
        _raises(lambda: torch.autograd.gradgradcheck(call, leaves), "double backward")


def _call(spec, case):  # as a function of the tensors alone
    return lambda *tensors: spec.fast(**dict(zip(case.tensors, tensors)), **case.settings)


def _forward_mode(call, leaves):
    with forward_ad.dual_level():
        call(*[forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in leaves])


def _raises(function, what):
    try:
        function()
    except (NotImplementedError, RuntimeError):
        return
    raise AssertionError(f"{what} neither works nor raises")


def forward_mode_without_gradients(spec, case):
    """Forward mode where nothing requires a gradient: torch's custom operations give zeros there, silently."""
    tensors = case.make(torch.float64)
    if not spec.forward_mode:
        _raises(lambda: _forward_mode(_call(spec, case), tensors.values()), "forward mode")
        return
    tangents = {name: _like(t, 5) for name, t in tensors.items()}
    results = []
    for function in (spec.fast, spec.reference):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(t, tangents[name]) for name, t in tensors.items()}
            outs = function(**duals, **case.settings)
            outs = outs if isinstance(outs, tuple) else (outs,)
            results.append([forward_ad.unpack_dual(out).tangent for out in outs])
    for got, expected in zip(*results):
        assert got is not None, "forward mode: no tangent, expected one"
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12), "forward mode: the tangent is wrong"


def needed_gradients(spec, case):
    """Every subset of needed gradients gives the same gradients as all of them, and no others."""
    tensors = case.make(torch.float32)
    everything = run(spec.fast, tensors, case.settings)
    for count in range(len(tensors) + 1):
        for needed in itertools.combinations(tensors, count):
            for name, value in run(spec.fast, tensors, case.settings, needed).items():
                check_bits(f"{name}, where {needed or 'nothing'} needs a gradient", value, everything[name])


def opcheck(spec, case, layout=contiguous):
    """torch's own check of the registered operation: schema, fake, autograd, tracing."""
    tensors = {name: layout(t) for name, t in case.make(torch.float32).items()}
    for needs_grad in (False, True):
        arguments = {name: t.detach().requires_grad_(needs_grad) for name, t in tensors.items()}
        for call in spec.op_arguments(arguments, case.settings):
            try:
                torch.library.opcheck(spec.op.overload, call)
            except Exception as error:  # opcheck raises many kinds
                raise AssertionError(f"opcheck: {error}") from error


def compiled(spec, case, dynamic=False):
    """torch.compile takes it as one graph, forward and backward, and gives what eager gives."""
    torch._dynamo.reset()
    tensors = case.make(torch.float32)
    function = torch.compile(spec.fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    _equal(run(function, tensors, case.settings), run(spec.fast, tensors, case.settings), "compiled")


def layouts(spec, case, dtype, layout):
    """Any layout of inputs and of incoming gradients gives what contiguous copies give."""
    tensors = {name: layout(t) for name, t in case.make(dtype).items()}
    clones = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    got = run(spec.fast, tensors, case.settings, upstream=layout)
    expected = run(spec.fast, clones, case.settings, upstream=lambda g: layout(g).clone())
    _equal(got, expected, layout.__name__)


def _equal(got, expected, where):
    assert got.keys() == expected.keys()
    for name in got:
        check_bits(f"{name}, {where}", got[name], expected[name])


def zero_sizes(spec, case):
    """Nothing in, nothing out, in both directions, with the reference's shapes."""
    tensors = case.make(torch.float32)
    got, expected = (run(f, tensors, case.settings) for f in (spec.fast, spec.reference))
    _equal(got, expected, "empty")


def gradient_of_a_sum(spec, case, dtype=torch.float32):
    """Incoming gradients of stride 0, as ``y.sum()`` gives them, and those of a transposed consumer."""
    results = []
    for function in (spec.fast, spec.reference):
        leaves = {name: t.requires_grad_() for name, t in case.make(dtype).items()}
        outs = function(**leaves, **case.settings)
        outs = outs if isinstance(outs, tuple) else (outs,)
        first = torch.autograd.grad([o.sum() for o in outs], list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad([(o.mT * 2).sum() for o in outs], list(leaves.values()))
        results.append([*first, *second])
    for i, (got, expected) in enumerate(zip(*results)):
        if not torch.allclose(got, expected, rtol=1e-5, atol=1e-5):
            raise BudgetError(f"gradient {i} of a sum differs from the reference's")


def nan_footprint(spec, case, dtype=torch.float32):
    """One NaN or infinity in any group of any input, or of the incoming gradient, spreads as in the reference."""
    clean = case.make(dtype)
    for name, value in itertools.product(clean, (float("nan"), float("inf"))):
        for group in spec.groups(clean[name], case.settings):
            tensors = case.make(dtype)
            rows = spec.groups(tensors[name], case.settings)[group]
            if rows.numel():
                rows[rows.shape[0] // 2, -1, rows.shape[2] // 2] = value
                _compare_footprints(spec, case, tensors, contiguous, f"{value} in {name}, {group}")

    def spoil(g):
        g[..., -1, 0] = float("nan")
        g[0, 0, -1] = float("nan")
        return g

    _compare_footprints(spec, case, clean, spoil, "nan in the incoming gradient")


def _compare_footprints(spec, case, tensors, upstream, where):
    got, expected = (run(f, tensors, case.settings, upstream=upstream) for f in (spec.fast, spec.reference))
    for name in got:
        check_footprint(f"{name}, {where}", got[name], expected[name])
        check_footprint(f"{name}, {where}, infinite", *[_infinite_as_nan(r[name]) for r in (got, expected)])


def _infinite_as_nan(t):
    return t.masked_fill(t.isinf(), float("nan"))


def repeatable(spec, case, dtype):
    """Two runs give the same bits."""
    tensors = case.make(dtype)
    _equal(*[run(spec.fast, tensors, case.settings) for _ in range(2)], "again")


def autocast(spec, case, dtype=torch.float32):
    """Autocast changes neither the dtype nor a bit: nothing here is a matrix product."""
    tensors = case.make(dtype)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return spec.fast(**arguments)

    _equal(run(under_autocast, tensors, case.settings), run(spec.fast, tensors, case.settings), "under autocast")


def declared_cost(spec, case, dtype, layout=contiguous):
    """The bytes and launches an operation declares are those of its kernels, and its body does nothing beside them."""
    tensors = {name: layout(t) for name, t in case.make(dtype).items()}
    for call in spec.op_arguments(tensors, case.settings):
        declared = spec.op.cost(*call)
        with recording() as record, Traffic(ops={}) as beside:
            spec.op.body(*call)
        if beside.rows:
            hidden = {name: (row.read, row.written) for name, row in beside.rows.items()}
            raise AssertionError(f"the body of {spec.op.name} moves data beside its kernels: {hidden} bytes")
        recorded = (record.read, record.written, sum(record.launches.values()))
        if tuple(declared) != recorded:
            raise AssertionError(f"{spec.op.name} declares (read, written, launches) {tuple(declared)}, ran {recorded}")
