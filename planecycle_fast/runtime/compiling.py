"""Compiling csrc into one library of torch operations. Run by `native`, `planecycle-fast build` and setup.py.

Imports nothing of the package, so that setup.py can load this file by itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
CAPABILITIES = {  # what torch.backends.cpu.get_cpu_capability() says, and what ATen's vector types need for it
    "AVX512_BF16": [*AVX512, "-mavx512bf16"],  # ours: with instructions for bfloat16
    "AVX512": AVX512,
    "AVX2": AVX2,
    "DEFAULT": [],  # what every CPU of the architecture has: SSE2, NEON
}
TORCH = Path(torch.__file__).parent
TIME_LIMIT = 1200  # seconds that one command of a build may take


class BuildError(RuntimeError):
    """The library cannot be compiled. The message says why, in one line."""


def capability() -> str:
    """The variant for this CPU: a name of `CAPABILITIES`."""
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "AVX512_BF16"
    return found if found in CAPABILITIES else "DEFAULT"


def variants() -> list[str]:
    """All that a library for any CPU of this architecture has to come in."""
    return list(CAPABILITIES) if platform.machine().lower() in ("x86_64", "amd64") else ["DEFAULT"]


def library_name(variant: str) -> str:
    """The file's name: it holds what a library built ahead of time depends on."""
    return f"planecycle_fast_cpu-{variant}-torch{torch.__version__}.so"


def record(library: Path) -> Path:
    """The file beside a library that tells its size and SHA-256."""
    return library.with_name(f"{library.name}.sha256")


def damage(library: Path) -> str | None:
    """How a library differs from the file that was compiled, or None. Loading one that is damaged can kill a process.

    Raises OSError where it cannot be read.
    """
    found = library.read_bytes()
    try:
        size, digest = record(library).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return "nothing beside it tells its size and digest"
    if str(len(found)) != size:
        return f"it has {len(found)} bytes, expected {size}"
    return None if hashlib.sha256(found).hexdigest() == digest else "its digest is not the one that was recorded"


def compiler() -> str | None:
    """The C++ compiler: CXX if set, else c++ or g++. None without one. (On Linux clang's OpenMP is not torch's.)"""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]:
        if found := shutil.which(name):
            return found
    return None


def sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*.cpp"))


def flags(variant: str) -> list[str]:
    """Of the compiler. Nothing of this very machine but the variant: no -march=native."""
    openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    aten = variant.removesuffix("_BF16")
    defines = [f"-DCPU_CAPABILITY={aten}", f"-DCPU_CAPABILITY_{aten}", "-DNDEBUG"]
    includes = [f"-I{TORCH / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    extra = os.environ.get("PLANECYCLE_FAST_CXXFLAGS", "").split()
    return [
        "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w", abi,
        *openmp, *defines, *CAPABILITIES[variant], *includes, *extra,
    ]  # fmt: skip


def link_flags() -> list[str]:
    """Of the linker. torch's own OpenMP comes first, where it has one: two in a process would compete for its cores."""
    own = [str(path) for path in sorted((TORCH / "lib").glob("libgomp*.so*"))][:1]
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", *own]
    extra = [flag for flag in os.environ.get("PLANECYCLE_FAST_CXXFLAGS", "").split() if flag.startswith("-fsanitize")]
    return [*shared, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", *extra]


def key(csrc: Path, variant: str) -> str:
    """A digest of all that a library depends on, sources, torch, flags, CPU capability, then one of the compiler."""
    digest = hashlib.sha256()
    for file in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    named = compiler()
    version = _output([named, "--version"]).splitlines()[:1] if named else []
    for part in (torch.__version__, *flags(variant), *link_flags(), platform.machine(), sys.platform):
        digest.update(f"{part}\0".encode())
    made_by = hashlib.sha256(f"{named}\0{version}".encode())
    return f"{digest.hexdigest()[:16]}-{made_by.hexdigest()[:8]}"


def compile_library(csrc: Path, target: Path, variant: str) -> None:
    """Compiles `csrc` into the file `target`, with a `record` beside it, MAX_JOBS files at a time.

    Both appear whole or not at all, the record last: until then the library counts as damaged.

    Raises BuildError where there is no compiler, or it fails.
    """
    cxx = compiler()
    if cxx is None:
        missing = f"CXX is {os.environ['CXX']}, which" if os.environ.get("CXX") else "a C++ compiler (c++, g++)"
        raise BuildError(f"{missing} was not found")
    if not sources(csrc):
        raise BuildError(f"there are no sources in {csrc}")
    target = target.absolute()
    folder = target.parent / f".building-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        objects = [folder / f"{source.stem}.o" for source in sources(csrc)]
        commands = [[cxx, *flags(variant), "-c", str(s), "-o", str(o)] for s, o in zip(sources(csrc), objects)]
        library = folder / target.name
        link = [cxx, *map(str, objects), "-o", str(library), *link_flags()]
        if ninja := shutil.which("ninja"):
            _run_ninja(ninja, folder, [*zip(objects, commands)], library, link)
        else:
            with ThreadPoolExecutor(_jobs()) as pool:
                list(pool.map(_output, commands))
            _output(link)
        made = library.read_bytes()
        record(library).write_text(f"{len(made)} {hashlib.sha256(made).hexdigest()}\n", encoding="ascii")
        os.replace(library, target)
        os.replace(record(library), record(target))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _jobs() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal():
        raise BuildError(f"MAX_JOBS must be a number, got {jobs!r}")
    return max(1, int(jobs))


def _run_ninja(
    ninja: str, folder: Path, compiled: list[tuple[Path, list[str]]], library: Path, link: list[str]
) -> None:
    """The same commands in ninja, which starts and stops them well."""

    def quoted(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def name(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $line"]
    for made, command in compiled:
        lines += [f"build {name(made)}: run", f"  line = {quoted(command)}"]
    lines += [
        f"build {name(library)}: run {' '.join([name(made) for made, _ in compiled])}",
        f"  line = {quoted(link)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    _output([ninja, "-C", str(folder), "-j", str(_jobs()), "--quiet"])


def _output(command: list[str]) -> str:
    """What a command prints. Raises BuildError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIME_LIMIT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} could not be run: {error}") from error
    printed = [text.decode(errors="replace") for text in (done.stdout, done.stderr)]
    if done.returncode:
        lines = [line for line in "".join(printed).splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["it printed nothing"]
        raise BuildError(f"{Path(command[0]).name} failed with status {done.returncode}: {telling[0].strip()[:300]}")
    return printed[0]
