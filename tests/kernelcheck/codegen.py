"""The codegen gate: kernels compiled for GPUs that are not there, and what their machine code must look like."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget

from .launches import OPTIONS

# bytes of shared memory that one block can have (CUDA programming guide, compute capabilities)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURES = tuple(SHARED_LIMIT)
TENSOR_CORES = re.compile(r"\b(?:[HIQDO]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)\b")
GLOBAL_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E([.\w]*)")
ATOMIC = re.compile(r"\b(?:ATOM|ATOMG|RED|REDG)\.E\b")  # of global memory
NARROW_OFFSET = re.compile(r"tt\.addptr .*, (?:tensor<[\dx]*)?i32>?")
COUNTED_IN_ELEMENTS = {"channels", "hidden", "CHANNELS"}  # arguments that are lengths of rows; strides are, too
VALUE = re.compile(r"%[\w#]+")
SPREADING = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.trunci")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/", re.MULTILINE)


class CodegenError(AssertionError):
    """A kernel compiles to something that it must not be."""


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel needs and does."""

    registers: int  # per thread
    stack: int  # bytes per thread: spilled, or arrays indexed at run time
    shared: int  # bytes per block
    instructions: int
    local: int  # loads and stores of local memory: spills
    tensor_cores: int  # instructions
    atomics: int
    narrow_offsets: int  # additions of 32-bit offsets to pointers, products widened too late, `narrow_lengths`
    accesses: dict[str, dict[int, int]]  # "load", "store": how many global accesses, by bytes per thread

    def text(self, kind):
        """How many accesses of which width, e.g. ``4 x 16 B``."""
        return ", ".join(f"{count} x {width} B" for width, count in sorted(self.accesses[kind].items())) or "none"


def compile_variant(variant, arch):
    """The `Binary` of a `launches.Variant` on sm_<arch>."""
    target = GPUTarget("cuda", arch, 32)
    options = {name: getattr(variant.options, name) for name in OPTIONS}
    compiled = triton.compile(variant.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    return read_binary(usage, sass, compiled.asm["ttir"], compiled.metadata.shared, lengths(variant))


def read_binary(usage, sass, ttir, shared, lengths=()):
    """A `Binary` from cuobjdump, nvdisasm and triton's IR. cuobjdump's LOCAL is 0 even where a kernel spills."""
    accesses = {"load": Counter(), "store": Counter()}
    for kind, modifiers in GLOBAL_ACCESS.findall(sass):
        accesses["store" if kind == "STG" else "load"][_width(modifiers)] += 1
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        stack=int(re.search(r"STACK:(\d+)", usage).group(1)),
        shared=shared,
        instructions=len(INSTRUCTION.findall(sass)),
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        tensor_cores=len(TENSOR_CORES.findall(sass)),
        atomics=len(ATOMIC.findall(sass)),
        narrow_offsets=len(NARROW_OFFSET.findall(ttir)) + late_widenings(ttir) + narrow_lengths(ttir, lengths),
        accesses={kind: dict(widths) for kind, widths in accesses.items()},
    )


def late_widenings(ttir):
    """How many values become 64-bit after a 32-bit product of two variables, which may have wrapped by then."""
    made_of = {}  # of every value: the operation that makes it, and of what
    late = 0
    for name, operation, operands, _ in _operations(ttir):
        made_of[name] = operation, VALUE.findall(operands)
        late += operation == "arith.extsi" and _is_product(made_of[name][1][0], made_of)
    return late


def _operations(ttir):
    """(name, operation, operands, type) of all that makes a value."""
    return re.findall(r"(%[\w#]+) = ([\w.]+)(.*?) : ([^\n]*?)(?: loc\(|\n)", ttir)


def lengths(variant):
    """Which arguments of a kernel are distances of rows, in elements: names of numbers, and values of constants."""
    names = length_names(variant.kernel)
    values = {variant.values[name] for name in names & set(variant.values)}
    return names | {value for value in values if type(value) is int and value > 1}


