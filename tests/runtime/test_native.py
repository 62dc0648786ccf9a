"""Building and loading csrc: cold starts, killed builds, hostile caches, broken installations."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from planecycle_fast.runtime import compiling, native

PROJECT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(compiling.compiler() is None, reason="needs a C++ compiler")
TINY = """
#include <torch/library.h>
static int64_t answer(const at::Tensor&) { return 42; }
TORCH_LIBRARY(planecycle_fast_cpu, m) { m.def("answer(Tensor x) -> int", answer); }
"""
READY = (
    "import logging, sys; logging.basicConfig(format='LOG %(message)s'); from planecycle_fast import native; "
    "print(native.ready())"
)
USE = (  # backend "auto" on a CPU, whatever becomes of the library
    "import torch; from planecycle_fast import ops; x = torch.ones(1, 2, 8); n = ops.Norm(None, None, 1e-6); "
    "print(ops.add_norm(x, x, None, n)[0].sum().item())"
)


@pytest.fixture
def sources(tmp_path):
    """A csrc that is quick to compile."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    return folder


def run(code, tmp_path, **environment):
    """(stdout, stderr lines, status) of Python code with a cache of its own and nothing built ahead of time."""
    patched = code
    if "SOURCES" in environment:
        folder = environment.pop("SOURCES")
        patched = (
            f"from pathlib import Path; import planecycle_fast.runtime.native as n; "
            f"n.csrc = lambda: Path({str(folder)!r}); "
            f"n.shipped = lambda: None; {code}"
        )
    env = {**os.environ, "PLANECYCLE_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)} | environment
    env.pop("PLANECYCLE_FAST_BUILD", None) if "PLANECYCLE_FAST_BUILD" not in environment else None
    done = subprocess.run([sys.executable, "-c", patched], capture_output=True, text=True, env=env, cwd=tmp_path)
    return done.stdout.strip(), done.stderr.strip().splitlines(), done.returncode


@needs_compiler
def test_first_use_builds_with_one_line_and_the_second_finds_it(tmp_path, sources):
    out, lines, _ = run(READY, tmp_path, SOURCES=sources)
    assert out == "True" and len(lines) == 1 and "building the operations of backend 'cpu', once" in lines[0]
    [folder] = [p for p in (tmp_path / "cache").iterdir()]
    for private in (tmp_path / "cache", folder):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    library = compiling.library_name(compiling.capability())
    assert {p.name for p in folder.iterdir()} == {"lock", library, f"{library}.sha256"}
    assert run(READY, tmp_path, SOURCES=sources) == ("True", [], 0)


@needs_compiler
@pytest.mark.full
def test_without_ninja(tmp_path, sources):
    out, lines, _ = run(READY, tmp_path, SOURCES=sources, PATH=_path_without_ninja(tmp_path))
    assert out == "True" and len(lines) == 1


@needs_compiler
@pytest.mark.full
def test_eight_processes_on_an_empty_cache(tmp_path, sources):
    code = "import planecycle_fast.runtime.native as n; from pathlib import Path; "
    code += f"n.csrc = lambda: Path({str(sources)!r}); "
    code += "n.shipped = lambda: None; print(n.ready())"
    env = {**os.environ, "PLANECYCLE_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)}
    start = [sys.executable, "-c", code]
    started = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) for _ in range(8)]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [out.strip() for out, _ in outputs] == [b"True"] * 8
    assert sum(b"building" in err for _, err in outputs) == 1


@pytest.mark.full
@needs_compiler
def test_a_killed_build_leaves_the_next_one_working(tmp_path, sources):
    slow = tmp_path / "c++"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep 60\nexec {compiling.compiler()} "$@"\n')
    slow.chmod(0o755)
    code = "import planecycle_fast.runtime.native as n; from pathlib import Path; "
    code += f"n.csrc = lambda: Path({str(sources)!r}); "
    code += "n.shipped = lambda: None; n.ready()"
    env = {**os.environ, "PLANECYCLE_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT), "CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*/.building-*")) and time.monotonic() < end:
        time.sleep(0.05)
    [left] = (tmp_path / "cache").glob("*/.building-*")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    slow.write_text(f'#!/bin/sh\nexec {compiling.compiler()} "$@"\n')  # the same key
    assert run(READY, tmp_path, SOURCES=sources, CXX=str(slow))[0] == "True"
    assert not left.exists()


def _two_of_them(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    return {}


def _open_to_others(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)  # past the umask
    return {}


def _a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    return {}


def _below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return {"PLANECYCLE_FAST_CACHE": str(tmp_path / "file" / "cache")}


def _someone_elses(tmp_path):
    if os.getuid() != 0:
        pytest.skip("needs root, to give a folder away")
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, 12345)
    return {}


def _no_compiler(tmp_path):
    return {"PATH": str(tmp_path)}


def _a_named_compiler_that_is_not_there(tmp_path):
    return {"CXX": "/nowhere/c++"}


def _a_compiler_that_fails(tmp_path):
    path = tmp_path / "bad-c++"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo bad 1.0 && exit 0\necho "error: no such header" >&2\nexit 1\n'
    )
    path.chmod(0o755)
    return {"CXX": str(path)}


