"""What of `make gpu` needs no GPU: its parts and their order, its time, what is left when one hangs or crashes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_sanitize, gpu_tests, gpu_warm
from benchmarks.budget import Budget, Part
from benchmarks.part_table import PartTable, write


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_part_takes_its_share_and_what_was_left_over(clock):
    budget = Budget({"tests": 200, "ops": 100, "models": 50}, clock)
    assert budget.begin("tests").seconds == 200
    clock.now += 50
    assert budget.begin("ops").seconds == 250
    clock.now += 300  # 50 too long
    part = budget.begin("models")
    assert part.seconds == 0 and part.left() == 0


def test_what_does_not_fit_is_named(clock):
    part = Budget({"ops": 10}, clock).begin("ops")
    done = []
    for item in part.within([("a", 1), ("b", 2), ("c", 3), ("d", 4)]):
        done.append(item)
        clock.now += 6
    assert done == [1, 2] and part.note() == "Left out, as 10 s were over (2): c; d\n"
    assert Budget({"ops": 10}, clock).begin("ops").note() == ""


def test_a_table_is_whole_after_every_row_and_names_what_is_at_work(tmp_path, clock):
    part, path = Part("ops", 10, clock), tmp_path / "ops.md"
    table = PartTable(part, {path: lambda rows, note: f"about\n{rows}\n{note}"})
    seen = [path.read_text()]
    for item in table.each([("first", 1), ("second", 2), ("third", 3)]):
        seen.append(path.read_text())
        table.add(item)
        clock.now += 6
    assert seen == ["about\n[]\n", "about\n[]\nNot finished: first\n", "about\n[1]\nNot finished: second\n"]
    assert path.read_text() == "about\n[1, 2]\nLeft out, as 10 s were over (1): third\n"
    assert list(tmp_path.iterdir()) == [path]  # nothing of the writing itself


def test_a_stop_while_a_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "ops.md"
    write(path, "whole")

    def stopped(self, *_, **__):
        self.open("w").write("ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(path, "whole again")
    assert path.read_text() == "whole"


def test_all_of_it_is_over_in_eight_minutes_and_smoke_in_one():
    assert sum(gpu.STAGES.values()) + gpu.GRACE <= 480
    assert gpu.STAGES["smoke", "warm"] + gpu.GRACE <= 60
    assert gpu.STAGES["tests",] + gpu.GRACE <= 180
    assert set(gpu.PARTS) == set(gpu_parts.RUN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no CUDA device was found: nothing to run\n"


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "everything"])
    assert "argument --only: invalid choice: 'everything'" in capsys.readouterr().err


STUB = """
import os, subprocess, sys, time
folder, name, does, until = sys.argv[1:]
with open(os.path.join(folder, "order"), "a") as file:
    file.write(name + "\\n")
with open(os.path.join(folder, name + ".md"), "w") as file:
    file.write(f"{name}: a row, until {float(until) - time.time():.0f}\\n")
    file.flush()
    if does == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        file.write(f"{child.pid}")
        file.flush()
        time.sleep(600)
    if does == "crash":
        os.kill(os.getpid(), 11)
