"""Runs mutants of a kernel against that kernel's tests, each in a process of its own that may crash or hang.

A process is forked from one that has imported torch, triton and pytest but nothing of this project; it takes the
project from a copy in which one file is edited. Two runs per mutant, until the first failure: `PLAIN`, `test_plain`
without sanitizers, and if that passes `ALL`, the tests of the kernel without opcheck, torch.compile and autocast, which
are about the wiring around it, without fp16, and with less fuzzing. Mutants of a kind in `ONLY` meet only the tests
that can see them, and the part of the codegen gate that can (`offsets`).
"""

import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PARTS = ["planecycle_fast", "tests", "pyproject.toml", "README.md"]  # of the project, that its tests need
PLAIN, ALL = "plain tests", "all checks"
FIRST = ["test_plain", "test_error_budget", "test_overflow_of_strides", "test_layouts", "test_nan_footprint"]
LAST = ["test_overflow", "test_declared_cost", "test_error_budget_of_any_case", "test_derivatives"]  # slow
ONLY = {"narrow_integer": "test_overflow"}  # what can kill a kind: values leave 32 bits at these sizes alone
LEFT_OUT = {
    "test_opcheck", "test_opcheck_of_cases", "test_compiled", "test_compiled_bf16", "test_autocast",
    "test_auto_does_not_take_the_interpreter",
}  # fmt: skip
EXAMPLES = 100  # of fuzzing
ADDRESS_SPACE = 24 * 2**30  # bytes: a mutant that asks for more fails alone


@dataclass(frozen=True)
class Outcome:
    """How a run ended: what failed in which test ("" where all passed), and how long every test took."""

    test: str = ""
    error: str = ""
    seconds: dict | None = None

    @property
    def killed(self):
        return bool(self.error)


class Bench:
    """A copy of the project for mutants to run in, one at a time.

    Args:
        project: the folder of the project.
        modules, test_file: what may be edited and what is run, relative to it.
        folder: where to copy to.
    """

    def __init__(self, project, modules, test_file, folder):
        self.folder, self.test_file = Path(folder), test_file
        for part in PARTS:
            source = Path(project) / part
            if source.is_dir():
                shutil.copytree(source, self.folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, self.folder / part)
        self.originals = {module: (self.folder / module).read_text() for module in modules}

    def start(self, mutant, stage, limits):
        """Forks a run of a mutant; of the original for None. `limits` are seconds by test, of all others under ""."""
        for module, source in self.originals.items():
            edited = mutant and mutant.module == module
            (self.folder / module).write_text(mutant.source(source) if edited else source)
        self.report = self.folder / "report.jsonl"
        self.log = self.folder / "output.txt"
        self.report.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _run(self, stage, limits, _only(mutant))
            finally:
                os._exit(status)
        return pid

    def outcome(self, status):
        """The `Outcome` of a run, from its exit status."""
        lines = [json.loads(line) for line in self.report.read_text().splitlines()] if self.report.exists() else []
        seconds = {line["test"]: line["seconds"] for line in lines if "seconds" in line}
        failed = next((line for line in lines if "error" in line), None)
        running = next((line["test"] for line in reversed(lines) if "test" in line), "collection")
        if failed:
            return Outcome(failed["test"], failed["error"], seconds)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Outcome(running, "time limit" if number == signal.SIGPROF else signal.Signals(number).name, seconds)
        code = os.WEXITSTATUS(status)
        if code == 0 and seconds:
            return Outcome(seconds=seconds)
        output = self.log.read_text()[-2000:] if self.log.exists() else ""
        raise RuntimeError(f"{self.test_file} could not be run: pytest ends with {code} in {running}\n{output}")