def _a_compiler_of_garbage(tmp_path):
    path = tmp_path / "odd-c++"
    body = 'import sys\nif "--version" not in sys.argv: open(sys.argv[sys.argv.index("-o") + 1], "w").write("x")\n'
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return {"CXX": str(path)}


def _sources_that_do_not_compile(tmp_path):
    (tmp_path / "csrc" / "tiny.cpp").write_text("this is no C++")
    return {}


def _no_sources(tmp_path):
    (tmp_path / "csrc" / "tiny.cpp").unlink()
    return {}


def _jobs_that_are_no_number(tmp_path):
    return {"MAX_JOBS": "all", "PATH": _path_without_ninja(tmp_path)}


def _path_without_ninja(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("c++", "g++", "ld", "as", "cc1plus", "collect2"):
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    return str(tmp_path / "bin")


def _never(tmp_path):
    return {"PLANECYCLE_FAST_BUILD": "never"}


FAULTS = [  # what is broken, what the one line says, whether the build has begun by then
    (_two_of_them, "must be a folder, and no symbolic link", False),
    (_open_to_others, "can be used by others: mode 777, expected 700", False),
    (_a_file, "must be a folder, and no symbolic link", False),
    (_below_a_file, "cannot be made: ", False),
    (_someone_elses, "belongs to user 12345, expected 0", False),
    (_no_compiler, "no C\\+\\+ compiler was found", False),
    (_a_named_compiler_that_is_not_there, "no C\\+\\+ compiler was found at CXX=/nowhere/c\\+\\+", False),
    (_a_compiler_that_fails, "failed with status 1: .*error: no such header", True),
    (_a_compiler_of_garbage, "(invalid ELF header|file too short)", True),
    (_sources_that_do_not_compile, "failed with status 1: .*error: ", True),
    (_no_sources, "there are no sources in ", False),
    (_jobs_that_are_no_number, "MAX_JOBS must be a number, got 'all'", True),
    (_never, "its library is not built, and PLANECYCLE_FAST_BUILD is never", False),
]
QUICK = (_a_compiler_of_garbage, _never)  # others differ in the message
FAULT_ROWS = [
    pytest.param(*row, id=row[0].__name__[1:], marks=() if row[0] in QUICK else pytest.mark.full) for row in FAULTS
]


@needs_compiler
@pytest.mark.parametrize("fault, message, begun", FAULT_ROWS)
def test_broken_installations(tmp_path, sources, fault, message, begun):
    """The reference runs, and one line says why; "require" raises; by name it raises; `backends` and `info` say why."""
    import re

    environment = {"SOURCES": sources, **fault(tmp_path)}
    logged = "import logging; logging.basicConfig(format='LOG %(message)s'); "
    out, lines, status = run(logged + USE, tmp_path, **environment)
    assert out == "32.0" and status == 0
    why = [line for line in lines if "building the operations" not in line]
    assert len(why) == 1 and len(lines) <= 2 if begun else len(why) <= 1
    assert not why or re.search(message, why[0]), lines
    by_name = USE.replace("None, n)", "None, n, backend='cpu')")
    _, lines, status = run(by_name, tmp_path, **environment)
    assert status == 1 and re.search(f"ValueError: backend 'cpu' is not usable: .*{message}", lines[-1]), lines[-1]
    if fault is not _never:
        _, lines, status = run(USE, tmp_path, **environment, PLANECYCLE_FAST_BUILD="require")
        assert status == 1 and re.search(f"RuntimeError: PLANECYCLE_FAST_BUILD is require.*{message}", lines[-1]), lines
    shown, _, _ = run("from planecycle_fast.commands.info import library; print(library())", tmp_path, **environment)
    assert begun or re.search(message, shown), shown


@needs_compiler
@pytest.mark.parametrize("setting", ["auto", *[pytest.param(s, marks=pytest.mark.full) for s in ("never", "require")]])
def test_a_library_in_a_cache_of_others_is_not_loaded(tmp_path, sources, setting, copying_compiler):
    assert run(READY, tmp_path, SOURCES=sources, CXX=copying_compiler)[0] == "True"
    (tmp_path / "cache").chmod(0o755)
    by_name = USE.replace("None, n)", "None, n, backend='cpu')")
    _, lines, status = run(by_name, tmp_path, SOURCES=sources, CXX=copying_compiler, PLANECYCLE_FAST_BUILD=setting)
    assert status == 1 and "can be used by others: mode 755, expected 700" in lines[-1]


def _cut_to(size):
    def damage(library):
        library.write_bytes(library.read_bytes()[: size or library.stat().st_size // 2])

    return damage


def _empty(library):
    library.write_bytes(b"")


def _longer(library):
    library.write_bytes(library.read_bytes() + b"\0")


def _one_byte_is_another(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def _without_a_record(library):
    compiling.record(library).unlink()


def _with_an_empty_record(library):
    compiling.record(library).write_text("")


def _with_a_record_of_garbage(library):
    compiling.record(library).write_bytes(b"\xff\xfe 7")


DAMAGES = {  # and what the one line says of each
    "100 bytes": (_cut_to(100), "it has 100 bytes, expected"),
    "5000 bytes": (_cut_to(5000), "it has 5000 bytes, expected"),
    "half": (_cut_to(None), "bytes, expected"),
    "empty": (_empty, "it has 0 bytes, expected"),
    "longer": (_longer, "bytes, expected"),
    "one byte": (_one_byte_is_another, "its digest is not the one that was recorded"),
    "no record": (_without_a_record, "nothing beside it tells its size and digest"),
    "empty record": (_with_an_empty_record, "nothing beside it tells its size and digest"),
    "garbage": (_with_a_record_of_garbage, "nothing beside it tells its size and digest"),
}


@pytest.fixture(scope="module")
def copying_compiler(tmp_path_factory):
    """A compiler that makes no objects and always the same library, quickly."""
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "csrc").mkdir()
    (folder / "csrc" / "tiny.cpp").write_text(TINY)
    compiling.compile_library(folder / "csrc", folder / "made.so", compiling.capability())
    path = folder / "c++"
    body = f"""import shutil, sys
if "--version" not in sys.argv:
    shutil.copy({str(folder / "made.so")!r}, sys.argv[sys.argv.index("-o") + 1])
"""
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return str(path)


@needs_compiler
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_library_is_built_again(tmp_path, sources, monkeypatch, caplog, copying_compiler, name):
    """Of some sizes it would kill the process that loads it."""
    damage, why = DAMAGES[name]
    monkeypatch.setenv("CXX", copying_compiler)
    monkeypatch.setenv("PLANECYCLE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "csrc", lambda: sources)
    library = native.build()
    whole = library.read_bytes()
    assert compiling.damage(library) is None and native.found() == library
    damage(library)
    assert why in compiling.damage(library) and native.found() is None
    monkeypatch.setenv("PLANECYCLE_FAST_BUILD", "never")
    assert "its library is damaged, and PLANECYCLE_FAST_BUILD is never" in native._why_not_built()
    monkeypatch.delenv("PLANECYCLE_FAST_BUILD")
    assert native.build(say=True) == library and library.read_bytes() == whole and native.found() == library
    [line] = [each.getMessage() for each in caplog.records]
    assert line.startswith("building the operations of backend 'cpu', again, ") and why in line


@needs_compiler
def test_half_a_library_kills_nobody(tmp_path, sources, copying_compiler):
    assert run(READY, tmp_path, SOURCES=sources, CXX=copying_compiler)[0] == "True"
    [library] = (tmp_path / "cache").glob("*/*.so")
    _cut_to(None)(library)
    never = run(READY, tmp_path, SOURCES=sources, CXX=copying_compiler, PLANECYCLE_FAST_BUILD="never")
    assert never == ("False", [], 0)
    out, lines, status = run(READY, tmp_path, SOURCES=sources, CXX=copying_compiler)
    assert (out, status) == ("True", 0) and len(lines) == 1 and "again, it has" in lines[0]


@needs_compiler
def test_a_damaged_library_that_came_with_the_package_is_not_loaded(tmp_path, sources, monkeypatch, copying_compiler):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(native, "__file__", str(package / "runtime" / "native.py"))
    monkeypatch.setenv("CXX", copying_compiler)
    library = package / compiling.library_name(compiling.capability())
    compiling.compile_library(sources, library, compiling.capability())
    assert native.shipped() == library
    _cut_to(5000)(library)
    assert native.shipped() is None


@pytest.mark.full
@needs_compiler
def test_a_library_outlives_its_compiler(tmp_path, sources):
    """Built in one stage, used in another that has no compiler, and where nothing can be written."""
    assert run(READY, tmp_path, SOURCES=sources)[0] == "True"
    [folder] = (tmp_path / "cache").iterdir()
    for each in (folder, tmp_path / "cache"):
        each.chmod(0o500)
    assert run(READY, tmp_path, SOURCES=sources, PATH=str(tmp_path), PLANECYCLE_FAST_BUILD="never") == ("True", [], 0)
    for each in (tmp_path / "cache", folder):
        each.chmod(0o700)


def test_an_unknown_setting(tmp_path, sources):
    _, lines, status = run(USE, tmp_path, SOURCES=sources, PLANECYCLE_FAST_BUILD="maybe")
    assert status == 1
    assert lines[-1] == "ValueError: PLANECYCLE_FAST_BUILD must be one of auto, never, require, got 'maybe'"


@needs_compiler
def test_what_a_library_depends_on(monkeypatch, sources):
    """Sources, torch, compiler, flags, CPU capability: each gives another key."""
    first = compiling.key(sources, "AVX2")
    assert compiling.key(sources, "AVX2") == first and compiling.key(sources, "DEFAULT") != first
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert compiling.key(sources, "AVX2") != first
    with monkeypatch.context() as patch:
        patch.setenv("PLANECYCLE_FAST_CXXFLAGS", "-g")
        assert compiling.key(sources, "AVX2") != first
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_output", lambda command: "another compiler 1.0")
        assert compiling.key(sources, "AVX2") != first
    (sources / "more.h").write_text("")
    assert compiling.key(sources, "AVX2") != first


def test_nothing_is_compiled_for_this_machine_alone():
    for variant in compiling.CAPABILITIES:
        assert not [flag for flag in compiling.flags(variant) if "native" in flag or flag.startswith("-mtune")]


@needs_compiler
def test_the_lock_has_a_time_limit(monkeypatch, tmp_path):
    import fcntl

    monkeypatch.setattr(native, "LOCK_LIMIT", 0.3)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = "another process has held .* for 0.3 seconds"
        with pytest.raises(compiling.BuildError, match=message), native._locked(tmp_path / "lock"):
            pass


@needs_compiler
@pytest.mark.full
def test_ahead_of_time(tmp_path):
    """``pip install --no-build-isolation``: libraries for every capability in a wheel for any Python 3, which load."""
    copy = tmp_path / "source"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "*.so"))
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(copy)]
    environment = os.environ | {"PLANECYCLE_FAST_BUILD": "require"}
    subprocess.run(wheel, check=True, capture_output=True, env=environment)
    [made] = tmp_path.glob("*.whl")
    assert made.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    shutil.unpack_archive(made, tmp_path / "site", "zip")
    found = sorted(path.name for path in (tmp_path / "site" / "planecycle_fast").glob("*.so*"))
    names = list(map(compiling.library_name, compiling.variants()))
    assert found == sorted([*names, *[f"{name}.sha256" for name in names]])
    code = "import planecycle_fast as p; print(p.__file__); from planecycle_fast import native; print(native.ready())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PLANECYCLE_FAST_BUILD": "never"}
    environment["PLANECYCLE_FAST_CACHE"] = str(tmp_path / "none")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "planecycle_fast" / "__init__.py"), "True"], done.stderr


@needs_compiler
def test_the_command_builds(tmp_path, monkeypatch, capsys):
    """`planecycle-fast build` prints where the library is."""
    from planecycle_fast.commands.cli import main

    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(native, "csrc", lambda: tmp_path / "csrc")
    monkeypatch.setenv("PLANECYCLE_FAST_CACHE", str(tmp_path / "cache"))
    assert main(["build"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PLANECYCLE_FAST_CACHE", str(tmp_path / "another cache"))
    assert main(["build"]) == 1
    assert "planecycle-fast: no C++ compiler was found at CXX=/nowhere/c++" in capsys.readouterr().err
