"""What of `make gpu` needs no GPU: its budget of time, its tables, that it names what it leaves out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_kernels, op_cells, op_measure
from benchmarks.budget import Budget
from planecycle_fast.benchmark.timing import summary


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


def test_all_of_it_stays_under_nine_minutes():
    assert 8 * 60 < sum(gpu.SECONDS.values()) <= 520


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no CUDA device was found: nothing to run\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "header", lambda: "Some GPU\n")
    return tmp_path


def test_parts_run_in_order_and_one_failure_is_the_status(folder, monkeypatch, capsys):
    ran = []

    def part(name, status):
        return lambda folder, part, **more: ran.append((name, more)) or status

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "results_folder", lambda: folder)
    for name in gpu.SECONDS:
        monkeypatch.setattr(gpu, name, part(name, int(name == "ops")))
    assert gpu.main(["--tiles"]) == 1
    assert [name for name, _ in ran] == ["tests", "ops", "kernels", "models"] and ran[2][1] == {"tiles": True}
    ran.clear()
    assert gpu.main(["--only", "kernels", "tests", "--skip-tests"]) == 0
    assert ran == [("kernels", {"tiles": False})]
    assert f"kernels: {sum(gpu.SECONDS.values()) - gpu.SECONDS['models']:.0f} s at most" in capsys.readouterr().out


def result(milliseconds, name, cell):
    times = summary([milliseconds / 1e3] * 5)
    info = {"contender": name, "GB/s": cell.bytes / times.median / 1e9, "ceiling": 3000.0}
    return op_measure.Result(times, (times.median,) * 5, info=info | {"share": info["GB/s"] / 3000})


def test_operations_are_written_for_people_and_programs(folder, monkeypatch, clock):
    cells = [
        op_cells.Cell("rope", label, "inference", torch.bfloat16, {}, {}, moved=1.5e8) for label in ("S", "B", "L")
    ]
    monkeypatch.setattr(gpu, "quick_cells", lambda: iter(cells))

    def measure(cell, device):
        clock.now += 60
        found = {op_cells.OURS: result(0.2, op_cells.OURS, cell), "eager": result(0.5, "eager", cell)}
        return found | {"Liger": op_measure.Result(missing="liger_kernel is not installed")}

    monkeypatch.setattr(op_measure, "measure", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    part = Budget({"ops": 100}, clock).begin("ops")
    assert gpu.ops(folder, part) == 0
    text = (folder / "ops.md").read_text()
    assert text.startswith("Some GPU\n") and "Left out, as 100 s were over (1): rope: L, bfloat16, inference" in text
    assert (
        "| rope: B, bfloat16, inference | planecycle_fast | 200 us | 200 us to 200 us | 1.5e+03 GB/s | 50% | 1.00 |"
        in text
    )
    assert "| eager | 500 us | 500 us to 500 us | 600 GB/s | 20% | 2.50 |" in text
    assert "| Liger | not measured: liger_kernel is not installed |" in text
    assert "Ceiling: a copy, 3000 GB/s, in the same run." in text
    stored = json.loads((folder / "ops.json").read_text())
    assert len(stored["rows"]) == 6 and stored["left_out"] == ["rope: L, bfloat16, inference"]
    assert stored["rows"][0]["share"] == pytest.approx(0.5) and stored["rows"][2]["missing"]


def test_something_refused_is_a_failure(folder, monkeypatch, clock):
    cell = op_cells.Cell("rope", "S", "inference", torch.bfloat16, {}, {}, moved=1)
    monkeypatch.setattr(gpu, "quick_cells", lambda: iter([cell]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(op_measure, "measure", lambda *_: {op_cells.OURS: op_measure.Result(refused="off by 1")})
    assert gpu.ops(folder, Budget({"ops": 100}, clock).begin("ops")) == 1
    assert "not measured: REFUSED: off by 1" in (folder / "ops.md").read_text()


def test_kernels_below_their_bar_stand_in_bold(folder, monkeypatch, clock):
    def call(channels, microseconds):
        def make():
            clock.now += 30
            return None, "forward", channels, (microseconds,)

        return f"kernel at {channels}", make

    def time_call(op, label, channels, arguments):
        [microseconds] = arguments
        return {"label": label, "channels": channels, "megabytes": 100.0, "microseconds": microseconds,
                "bandwidth": 100 / microseconds, "copy": 2.0, "ratio": 50 / microseconds}  # fmt: skip

    monkeypatch.setattr(gpu_kernels, "calls", lambda: iter([call(1024, 62), call(4096, 62), call(384, 100)]))
    monkeypatch.setattr(gpu_kernels, "time_call", time_call)
    monkeypatch.setattr(gpu_kernels, "host_time", lambda: "host\n")
    monkeypatch.setattr(gpu_kernels, "faster_tiles", lambda part: iter(["- forward, C = 384: (1, 2), 1.05 times"]))
    assert gpu.kernels(folder, Budget({"kernels": 50}, clock).begin("kernels"), tiles=True) == 0
    text = (folder / "kernels.md").read_text()
    assert "| forward | 1024 | 100.0 | 62.0 | 1.61 | 2.00 | 81% |" in text
    assert "| forward | 4096 | 100.0 | 62.0 | 1.61 | 2.00 | **81%** |" in text
    assert "Left out, as 50 s were over (1): kernel at 384" in text and "1.05 times" in text


TESTS = """
import time, pytest
pytestmark = pytest.mark.gpu
def test_first(): time.sleep({seconds})
def test_second(): assert False
def test_third(): pass
"""


@pytest.mark.parametrize(
    "seconds, limit, grace, status, says",
    [(0, 60, 60, 1, "1 failed, 2 passed"), (1.5, 1, 60, 0, "1 passed, 2 skipped"), (60, 1, 4, 1, "killed")],
)
def test_gpu_tests_end_in_time(tmp_path, clock, seconds, limit, grace, status, says):
    path = tmp_path / "test_gpu_something.py"
    path.write_text(TESTS.format(seconds=seconds))
    part = Budget({"tests": limit}, clock).begin("tests")
    got, text = gpu.run_tests([path], part, grace)
    assert got == status and says in text, text
    expected = {"1 passed, 2 skipped": ["2 tests"], "killed": ["the rest of the tests, killed"]}
    assert part.left_out == expected.get(says, [])


def test_the_cells_of_the_quick_run_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.setitem(op_cells.SHAPES, "cuda", [op_cells.TINY] * len(op_cells.SHAPES["cuda"]))
    original = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: original(*a, **k | {"device": "cpu"}))  # RoPE's periods
    cells = list(gpu.quick_cells())
    assert {cell.op for cell in cells} == set(gpu.OPERATIONS) and len(gpu.OPERATIONS) == 6
    assert all([cell.dtype == torch.bfloat16 for cell in cells])


def test_nothing_of_it_needs_a_package_that_may_be_missing():
    code = (
        "import sys\n"
        "missing = 'timm transformers pytest_benchmark matplotlib rich typer hypothesis psutil'\n"
        "sys.modules |= dict.fromkeys(missing.split())\n"
        "from benchmarks import gpu, op_cells\n"
        "op_cells.DTYPES['cuda']; print(gpu.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(gpu.__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.cuda.is_available() or done.stdout == "1\n"
