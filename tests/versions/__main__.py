"""`make test-versions`: hosts, parity and operations with other versions of what the package is built on.

Each ``<set>.txt`` beside this file names the versions of a set, and in its first line a Python. A set is installed from
scratch into ``.venvs/<set>``, together with the package, so that pip refuses versions below what the package claims.
What came of it is a row of benchmarks/results/versions.md. Needs nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "versions.md"
SETS = ("lowest", "torch-2.11", "newest")
SHOWN = ("torch", "triton", "transformers", "timm", "numpy")

# What runs: a process per line, as arguments of pytest. Long fuzzing is left out.
HOSTS = [
    "tests/hosts/test_hosts.py",
    "tests/hosts/test_parts.py",
    "tests/engine/test_block.py",
    "tests/geometry/test_rope.py",
]
HOSTS += ["tests/hosts/test_more_hosts_hf.py", "tests/hosts/test_wrapped_hf.py", "tests/hosts/test_head_hints.py"]
HOSTS += ["tests/hosts/test_more_hosts_timm.py", "tests/hosts/test_wrapped.py", "tests/runtime/test_tracing.py"]
PARITY = ["tests/test_lift_parity.py", "tests/authors/test_peers.py", "tests/weights/test_checkpoints.py"]
OPERATIONS = ["tests/ops/test_cpu_ops.py", "tests/engine/test_cpu_models.py", "tests/engine/test_compile.py"]
OF_KERNELS = (
    "test_executor or test_interpreter or (test_models_are and float32) or (error_budget and bfloat16 and not any)"
)
COMPILED = ["tests/ops/test_inductor.py", "tests/ops/test_inductor_faults.py", "tests/ops/test_compile_sizes.py"]
OF_COMPILED = "not machine_code and (inductor or opcheck or typical)"
ALL = [
    [*HOSTS, *PARITY],
    OPERATIONS,
    [*COMPILED, "-k", OF_COMPILED],
    ["tests/interpreted", "-k", OF_KERNELS],
]
SOME_MODELS = "test_models_are and (hf-dinov3 or hf-dinov2 or timm-dinov2-s) and float32"
SMALL = [  # without csrc, whose build takes as long as all of this
    ["tests/hosts/test_hosts.py", "tests/hosts/test_parts.py"],
    ["tests/engine/test_compile.py", "-k", "test_sizes_are_no_constants"],
    ["tests/interpreted/test_lifted.py", "-k", SOME_MODELS],
]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=SETS, metavar="set", help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--small", action="store_true", help="a part in under four minutes; no row is written")
    options = parser.parse_args(arguments)
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"sets must be of {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    failed = [name for name in options.sets if not run(name, options.small)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, small: bool) -> bool:
    """Installs a set, runs its tests, writes its row; whether all went well."""
    started = time.monotonic()
    python = install(name)
    installed = time.monotonic()
    counts, good = {"passed": 0, "failed": 0, "skipped": 0}, True
    for i, tests in enumerate(SMALL if small else ALL):
        report = python.parent.parent / f"tests-{i}.xml"
        good &= pytest(python, tests, report) == 0
        for key, number in counted(report).items():
            counts[key] += number
    seconds = f"{installed - started:.0f} s to install, {time.monotonic() - installed:.0f} s of tests"
    print(f"{name}: {', '.join(f'{number} {key}' for key, number in counts.items())}; {seconds}", flush=True)
    if not small:
        write_row(name, row(name, python, counts))
    return good and counts["passed"] > 0


def wanted_python(name: str) -> str:
    """The version in the first line of a set, as 3.10."""
    return re.match(r"# Python (3\.\d+)", (HERE / f"{name}.txt").read_text())[1]


def install(name: str) -> Path:
    """The Python of a new environment with a set and the package in it. PYTHON310 and so on name other interpreters."""
    version = wanted_python(name)
    folder = ROOT / ".venvs" / name
    shutil.rmtree(folder, ignore_errors=True)
    setting = f"PYTHON{version.replace('.', '')}"
    base = os.environ.get(setting, f"python{version}")
    if shutil.which(base) is None:
        raise SystemExit(f"set {name} needs Python {version}, but there is no {base}; {setting}=... names one")
    print(f"installing {name} for Python {version} into {folder.relative_to(ROOT)}", flush=True)
    choose = {"PYENV_VERSION": version}  # of pyenv's commands, which run only what is chosen; no others read it
    subprocess.run([base, "-m", "venv", folder], check=True, env=os.environ | choose)
    python = folder / "bin" / "python"
    files = [argument for file in (f"{name}.txt", "tools.txt") for argument in ("--requirement", HERE / file)]
    quiet = ["--quiet", "--no-compile", "--disable-pip-version-check"]  # few of so many modules are ever imported
    subprocess.run(
        [python, "-m", "pip", "install", *quiet, *files, "--editable", ".[timm,hf,triton]"], check=True, cwd=ROOT
    )
    return python


def pytest(python: Path, tests: list[str], report: Path) -> int:
    """Runs tests, the kernels' in Triton's interpreter; pytest's exit status."""
    own = {"PLANECYCLE_FAST_BUILD": "require", "PLANECYCLE_FAST_CACHE": str(python.parent.parent / "cache")}
    if tests[0].startswith("tests/interpreted"):
        own["TRITON_INTERPRET"] = "1"
    unset = [name for name in ("VIRTUAL_ENV", "PYTHONPATH", "TRITON_INTERPRET") if name not in own]
    environment = {name: value for name, value in os.environ.items() if name not in unset} | own
    options = ["-m", "not full", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return subprocess.run([python, "-m", "pytest", *tests, *options], cwd=ROOT, env=environment).returncode


def counted(report: Path) -> dict[str, int]:
    """Tests of a JUnit report; an error at collection counts as failed."""
    if not report.exists():
        return {"failed": 1}
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def row(name: str, python: Path, counts: dict[str, int]) -> list[str]:
    code = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, {SHOWN}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    peers = [peer for peer in ("PLANECYCLE_REPO", "DINOV3_REPO") if os.environ.get(peer)]
    numbers = [str(number) for number in counts.values()]
    return [name, *found, *numbers, " ".join(peers) or "none", time.strftime("%Y-%m-%d", time.gmtime()), commit()]


def commit() -> str:
    """What HEAD is, marked where files but the table differ from it."""
    ask = ["git", "-C", str(ROOT)]
    head, changes = [
        subprocess.run([*ask, *question], check=True, capture_output=True, text=True).stdout.strip()
        for question in (["rev-parse", "--short", "HEAD"], ["status", "--short", f":!{TABLE.relative_to(ROOT)}"])
    ]
    return f"{head}-dirty" if changes else head


def write_row(name: str, cells: list[str]) -> None:
    """Into the table, in place of the set's last row."""
    head = ["set", "Python", *SHOWN, "passed", "failed", "skipped", "peers", "date", "commit"]
    rows = {line.split("|")[1].strip(): line for line in (TABLE.read_text().splitlines() if TABLE.exists() else [])[6:]}
    rows[name] = f"| {' | '.join(cells)} |"
    lines = [
        "# With other versions", "",
        "The last result of `make test-versions` for each set. What runs: `tests/versions/__main__.py`.", "",
        f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |",
        *[rows[known] for known in SETS if known in rows],
    ]  # fmt: skip
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