def _run(bench, stage, limits, only):
    """In the child: pytest's exit status."""
    import pytest

    _limit(limits[""])
    os.chdir(bench.folder)
    sys.path.insert(0, str(bench.folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "planecycle_fast")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    faulthandler.disable()  # a crash is a result
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    log = os.open(bench.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _fuzz_less()
    compiled = [sys.executable, "-m", "tests.kernelcheck.offsets", Path(bench.test_file).stem.removeprefix("test_")]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", "not full", "--tb=no"]
    watch = _Watch(bench, stage, limits, only)
    status = int(pytest.main([*options, bench.test_file], plugins=[watch]))
    if status == 0 and only and stage == ALL and Path("tests/kernelcheck/offsets.py").exists():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if subprocess.run(compiled, env=environment, stdout=log, stderr=log).returncode:
            watch.tell(test="test_machine_code", error="CodegenError")
            return 1
    return status


def _fuzz_less():
    try:
        from tests.kernelcheck import harness
    except ModuleNotFoundError:  # a project that has none
        return
    harness.EXAMPLES = EXAMPLES


class _Watch:
    """A pytest plugin: chooses and orders tests, limits their time, reports."""

    def __init__(self, bench, stage, limits, only):
        self.stage, self.limits, self.only, self.file = stage, limits, only, bench.report.open("a", buffering=1)

    def tell(self, **line):
        self.file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items):
        def kept(item):
            name = _function(item)
            if self.stage == PLAIN:
                return name == "test_plain"
            if not name.startswith(self.only):
                return False
            fuzz = name == "test_error_budget_of_any_case" and "float32" not in item.name
            return name not in LEFT_OUT and not fuzz and not re.search(r"\bfloat16", item.name)

        items[:] = sorted(filter(kept, items), key=lambda item: _rank(_function(item)))

    def pytest_collection_finish(self):
        if self.stage == PLAIN and "tests.kernelcheck.observers" in sys.modules:
            sys.modules["tests.kernelcheck.observers"].watching.clear()

    def pytest_runtest_setup(self, item):
        self.tell(test=item.name)
        self.began = time.process_time()
        _limit(self.limits.get(item.name, self.limits[""]))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            _limit(self.limits[""])  # for what comes between tests
            self.tell(test=report.nodeid.split("::")[-1], seconds=time.process_time() - self.began)

    def pytest_exception_interact(self, node, call):
        self.tell(test=_function(node), error=call.excinfo.type.__name__)


def _limit(seconds):
    """Of processor time, so that a busy machine kills no mutant."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _function(item):
    return getattr(item, "originalname", None) or "collection"


def _rank(name):
    return (LAST.index(name) + 1 if name in LAST else 0, FIRST.index(name) if name in FIRST else len(FIRST), name)


def _only(mutant):
    """What names of tests begin with that can kill a mutant."""
    return ONLY.get(getattr(mutant, "kind", ""), "")


def run_all(benches, mutants, done, limit=None, tell=print):
    """Calls ``done(mutant, outcome of PLAIN, outcome of ALL)`` for each mutant, as many at a time as there are benches.

    A test may take 10 seconds of processor time more than 5 times what it takes on the original, or `limit` seconds.

    Raises RuntimeError where the original does not pass.
    """
    limits, expected = {}, {}
    for stage in (PLAIN, ALL):
        [baseline] = _finish(benches[:1], [(None, stage)], {"": 3600}, lambda *_: []).values()
        if baseline.killed:
            raise RuntimeError(f"the original fails {baseline.test}: {baseline.error}")
        expected[stage] = baseline.seconds.keys()
        limits |= {test: limit or 10 + 5 * seconds for test, seconds in baseline.seconds.items()}
    limits[""] = limit or 60
    plain = {}

    def ended(progress, mutant, stage, outcome):
        only = _only(mutant) if stage == ALL else ""
        whole = {test for test in expected[stage] if test.startswith(only)}
        if not outcome.killed and outcome.seconds.keys() != whole:
            raise RuntimeError(f"a run of {stage} ended early without a failure: {outcome}")
        tell(progress, mutant, stage, outcome)
        plain.setdefault(mutant, outcome)
        if stage == PLAIN and not outcome.killed:
            return [(mutant, ALL)]
        done(mutant, plain[mutant], outcome)
        return []

    _finish(benches, [(mutant, PLAIN) for mutant in mutants], limits, ended)


def _finish(benches, jobs, limits, ended):
    """{job: outcome} of (mutant, stage) jobs, and of those that `ended` wants next."""
    waiting, free, running, outcomes = list(reversed(jobs)), list(benches), {}, {}
    try:
        while waiting or running:
            while waiting and free:
                job, bench = waiting.pop(), free.pop()
                running[bench.start(*job, limits)] = job, bench
            pid, status = _wait(running)
            job, bench = running.pop(pid)
            outcomes[job] = bench.outcome(status)
            free.append(bench)
            total = len(outcomes) + len(waiting) + len(running)
            waiting += ended(f"{len(outcomes)} of {total}", *job, outcomes[job])
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
    return outcomes


def _wait(pids):
    """The first of some children to end, and its status; other children of this process are left alone."""
    while True:
        for pid in pids:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return pid, status
        time.sleep(0.02)
