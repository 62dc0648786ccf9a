"""What every operation must pass, each a function of a `Spec` and a `Case` that raises AssertionError.

`harness.op_tests` turns all of them on for an operation; `test_planted_faults.py` shows what each one catches.
"""

import itertools
import math
import re
from contextlib import nullcontext

import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

from planecycle_fast.cost.traffic import Traffic

from .budget import Errors, check, check_bits, check_footprint, errors
from .interpreter import poisoned
from .layouts import constant, contiguous
from .overflow import MANY_SLICES, probing
from .recorder import recording

VALUES = 256  # different ones that a reference's largest error is taken from, where 32 random inputs have as many


def run(function, tensors, settings, needed=None, upstream=contiguous, seed=0, like=None):
    """Outputs and gradients of one call, by name; of the tensors in `needed`, or all. Empty memory is poisoned.

    Incoming gradients are random, by `seed`, rounded as the outputs of `like`, another run, and laid out by `upstream`.
    """
    needed = list(tensors) if needed is None else needed
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in tensors.items()}
    with poisoned():
        outs = function(**leaves, **settings)
        outs = tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)
        named = {f"out[{i}]" if len(outs) > 1 else "out": out for i, out in enumerate(outs)}
        results = {name: out.detach() for name, out in named.items()}
        dtypes = {name: t.dtype for name, t in (like or results).items()}
        seeds = {name: 1000 * seed + i for i, name in enumerate(named)}
        named = {name: out for name, out in named.items() if out.requires_grad}
        differentiable = list(named.values())
        if differentiable:
            grads = [upstream(_like(out, seeds[name]).to(dtypes[name])).to(out.dtype) for name, out in named.items()]
            inputs, before = [leaves[name] for name in needed], [g.clone() for g in grads]
            found = torch.autograd.grad(differentiable, inputs, grads, allow_unused=True)
            results |= {f"grad of {name}": g for name, g in zip(needed, found) if g is not None}
            for g, unchanged in zip(grads, before):
                check_bits("incoming gradient, after backward", g, unchanged)
    return results


def _like(out, seed):
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return values.to(out.dtype)


def _each_group(spec, settings, *results):
    """(name, tensors, whether exact) of every group of every result."""
    _same_names(*results)
    for name in results[0]:
        parts = [spec.groups(result[name], settings) for result in results]
        for group in parts[0]:
            yield f"{name}, {group}", [part[group] for part in parts], group in spec.exact


def _same_names(*results):  # outputs, and which gradients there are
    for result in results:
        assert result.keys() == results[0].keys(), f"{list(results[0])} came out, expected {list(result)}"


def error_budget(spec, case, dtype, layout=contiguous, upstream=contiguous):
    """Outputs and every gradient within the budget, groups that only move bit for bit.

    The reference's largest error is that of several random inputs: a few elements have errors of zero by luck.
    """

    def compute(seed):
        tensors = {name: layout(t) for name, t in case.make(dtype, seed).items()}
        wide = {name: t.double() for name, t in tensors.items()}
        reference = run(spec.reference, tensors, case.settings, upstream=upstream, seed=seed)
        exact = run(spec.reference, wide, case.wide_settings, None, upstream, seed, reference)
        return tensors, reference, exact

    measured, values = {}, {}
    tensors, reference, exact = compute(0)
    for seed in range(32):
        _, more, more_exact = (tensors, reference, exact) if seed == 0 else compute(seed)
        for name, (b, c), moves in _each_group(spec, case.settings, more, more_exact):
            if not moves and c.numel():
                measured[name] = errors(name, b, c).worse(measured.get(name, Errors(b.dtype)))
                values[name] = values.get(name, 0) + c.unique().numel()
        if seed + 1 >= case.draws and all(count >= VALUES for count in values.values()):
            break
    got = run(spec.fast, tensors, case.settings, upstream=upstream)
    for name, (a, b, c), moves in _each_group(spec, case.settings, got, reference, exact):
        if moves:
            check_bits(name, a, b)
        else:
            check(name, a, c, measured.get(name, Errors(b.dtype)))


def float64(spec, case):
    """Outputs and gradients in float64 to 1e-12: gradcheck has tiny sizes, and would not see a cast on the way."""
    if torch.float32 not in spec.dtypes:
        for dtype in (torch.float64, torch.float32):
            try:
                spec.fast(**case.make(dtype), **case.settings)
            except ValueError as error:
                assert str(dtype).removeprefix("torch.") in str(error), f"{dtype} is refused by another reason: {error}"
            else:
                raise AssertionError(f"{spec.op.name} takes {dtype}, of which its spec knows nothing")
        return
    tensors = case.make(torch.float64)
    got, expected = (run(function, tensors, case.wide_settings) for function in (spec.fast, spec.reference))
    _same_names(got, expected)
    for name, result in got.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def plain(spec, case):
    """What tests without a test bed check: outputs and gradients are close to the reference's."""
    tensors, close = case.make(spec.dtypes[0]), {}
    if spec.dtypes[0] != torch.float32:
        close = {"rtol": 0.02, "atol": 0.02}
    results = []
    for function in (spec.fast, spec.reference):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        outs = function(**dict(zip(tensors, leaves)), **case.settings)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        loss = sum((out * _like(out, i)).sum() for i, out in enumerate(outs))
        results.append([*outs, *(torch.autograd.grad(loss, leaves) if spec.differentiable else ())])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, **close)


