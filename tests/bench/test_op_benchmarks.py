"""The benchmarks of operations: all are there, contenders compute the same, wrong ones are refused. No bars."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark, whose tests these are")

from benchmarks import bench_attention, compare, op_measure, op_peers, op_report
from benchmarks.op_cells import COMPILED, INFERENCE, OURS, REFERENCE, TINY, TRAINING, fixed
from planecycle_fast import ops
from planecycle_fast.bench.contenders import NotHereError

PROJECT = Path(__file__).parents[2]
OPERATIONS = sorted([name.removesuffix("_ref") for name in ops.__all__ if name.endswith("_ref")])
CPU = torch.device("cpu")


def cells_of(op, dtype=torch.float32):
    return list(importlib.import_module(f"benchmarks.bench_{op}").cells([TINY], "cpu", dtype))


CELLS = [cell for op in OPERATIONS for cell in cells_of(op)]


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds for each cell."""
    monkeypatch.setattr(op_measure, "_compiled", lambda cell: cell.contenders[REFERENCE]())


def test_every_operation_has_a_benchmark():
    assert len(OPERATIONS) == 9 and {cell.op for cell in CELLS} == set(OPERATIONS)
    assert {path.stem for path in (PROJECT / "benchmarks").glob("bench_*.py")} >= {f"bench_{op}" for op in OPERATIONS}
    for cell in CELLS:
        assert OURS in cell.contenders and REFERENCE in cell.contenders, cell.group
        assert bool(cell.moved) != bool(cell.flops), cell.group
    assert len({cell.group for cell in CELLS}) == len(CELLS)