def length_names(kernel):
    """Of which arguments: strides, which are annotated as of 64 bits, and channels."""
    wide = {p.name for p in kernel.params if "64" in str(p.annotation)}
    return (wide | COUNTED_IN_ELEMENTS) & set(kernel.arg_names)


def narrow_lengths(ttir, lengths):
    """How many 32-bit products and sums there are of a row's number, or anything else that varies, and a row's length.

    `lengths` are names of arguments and values of constants. Products of a length and a constant are lengths as well.
    """
    constants, of_rows, narrow = set(), {f"%{name}" for name in lengths if isinstance(name, str)}, 0
    for name, operation, operands, kind in _operations(ttir):
        values = VALUE.findall(operands)
        if operation == "arith.constant":
            constants.add(name)
            number = re.search(r"(?:dense<)?(-?\d+)>?$", operands.strip())
            if number and int(number.group(1)) in lengths:
                of_rows.add(name)
        elif operation in SPREADING:
            for kept in (constants, of_rows):
                kept.update([name] if values[0] in kept else [])
        elif operation in ("arith.muli", "arith.addi", "arith.subi"):
            rows, others = [v for v in values if v in of_rows], [v for v in values if v not in of_rows]
            varying = [v for v in others if v not in constants]
            narrow += bool(rows and varying and re.search(r"\bi32|xi32", kind))
            if operation == "arith.muli" and rows and not varying:
                of_rows.add(name)
    return narrow


def _is_product(value, made_of):
    operation, values = made_of.get(value, ("argument", []))
    if operation == "arith.muli":
        return not any(made_of.get(_source(v, made_of), ("",))[0] == "arith.constant" for v in values)
    if operation in ("arith.addi", "arith.subi", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.select"):
        return any(_is_product(v, made_of) for v in values)
    return False


def _source(value, made_of):  # before it was spread over a block
    operation, values = made_of.get(value, ("argument", []))
    return _source(values[0], made_of) if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") else value


def _width(modifiers):
    wide = re.search(r"\.(256|128|64)\b", modifiers)
    if wide:
        return int(wide.group(1)) // 8
    narrow = re.search(r"\.[US](8|16)\b", modifiers)
    return int(narrow.group(1)) // 8 if narrow else 4


def check_binary(binary, arch, wide=False, exempt=0, tensor_cores=False, atomics=False, narrow_offsets=False):
    """No stack, no local memory, no atomics, 64-bit offsets, shared memory within the limit.

    Args:
        binary: a `Binary`.
        arch: 80, 90, 100 or 120.
        wide: whether accesses to row tensors take 16 bytes per thread.
        exempt: how many accesses may be narrower all the same (vectors per channel, statistics, tables).
        tensor_cores: whether the kernel claims to use them.
        atomics, narrow_offsets: whether the kernel may have atomics, and 32-bit offsets to pointers.

    Raises CodegenError.
    """
    if binary.stack or binary.local:
        raise CodegenError(f"spills: {binary.stack} bytes of stack, {binary.local} local loads and stores")
    if binary.shared > SHARED_LIMIT[arch]:
        raise CodegenError(f"{binary.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    narrow = sum(n for widths in binary.accesses.values() for width, n in widths.items() if width < 16)
    if wide and not all(binary.accesses.values()):
        raise CodegenError("no global loads or no stores were found")
    if wide and narrow > exempt:
        raise CodegenError(
            f"{narrow} global accesses of less than 16 bytes, at most {exempt} expected: loads {binary.text('load')}; "
            f"stores {binary.text('store')}"
        )
    if binary.atomics and not atomics:
        raise CodegenError(f"{binary.atomics} atomics: the order of sums is not fixed")
    if binary.narrow_offsets and not narrow_offsets:
        raise CodegenError(
            f"{binary.narrow_offsets} pointers are advanced by 32-bit offsets or products, which end at 2^31 elements"
        )
    if tensor_cores and not binary.tensor_cores:
        raise CodegenError("no tensor-core instruction")


def _run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