def derivatives(spec, case):
    """gradcheck in float64; double backward and forward mode right, or an error."""
    if not spec.differentiable:
        leaves = {name: t.requires_grad_() for name, t in case.make(spec.dtypes[0]).items()}
        for op, call in spec.op_arguments(leaves, case.settings):
            _raises(lambda: op.overload(*call).sum().backward(), "a gradient")  # noqa: B023
        return
    tensors = case.make(torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    call = _call(spec, case)
    try:
        torch.autograd.gradcheck(call, leaves, check_forward_ad=spec.forward_mode, fast_mode=True)
        if spec.twice:
            torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(f"gradcheck: {error}") from error
    if not spec.twice:
        _raises(lambda: _twice(call, leaves), "double backward")


def _twice(call, leaves):
    outs = call(*leaves)
    out = sum(o.square().sum() for o in (outs if isinstance(outs, (tuple, list)) else (outs,)))
    grads = torch.autograd.grad(out, leaves, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), leaves)


def _call(spec, case):  # as a function of the tensors alone
    return lambda *tensors: spec.fast(**dict(zip(case.tensors, tensors)), **case.wide_settings)


def _raises(function, what):
    try:
        function()
    except (NotImplementedError, RuntimeError) as error:
        clear = r"forward.mode|forward AD|jvp|twice|double.backward|once_differentiable|has no gradients"
        assert re.search(clear, str(error)), f"{what} raises something else: {error}"
        return
    raise AssertionError(f"{what} neither works nor raises")


def forward_mode(spec, case):
    """Tangents are right, or an error, with and without gradients: torch's custom ops give zeros."""
    tensors = case.make(torch.float64 if torch.float32 in spec.dtypes else spec.dtypes[0])
    tangents = {name: _like(t, 5) for name, t in tensors.items()}

    def tangents_of(function, requires_grad):
        with forward_ad.dual_level():
            leaves = {name: t.detach().requires_grad_(requires_grad) for name, t in tensors.items()}
            duals = {name: forward_ad.make_dual(t, tangents[name]) for name, t in leaves.items()}
            outs = function(**duals, **case.wide_settings)
            outs = tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)
            return [forward_ad.unpack_dual(out).tangent for out in outs]

    for requires_grad in (False, True):
        if not spec.forward_mode:
            _raises(lambda: tangents_of(spec.fast, requires_grad), "forward mode")  # noqa: B023
            continue
        for got, expected in zip(tangents_of(spec.fast, requires_grad), tangents_of(spec.reference, requires_grad)):
            assert (got is None) == (expected is None), "forward mode: no tangent, expected one"
            if expected is not None:
                assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12), "forward mode: the tangent is wrong"


def needed_gradients(spec, case):
    """Every subset of needed gradients gives the same gradients as all of them, and no others."""
    tensors = case.make(spec.dtypes[0])
    everything = run(spec.fast, tensors, case.settings)
    for count in range(len(tensors) + 1):
        for needed in itertools.combinations(tensors, count):
            got = run(spec.fast, tensors, case.settings, needed)
            _same_names(got, run(spec.reference, tensors, case.settings, needed))
            for name, value in got.items():
                check_bits(f"{name}, where {needed or 'nothing'} needs a gradient", value, everything[name])


def opcheck(spec, case, layout=contiguous, dtype=None):
    """torch's own check of the registered operation: schema, fake, autograd, tracing."""
    tensors = {name: layout(t) for name, t in case.make(dtype or spec.dtypes[0]).items()}
    for needs_grad in (False, True):
        arguments = {name: t.detach().requires_grad_(needs_grad) for name, t in tensors.items()}
        for op, call in spec.op_arguments(arguments, case.settings):
            if op in spec.others or not spec.differentiable:  # nobody may differentiate it
                call = [a.detach() if isinstance(a, torch.Tensor) else a for a in call]
            try:
                torch.library.opcheck(op.overload, call)
            except Exception as error:  # opcheck raises many kinds
                raise AssertionError(f"opcheck: {error}") from error