NEED_A_GPU = (
    op_peers.LIGER, op_peers.FLASH_TRITON, op_peers.FLASH_JIT, *op_peers.TORCHS.values(), bench_attention.ON_LOAD,
    op_peers.TANH_EPILOGUE,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_contenders_compute_the_same(uncompiled, op, dtype):
    for cell in cells_of(op, dtype):
        for name, result in op_measure.measure(cell, CPU, timed=False).items():
            assert result.refused is None, (cell.group, name, result.refused)
            others = name in NEED_A_GPU or "FlashAttention" in name
            assert (result.missing is None) != others, (cell.group, name, result.missing)


def test_torch_compile_is_of_the_whole_reference():
    [cell, *_] = cells_of("gelu")
    assert op_measure.measure(cell, CPU, timed=False)[COMPILED] == op_measure.Result()


@pytest.mark.parametrize("step", [INFERENCE, TRAINING])
def test_a_wrong_contender_is_refused_and_the_others_are_timed(uncompiled, monkeypatch, step):
    class Twice(torch.autograd.Function):  # right forward, wrong backward
        @staticmethod
        def forward(ctx, x):
            return torch.nn.functional.gelu(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    wrong = Twice.apply if step == TRAINING else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    cell = next(cell for cell in cells_of("gelu") if cell.step == step)
    more = {
        "wrong": fixed(wrong),
        "of another shape": fixed(lambda x: ops.gelu_ref(x)[1:]),
        "nan": fixed(lambda x: x / 0),
    }
    monkeypatch.setattr(op_measure, "_ceiling_bandwidth", lambda device: 1e9)
    found = op_measure.measure(replace(cell, contenders=cell.contenders | more), CPU)
    assert [found[name].times for name in more] == [None] * 3
    assert "off by" in found["wrong"].refused and "off by" in found["nan"].refused
    shape = found["of another shape"]  # in training its backward raises
    assert "shapes" in shape.refused if step == INFERENCE else "it raised" in shape.missing
    for name in (OURS, REFERENCE):
        result = found[name]
        assert len(result.seconds) >= op_measure.LEAST_ROUNDS and result.times.p20 <= result.times.median
        assert result.info["GB/s"] == pytest.approx(cell.bytes / result.times.median / 1e9)
        assert result.info["share"] == pytest.approx(result.info["GB/s"]) and result.info["ours"] == (name == OURS)
    text = op_report.markdown([(cell.group, found)])
    assert f"| {cell.group} | wrong | not measured: REFUSED: its outputs are off by" in text
    assert "Ceiling: a copy, 1 GB/s, in the same run." in text


def test_ours_must_not_fail_and_others_may(uncompiled):
    def fails(*_):
        raise ValueError("no such size\nand more")

    def absent():
        raise NotHereError("liger_kernel is not installed")

    [cell, *_] = cells_of("gelu")
    contenders = cell.contenders | {OURS: fixed(fails), "theirs": fixed(fails), "absent": absent}
    found = op_measure.measure(replace(cell, contenders=contenders), CPU, timed=False)
    assert found[OURS].refused == "ValueError: no such size"
    assert found["theirs"].missing == "it raised ValueError: no such size"
    assert found["absent"].missing == "liger_kernel is not installed"
    assert "| theirs | not measured: it raised" in op_report.markdown([(cell.group, found)])


def test_every_call_has_other_inputs_than_the_calls_before():
    seen = []
    sets = [(torch.full((1,), float(i)),) for i in range(op_measure.sets_of_inputs(2**26, 4, CPU))]
    timed = {name: op_measure._plain(lambda x, name=name: seen.append((name, x.item())), sets) for name in "abcd"}
    op_measure.sample(timed, CPU)
    assert len(sets) >= 3
    for name in "abcd":
        of_one = [x for who, x in seen if who == name]
        assert set(of_one[: len(sets)]) == {float(i) for i in range(len(sets))}
    assert all([a != b for (_, a), (_, b) in pairwise(seen)])


@pytest.mark.parametrize("cell", [c for c in CELLS if c.moved and c.step == INFERENCE], ids=lambda cell: cell.group)
def test_bytes_are_those_of_inputs_and_outputs(cell):
    inputs = op_measure._inputs(cell, CPU, 0)
    outputs = op_measure._step(cell, cell.contenders[REFERENCE]())(*inputs)
    elements = sum([t.numel() for t in [*inputs, *outputs] if t.ndim > 1])
    assert cell.bytes == 4 * elements * (2 / 3 if cell.op == "rope" else 1)  # values stay where they are


def test_flops_are_those_that_torch_counts():
    alone, training, along = cells_of("attention")
    for cell in (alone, along):
        with FlopCounterMode(display=False) as counter:
            cell.contenders[REFERENCE]()(*op_measure._inputs(cell, CPU, 0))
        assert counter.get_total_flops() == cell.flops
    shape = [(TINY.sequences[0], TINY.heads, TINY.sequences[1], TINY.channels // TINY.heads)] * 4
    assert training.flops == sdpa_flop_count(*shape[:3]) + sdpa_backward_flop_count(*shape)


END_TO_END = """
from benchmarks import op_benchmark, op_cells, op_measure
op_benchmark.SHAPES = {device: [op_cells.TINY] for device in ("cpu", "cuda")}
op_measure._compiled = lambda cell: cell.contenders[op_cells.REFERENCE]()
op_measure._ceiling_bandwidth = lambda device: 1e9
from benchmarks.bench_swiglu import test_swiglu
"""


@pytest.mark.full
def test_pytest_benchmark_stores_and_compares_runs(tmp_path):
    (tmp_path / "bench_tiny.py").write_text(END_TO_END)
    storage = tmp_path / "stored"
    command = [sys.executable, "-m", "pytest", str(tmp_path / "bench_tiny.py"), "-p", "benchmarks.conftest", "-rs",
               "-p", "no:cacheprovider", f"--benchmark-storage=file://{storage}", "--benchmark-autosave"]  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items() if "XDIST" not in name
    }  # it times nothing in a worker
    outputs = []
    for more in ([], ["--benchmark-compare"]):
        done = subprocess.run(command + more, cwd=PROJECT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "liger_kernel needs a CUDA device" in outputs[0] or torch.cuda.is_available()
    assert "operations, all in turns in one run" in outputs[0] and "of the ceiling" in outputs[0]
    assert "(NOW)" in outputs[1] and "(0001_" in outputs[1]  # pytest-benchmark's own table of both runs
    old, new = [compare.read(path) for path in compare.last_two(storage)]
    assert len(old.groups) == 4 and old.ratios.keys() == new.ratios.keys() and not old.ignored
    assert {(ours, peer) for _, ours, peer in old.ratios} >= {(OURS, REFERENCE), (OURS, COMPILED)}