sys.exit({"fail": 1, "usage": 2}.get(does, 0))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Parts that do what a test says: {name: "hang", "crash", "fail" or "usage"}."""
    path, does = tmp_path / "stub.py", {}
    path.write_text(STUB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(gpu, "header", lambda command: f"Some GPU, `{command}`\n")
    monkeypatch.setattr(
        gpu, "command", lambda name, until: [sys.executable, "-S", str(path), str(tmp_path), name,
                                             does.get(name, ""), str(until)]
    )  # fmt: skip
    return does


def order(folder):
    return (folder / "order").read_text().split()


def test_parts_run_in_order_each_with_its_time(stubs, tmp_path, capsys):
    assert gpu.main([]) == 0
    assert set(order(tmp_path)[:2]) == {"smoke", "warm"}  # side by side
    assert order(tmp_path)[2:] == ["models", "tests", "attention", "kernels", "ops", "sweep"]
    printed = capsys.readouterr().out
    assert "smoke and warm: 50 s at most" in printed and "sweep: done" in printed
    seconds = (tmp_path / "smoke.md").read_text().removeprefix("smoke: a row, until ")
    assert 50 // 2 < int(seconds) <= 50  # less what passed before it looked
    run = (tmp_path / "run.md").read_text()
    assert run.startswith("Some GPU, `make gpu`\n") and run.count("| done |") == 8


def test_some_parts_alone(stubs, tmp_path):
    assert gpu.main(["--only", "tests", "repeats", "smoke"]) == 0
    assert order(tmp_path) == ["smoke", "tests", "repeats"]
    assert not (tmp_path / "run.md").exists()  # that of the whole stays
    assert gpu.stages(["warm"]) == {("warm",): 50}


def test_what_hangs_or_crashes_loses_nothing_and_the_next_begins(stubs, tmp_path, monkeypatch):
    stubs |= {"models": "hang", "tests": "crash", "kernels": "fail", "ops": "usage"}
    monkeypatch.setattr(gpu, "STAGES", dict.fromkeys(gpu.STAGES, 0.5) | {("sweep",): 60})
    monkeypatch.setattr(gpu, "GRACE", 1.5)
    assert gpu.main([]) == 1
    assert order(tmp_path)[2:] == ["models", "tests", "attention", "kernels", "ops", "sweep"]
    rows = (tmp_path / "run.md").read_text()
    for words in ("| models | killed after", "| tests | crashed: SIGSEGV |", "| kernels | failed |",
                  "| ops | crashed: status 2 |", "| sweep | done |"):  # fmt: skip
        assert words in rows
    row, child = (tmp_path / "models.md").read_text().splitlines()
    assert row.startswith("models: a row")
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()


def test_a_stop_from_outside_ends_the_parts(tmp_path):
    """`timeout 500 make gpu`: SIGTERM."""
    (tmp_path / "stub.py").write_text(STUB)
    code = (
        "import sys, torch\nfrom benchmarks import gpu\ntorch.cuda.is_available = lambda: True\n"
        f"gpu.command = lambda name, until: [sys.executable, '-S', {str(tmp_path / 'stub.py')!r}, "
        f"{str(tmp_path)!r}, name, 'hang', str(until)]\ngpu.main(['--only', 'models'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.PROJECT, stdout=subprocess.DEVNULL)
    path = tmp_path / "models.md"
    while len(path.read_text().splitlines() if path.exists() else "") < 2:
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    child = path.read_text().splitlines()[1]
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()


TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_second(): assert 1 == 2
@pytest.mark.skip(reason="no such device")
def test_third(): pass
@pytest.mark.alone
def test_last(): pass
@pytest.mark.alone
def test_a_thousand_times(): pass
"""


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.full), 2])
def test_gpu_tests_run_in_parallel_then_alone(tmp_path, monkeypatch, workers):
    if workers:
        pytest.importorskip("xdist")
    file, path = tmp_path / "test_gpu_something.py", tmp_path / "tests.txt"
    file.write_text(TESTS)
    monkeypatch.setattr(gpu_tests, "workers", lambda: workers)
    assert gpu_tests.run(path, "about\n", Part("tests", 100), [file]) == 1
    text = path.read_text()
    assert text.startswith(f"about\n\ngpu and not alone, {max(workers, 1)} at a time\n")
    assert "test_second: assert 1 == 2" in text and "skipped, 1: no such device" in text
    first, last = text.split("gpu and alone")
    assert "in all: 1 passed, 1 failed, 1 skipped" in first and "in all: 2 passed, 0 failed, 0 skipped" in last


def test_parts_of_the_tests_can_be_asked_for(tmp_path, monkeypatch):
    file, path = tmp_path / "test_gpu_something.py", tmp_path / "repeats.txt"
    file.write_text(TESTS)
    monkeypatch.setattr(gpu_tests, "workers", lambda: 0)
    assert gpu_tests.run(path, "about\n", Part("repeats", 100), [file]) == 0
    assert path.read_text().count("1 passed, 0 failed") == 1
    assert gpu_tests.run(path, "about\n", Part("huge", 100), [file]) == 1  # none is not all


def test_gpu_tests_that_would_begin_too_late_are_named(tmp_path, monkeypatch):
    file, path = tmp_path / "test_gpu_something.py", tmp_path / "tests.txt"
    file.write_text(TESTS)
    monkeypatch.setattr(gpu_tests, "workers", lambda: 0)
    assert gpu_tests.run(path, "about\n", Part("tests", 0), [file]) == 1
    assert "skipped, 2: left out: the time limit was reached" in path.read_text()