def compiled(spec, case, dynamic=False, dtype=None):
    """torch.compile takes it as one graph, forward and backward, and gives what eager gives."""
    torch._dynamo.reset()
    case = spec.with_symbols(case)
    tensors = case.make(dtype or spec.dtypes[0])
    function = torch.compile(spec.fast, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    _equal(run(function, tensors, case.settings), run(spec.fast, tensors, case.settings), "compiled")


def layouts(spec, case, dtype, layout):
    """Any layout of inputs and of incoming gradients gives what contiguous copies give."""
    tensors = {name: layout(t) for name, t in case.make(dtype).items()}
    clones = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    got = run(spec.fast, tensors, case.settings, upstream=layout)
    expected = run(
        spec.fast, clones, case.settings, upstream=lambda g: layout(g).clone(memory_format=torch.contiguous_format)
    )
    _equal(got, expected, layout.__name__)


def _equal(got, expected, where):
    _same_names(got, expected)
    for name in got:
        check_bits(f"{name}, {where}", got[name], expected[name])


def zero_sizes(spec, case):
    """Nothing in, nothing out, in both directions, with the reference's shapes."""
    tensors = case.make(spec.dtypes[0])
    got, expected = (run(f, tensors, case.settings) for f in (spec.fast, spec.reference))
    _equal(got, expected, "empty")


def gradient_of_a_sum(spec, case):
    """Incoming gradients of stride 0, as ``y.sum()`` gives them, and those of a transposed consumer, in budget."""
    dtype = spec.dtypes[0]
    error_budget(spec, case, dtype, upstream=constant)
    error_budget(spec, case, dtype, upstream=lambda g: g.mT.contiguous().mT if g.ndim > 1 else g)


def nan_footprint(spec, case):
    """One NaN or infinity in any group of any input, or of the incoming gradient, spreads as in the reference."""
    dtype = spec.dtypes[0]
    clean = case.make(dtype)
    for name, value in itertools.product(clean, (float("nan"), float("inf"))):
        for group in spec.groups(clean[name], case.settings):
            tensors = case.make(dtype)
            rows = spec.groups(tensors[name], case.settings)[group]
            if rows.numel():
                rows[tuple([n // 2 if i != 1 else n - 1 for i, n in enumerate(rows.shape)])] = value
                assert not tensors[name].isfinite().all(), "groups must be views"
                _compare_footprints(spec, case, tensors, contiguous, f"{value} in {name}, {group}")

    def spoil(g):
        for place in (0, g.numel() // 2, -1) if g.numel() else ():
            g.view(-1)[place] = float("nan")
        return g

    _compare_footprints(spec, case, clean, spoil, "nan in the incoming gradient")


def _compare_footprints(spec, case, tensors, upstream, where):
    got, expected = (run(f, tensors, case.settings, upstream=upstream) for f in (spec.fast, spec.reference))
    _same_names(got, expected)
    for name in got:
        if not (spec.cancels and where.startswith("inf")):
            check_footprint(f"{name}, {where}", got[name], expected[name])
        check_footprint(f"{name}, {where}, infinite", *[_infinite_as_nan(r[name]) for r in (got, expected)])


def _infinite_as_nan(t):
    return t.masked_fill(t.isinf(), float("nan"))


def repeatable(spec, case, dtype):
    """Two runs give the same bits."""
    tensors = case.make(dtype)
    _equal(*[run(spec.fast, tensors, case.settings) for _ in range(2)], "again")


def autocast(spec, case):
    """Autocast changes neither the dtype nor a bit: an operation keeps what it is given."""
    tensors = case.make(spec.dtypes[0])

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return spec.fast(**arguments)

    _equal(run(under_autocast, tensors, case.settings), run(spec.fast, tensors, case.settings), "under autocast")


def declared_cost(spec, case, dtype, layout=contiguous):
    """The bytes and launches an operation declares are those of its kernels, and its body does nothing beside them."""
    tensors = {name: layout(t) for name, t in case.make(dtype).items()}
    for op, call in spec.op_arguments(tensors, case.settings):
        declared = op.cost(*call)
        with recording(spec.uncounted, spec.once) as record, Traffic(ops={}) as beside:
            op.body(*call)
        if beside.rows:
            hidden = {name: (row.read, row.written) for name, row in beside.rows.items()}
            raise AssertionError(f"the body of {op.name} moves data beside its kernels: {hidden} bytes")
        for kernel, stored in record.stored.items():
            if not stored <= spec.outputs.get(kernel, set()):
                raise AssertionError(f"{kernel} writes to {stored}, of which its spec knows {spec.outputs.get(kernel)}")
        recorded = (record.read, record.written, sum(record.launches.values()))
        if tuple(declared) != recorded:
            raise AssertionError(f"{op.name} declares (read, written, launches) {tuple(declared)}, ran {recorded}")


def overflow(spec, case, layout=contiguous, dtype=torch.bfloat16, typed=nullcontext):
    """No integer overflows, every address is right and grids fit, at sizes past 2^31, with nothing allocated.

    `typed` is a context that types the arguments of kernels.
    """
    for op, call in spec.op_arguments(case.make(dtype, device="meta"), case.settings):
        with typed(), probing() as probe:
            op.body(*[layout(a) if isinstance(a, torch.Tensor) and spec.any_strides else a for a in call])
        assert probe.launches, f"{op.name} launches nothing"


def huge_cases(spec):
    """The sizes that `overflow` runs at are what they must be."""
    shapes = [shape for case in spec.huge for shape in case.tensors.values()]
    largest, sequences = max(math.prod(shape) for shape in shapes), max(shape[0] for shape in shapes)
    assert largest > 2**31, f"{spec.op.name}: no huge case has more than 2^31 elements, the largest {largest}"
    assert sequences >= MANY_SLICES, f"{spec.op.name}: no huge case has {MANY_SLICES} slices, the most {sequences}"
