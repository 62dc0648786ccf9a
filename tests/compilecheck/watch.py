"""What Inductor does with kernels while it compiles: what it takes to be written to, what it compiles, what fails."""

import logging
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import sympy
import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from triton.runtime.autotuner import Autotuner

from ..kernelcheck.codegen import NARROW_OFFSET, late_widenings, length_names, narrow_lengths
from ..specs import OUTPUTS

ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")  # until torch 2.12, and since
COPIES = re.compile(r"^\s+(?:triton_\w*(?:clone|copy)\w*\.run\(|.*\baten\.(?:clone|copy_)\b)", re.MULTILINE)


@dataclass
class Seen:
    """Of one model."""

    graphs: int = 0  # that Dynamo gave to Inductor
    ours: Counter = field(default_factory=Counter)  # our kernels compiled, by name
    inductors: int = 0  # kernels of Inductor's own, which nobody compiles here
    copies: int = 0  # launches and calls of the generated code that copy
    failures: list[str] = field(default_factory=list)

    def fail(self, text):
        if text not in self.failures:
            self.failures.append(text)


def root(error):
    """The error that caused all others, and where in the package, in one line."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
    telling = lines[-1] if isinstance(error, triton.CompilationError) else lines[0]  # it quotes the source first
    if len(lines) > 1 and lines[1].startswith("Explanation: "):  # Dynamo's
        telling = f"{telling}. {lines[1]}"
    places = re.findall(r"(planecycle_fast/\w+\.py)\", line (\d+)", str(error))
    where = " at {}:{}".format(*places[-1]) if places else ""
    return f"{type(error).__name__}{where}: {telling[:300]}"


class Watch(logging.Handler):
    """Listens to Inductor, which analyses and compiles our kernels only, and each once for all models."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lengths = {}  # of rows: which arguments of a kernel, by its name
        self.seen, self.analysed, self.compiled, self.ttirs, self.analysis_failed = Seen(), {}, {}, [], None

    @contextmanager
    def model(self):
        """Within it: the `Seen` of a model that is compiled."""
        self.seen = Seen()
        log = logging.Logger("analysis")
        log.addHandler(self)
        with ExitStack() as stack:
            for name in ANALYSES:
                if hasattr(triton_kernel_wrap, name):
                    spied = self._analysis(getattr(triton_kernel_wrap, name))
                    stack.enter_context(mock.patch.object(triton_kernel_wrap, name, spied))
            stack.enter_context(mock.patch.object(AsyncCompile, "triton", self._compilation(AsyncCompile.triton)))
            stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", self._code))
            stack.enter_context(mock.patch.object(Scheduler, "graph_partition", self._parts(Scheduler.graph_partition)))
            stack.enter_context(mock.patch.object(triton.knobs.compilation, "listener", self._listen))
            stack.enter_context(mock.patch.object(triton_kernel_wrap, "log", log))
            yield self.seen

    def emit(self, record):  # of the analysis, when it gives up
        if record.exc_info:
            self.analysis_failed = root(record.exc_info[1])

    def _analysis(self, original):
        def analyse(kernel, kwargs, *more):
            key = kernel.fn.__name__, *[(name, _kind(value)) for name, value in kwargs.items()]
            if key not in self.analysed:
                self.analysis_failed = None
                self.analysed[key] = original(kernel, kwargs, *more), self.analysis_failed
                self.lengths[key[0]] = length_names(kernel.fn if isinstance(kernel, Autotuner) else kernel)
            found, failed = self.analysed[key]
            tensors = {name for name, value in kwargs.items() if _has_elements(value)}
            names = found if isinstance(found, list) else [dep.name for dep in found.read_writes.writes]
            self._compare(key[0], set(names) & tensors, tensors, failed)
            return found

        return analyse

    def _compare(self, name, written, tensors, failed):
        if name not in OUTPUTS:
            self.seen.fail(f"{name} has its outputs in no Spec of tests/specs")
        elif failed:
            self.seen.fail(f"{name}: every tensor counts as written to: its analysis failed: {failed}")
        elif written != OUTPUTS[name] & tensors:
            expected = ", ".join(sorted(OUTPUTS[name] & tensors))
            self.seen.fail(f"{name}: {', '.join(sorted(written)) or 'nothing'} found to be written to, not {expected}")

    def _compilation(self, original):
        def compile_kernel(pool, name, source, *more, **options):
            kernel = re.sub(r"_\d+$", "", name)
            if kernel not in OUTPUTS:
                self.seen.inductors += 1
                return
            self.seen.ours[kernel] += 1
            if source not in self.compiled:
                self.ttirs.clear()
                try:
                    original(pool, name, source, *more, **options)
                    self.compiled[source] = _narrow(self.ttirs, self._lengths(kernel, source))
                except Exception as error:
                    self.compiled[source] = root(error)
            if self.compiled[source]:
                self.seen.fail(f"{kernel}: {self.compiled[source]}")

        return compile_kernel

    def _parts(self, original):
        def graph_partition(scheduler):
            partitions, signatures = original(scheduler)
            if torch._inductor.config.triton.cudagraphs:  # not of dynamic sizes, of which each would need its own
                self.found_parts(signatures)
            return partitions, signatures

        return graph_partition

    def found_parts(self, signatures):
        """Of a graph that `mode="reduce-overhead"` compiles: those that can be CUDA graphs, and those that cannot."""
        left = [signature for signature in signatures if signature.skip_cudagraph]
        if left or len(signatures) != 1:
            self.seen.fail(f"{len(left)} of {len(signatures)} parts cannot be a CUDA graph, as all should be in one")

    def _lengths(self, kernel, source):
        """Of rows: names of arguments, and values of those that Inductor made constants."""
        names = self.lengths.get(kernel, set())
        constants = [(name, int(value)) for name, value in re.findall(r"'(\w+)': (\d+)\b", source)]
        return names | {value for name, value in constants if name in names and value > 1}

    def _listen(self, *, metadata_group, **_):
        self.ttirs += [Path(path).read_text() for name, path in metadata_group.items() if name.endswith(".ttir")]

    def _code(self, code):
        self.seen.copies += len(COPIES.findall(code))


def _kind(value):
    """All of an argument that the analysis depends on."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, sympy.Expr)):
        return "symbol"
    return getattr(value, "dtype", None) or repr(value)


def _has_elements(value):
    """Whether an argument is a tensor that may hold something."""
    if isinstance(value, torch.Tensor):
        sizes = value.shape
    elif hasattr(value, "get_size"):  # as Inductor keeps it
        sizes = value.get_size()
    else:
        return False
    return not any(isinstance(size, int) and size == 0 for size in map(_as_int, sizes))


def _as_int(size):
    return int(size) if getattr(size, "is_Integer", False) else size


def _narrow(ttirs, lengths):
    """What is wrong with the offsets of a kernel that has been compiled, or None."""
    if not ttirs:
        return "triton compiled nothing"
    offsets = sum([len(NARROW_OFFSET.findall(ttir)) for ttir in ttirs])
    products = sum([late_widenings(ttir) + narrow_lengths(ttir, lengths) for ttir in ttirs])
    if offsets or products:
        return (
            f"offsets in 32 bits: {offsets} added to pointers, {products} products widened when they may have wrapped"
        )
    return None