def test_every_part_of_the_tests_has_tests():
    """By names of functions: those of `RUNS` are in the files, and what needs all of the memory is marked."""
    text = "".join([path.read_text() for path in gpu_tests.gpu_test_files()])
    for _, names, _ in [each for runs in gpu_tests.RUNS.values() for each in runs]:
        for name in set(re.findall(r"\w+", names)) - {"or", "not"}:
            assert name in text
    for function in text.split("\ndef ")[1:]:
        if "mem_get_info" in function:
            at = text.index(f"def {function[:40]}")
            assert "past_2_31" in function or "@pytest.mark.alone" in text[at - 80 : at], function[:60]


SANITIZED = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("i", range(5))
def test_layouts(i): assert i != 3
"""


def test_each_tool_shares_the_tests_out_and_writes_what_it_finds(tmp_path, monkeypatch):
    file, path, original = tmp_path / "test_gpu_ops.py", tmp_path / "racecheck.txt", gpu_sanitize.command
    file.write_text(SANITIZED)

    def command(*arguments):
        made = original(*arguments)
        assert made[:5] == ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1"]
        return [str(file) if word == "tests/gpu/test_gpu_ops.py" else word for word in made[5:]]

    monkeypatch.setattr(gpu_sanitize, "command", command)
    assert gpu_sanitize.run(path, "about\n", Part("racecheck", 100), processes=2) == 1
    text = path.read_text()
    assert text.startswith("about\n\n2 of 2 processes have ended.")
    assert "process 0: status 0; 3 passed" in text and "process 1: status 1; 1 failed, 1 passed" in text
    assert "FAILED" in text and list(tmp_path.glob("*.log")) == []
    monkeypatch.setattr(gpu_sanitize, "command", lambda *_: ["no-such-sanitizer"])
    assert gpu_sanitize.run(path, "about\n", Part("racecheck", 100)) == 1
    assert "not run: compute-sanitizer, which comes with CUDA, was not found" in path.read_text()


def test_jobs_run_beside_each_other_within_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "warm.md"
    code = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.touch(); time.sleep(600 * int(sys.argv[2]))"

    def command(job):
        return [sys.executable, "-S", "-c", code, str(tmp_path / job.name), str(int(job.name == "hangs"))]

    monkeypatch.setattr(gpu_warm, "command", command)
    monkeypatch.setattr(gpu_warm.os, "sched_getaffinity", lambda _: range(16))
    jobs = [gpu_warm.Job("hangs", 50), gpu_warm.Job("too large beside it", 64), gpu_warm.Job("fits", 5)]
    part = Part("warm", 2)
    assert gpu_warm.run(jobs, path, "about", part) == 0
    assert part.left_out == ["hangs", "too large beside it"] and not (tmp_path / "too large beside it").exists()
    assert "| fits | 0 |" in path.read_text() and "hangs; too large beside it" in path.read_text()


def test_what_is_compiled_ahead_is_what_is_measured():
    from benchmarks.gpu_models import GROUPS

    names = [job.name for job in gpu_warm.jobs()]
    assert [f"model {i}" for i, group in enumerate(GROUPS) if group.compiled] == names[: -2 * gpu_warm.SHARES]
    assert names[-2 * gpu_warm.SHARES] == "kernels 0" and names[-gpu_warm.SHARES] == "attention 0"
    assert all([job.gigabytes <= gpu_warm.MEMORY for job in gpu_warm.jobs()])
    assert gpu_warm.command(gpu_warm.jobs()[0])[1:] == ["-m", "benchmarks.gpu_warm", "model", "1"]


def test_nothing_of_it_needs_a_package_that_may_be_missing():
    code = (
        "import sys\n"
        "missing = 'timm transformers pytest_benchmark matplotlib rich typer hypothesis psutil peft'\n"
        "sys.modules |= dict.fromkeys(missing.split())\n"
        "from benchmarks import gpu, op_cells\n"
        "op_cells.DTYPES['cuda']; print(gpu.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(gpu.__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or done.stdout == "1\n"
