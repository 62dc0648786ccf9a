"""What the test bed needs to know of an operation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call: shapes of the tensors by argument name, and all other arguments."""

    tensors: dict[str, tuple[int, ...]]
    settings: dict[str, Any]
    name: str = ""
    narrower: dict[str, torch.dtype] = field(default_factory=dict)  # of some tensors where others are float32: autocast
    only: torch.dtype | None = None  # the dtype it is about, and runs in
    draws: int = 1  # of random inputs, at least, whose reference's errors are its budget: more where elements share one

    def make(self, dtype, seed=0, device="cpu"):
        """Random tensors by argument name, the same at every call; on `meta` without values."""
        dtypes = {name: self.narrower.get(name, dtype) if dtype == torch.float32 else dtype for name in self.tensors}
        if device == "meta":
            return {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in self.tensors.items()}
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes[name])
            for name, shape in self.tensors.items()
        }

    @property
    def wide_settings(self):
        """Settings without dtypes: nothing is rounded to one on the way."""
        return {name: None if isinstance(value, torch.dtype) else value for name, value in self.settings.items()}


@dataclass(frozen=True)
class Spec:
    """An operation under test. `fast` and `reference` take a case's tensors and settings as keyword arguments."""

    op: Any  # the registered `CustomOp`
    fast: Callable[..., Any]
    reference: Callable[..., Any]  # torch operations only
    op_arguments: Callable[..., list[tuple]]  # of (tensors, settings): (op, arguments) of all calls, backward's too
    typical: Case  # nothing special: every size at least 2
    plain: list[Case]  # of round sizes, what a simple test would take
    cases: list[Case]  # named, awkward
    small: list[Case]  # a few, tiny, for checks that call often (gradcheck, opcheck, torch.compile)
    empty: list[Case]  # with sizes of zero
    huge: list[Case]  # past 2^31 elements, 100,000 slices and up to what the operation takes; never allocated
    strategy: Callable[[], Any]  # hypothesis' strategy for cases; hypothesis may be missing until then
    groups: Callable[..., dict[str, torch.Tensor]]  # of (tensor, settings): rows that are judged separately
    exact: frozenset[str] = field(default_factory=frozenset)  # groups that only move: bit for bit
    forward_mode: bool = True  # whether forward-mode derivatives are right; if not they must raise
    cancels: bool = False  # whether it subtracts sums, so that their order says which infinities become NaN
    twice: bool = True  # whether backward can be differentiated; if not it must raise
    factors: dict[str, list] = field(default_factory=dict)  # of the codegen gate: what its cases are made of
    factors_case: Callable[..., Case] | None = None  # a case of one value of every factor
    wide: Callable[[dict], bool] = lambda choice: False  # of a choice of factors: whether rows take 16-byte accesses
    exempt: int = 0  # how many accesses of a kernel may be narrower: vectors per channel, statistics, tables
    slow_builds: bool = (
        False  # a build takes seconds: `make test` compiles few of them, and leaves the rest to the table
    )
    tensor_cores: bool = False  # whether its kernels claim to use them
    any_strides: bool = True  # of what op takes; if not, the public function copies
    dtypes: tuple = (torch.float32, torch.float16, torch.bfloat16)  # taken; if float32, float64 too
    differentiable: bool = True  # if not, differentiating it must raise
    opaque: bool = False  # whether torch.compile sees one call, and no kernels
    architectures: tuple = (80, 90, 100, 120)  # that it runs on
    any_alignment: bool = True  # of what op takes; if not, the public function copies what is not aligned to 16 bytes
    every_dtype: bool = True  # whether each case runs in every dtype, or in one of them by turns
    others: tuple = ()  # registered operations that nobody differentiates: of its backward, in place
    uncounted: frozenset[str] = field(default_factory=frozenset)  # arguments of kernels that the ledger leaves out
    once: frozenset[str] = field(default_factory=frozenset)  # those that it counts once however often they are loaded
    with_symbols: Callable[[Case], Case] = lambda case: case  # a case as torch.compile may call the operation
    compiled_for: frozenset[str] = frozenset()  # arguments of operations that may become numbers, besides channels
    outputs: dict[str, set[str]] = field(default_factory=dict)  # of each kernel: the arguments that it may write to

    @property
    def ops(self):
        """All registered operations that are tested by it."""
        return (self.op, *self.others)

    def in_dtypes(self, every=True):
        """(case, dtype): each case in every dtype, or in one of them by turns."""
        for i, case in enumerate(self.cases):
            one = case.only or (torch.float32 if case.narrower else self.dtypes[i % len(self.dtypes)])
            for dtype in self.dtypes if every and self.every_dtype and not case.only else [one]:
                yield case, dtype
