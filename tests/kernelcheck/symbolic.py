"""Sizes that are symbols, as torch.compile gives them to an operation where shapes may change; needs no GPU.

An operation's body runs on tensors without data, with a symbol for every size and every integer of the call. A symbol
has no hash: it can be no key of a table, and no argument of a function whose results are kept. What a kernel is
compiled for must be numbers; channels, the last axes, may become numbers on the way, as a model has as many for good.
Any other size must stay a symbol, or a graph serves one shape only. Not under TRITON_INTERPRET=1.
"""

import inspect
import logging
from unittest import mock

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from .launches import recorded_launches


def symbolic_sizes(spec, case, dtype=torch.float32):
    """All calls of a case, backward's too, with symbols for sizes."""
    case = spec.with_symbols(case)
    for op, call in spec.op_arguments(case.make(dtype, device="meta"), case.settings):
        trace(op, call, spec.compiled_for)


def trace(op, call, fixed=()):
    """One call of an operation. Raises AssertionError for what a symbol must not become.

    `fixed` are names of arguments that are numbers, as kernels are compiled for them.
    """
    symbols, names = Symbols(), inspect.signature(op.body).parameters
    call = [a if name in fixed else tree_map(symbols.of, a) for name, a in zip(names, call)]
    fixed_before = {name for name, size in symbols.sizes.items() if not _is_symbol(size)}  # sizes of 0 and 1
    with recorded_launches(op.body) as launches, symbols.mode:
        try:
            with mock.patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "error"):  # it is raised too
                op.overload(*call)
        except TypeError as error:
            raise AssertionError(f"{op.name} cannot take sizes that are symbols: {error}") from error
    for launch in launches:
        for name, value in launch.constants.items():
            is_symbol = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
            assert not is_symbol, (
                f"{op.name}: {launch.kernel.__name__} would be compiled for a symbol, {name} = {value}"
            )
    for name, size in symbols.sizes.items():
        assert _is_symbol(size) or name in fixed_before, f"{op.name}: {name} became the number {size}"
    return launches


class Symbols:
    """Makes symbols of sizes, and keeps those that must stay symbols, by name."""

    def __init__(self):
        self.mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))  # not one symbol for what is equal by chance
        self.sizes = {}
        self.count = 0

    def of(self, argument):
        """A tensor or an integer with symbols in place of numbers; anything else as it is."""
        self.count += 1
        if isinstance(argument, torch.Tensor):
            fake = self._fake(argument)
            self.sizes |= {f"axis {i} of tensor {self.count}": size for i, size in enumerate(fake.shape[:-1])}
            return fake
        if type(argument) is int:
            (size,) = self._fake(torch.empty(argument, device="meta")).shape
            self.sizes[f"integer {self.count}"] = size
            return size
        return argument

    def _fake(self, t):
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.ndim)
        return self.mode.from_tensor(t, symbolic_context=context, source=ConstantSource(f"argument_{self.count}"))


def _is_symbol(size):
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number  # as far as guards have told
