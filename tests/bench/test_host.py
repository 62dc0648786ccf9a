"""The benchmark of the host: whose time a frame is, what samples say, what the page holds. Nothing is timed here."""

import subprocess
import sys

import pytest
import torch

from benchmarks import host, host_times
from benchmarks.host_times import CHECKS, CHOICE, DISPATCH, LAUNCH, PARTS, REST, TORCH
from planecycle_fast.engine.block import _run_parts
from planecycle_fast.engine.branches import attention_branch
from planecycle_fast.ops.residual.norm import check_stream

from ..pages import ROOT
from ..toy import PATCH, ToyViT, toy_lift

PACKAGE = str(ROOT / "planecycle_fast")
SITE = "/some/site-packages/"
FRAMES = [  # file, function, part; the package's as it is now, and as it was at the baseline
    ("pcf/ops/residual/norm.py", "check_stream", CHECKS),
    ("pcf/hosts/description.py", "now", CHECKS),
    ("pcf/reading.py", "now", CHECKS),
    ("pcf/runtime/backends.py", "_why_not_triton", CHECKS),
    ("pcf/runtime/backends.py", "pick", CHOICE),
    ("pcf/backends.py", "pick", CHOICE),
    ("pcf/ops/choice.py", "here", CHOICE),
    ("pcf/ops/registration.py", "launch", DISPATCH),
    ("pcf/ops/custom.py", "launch", DISPATCH),
    ("pcf/ops/rotary/rope_autograd.py", "vmap_by", DISPATCH),
    ("pcf/ops/residual/add_norm_backward_triton.py", "backward", DISPATCH),
    ("pcf/ops/residual/add_norm_triton.py", "_add_norm", LAUNCH),
    ("pcf/ops/tiles.py", "tile", LAUNCH),
    ("pcf/engine/block.py", "_run_parts", REST),
    ("pcf/engine/block.py", "<lambda>", None),
    (SITE + "torch/_ops.py", "__call__", DISPATCH),
    (SITE + "torch/_library/autograd.py", "forward", DISPATCH),
    (SITE + "torch/autograd/function.py", "apply", DISPATCH),
    (SITE + "torch/autograd/graph.py", "_engine_run_backward", TORCH),
    (SITE + "torch/nn/modules/linear.py", "forward", TORCH),
    (SITE + "torch/compiler/__init__.py", "is_compiling", None),
    (SITE + "triton/runtime/jit.py", "run", LAUNCH),
    (SITE + "timm/models/eva.py", "forward", REST),
    ("/authors/planecycle/operators/op.py", "forward", REST),
    ("/usr/lib/python3.11/dataclasses.py", "replace", None),
]


@pytest.mark.parametrize("path, function, part", FRAMES)
def test_whose_time_a_frame_is(monkeypatch, path, function, part):
    monkeypatch.setenv(host_times.REPO, "/authors")
    assert host_times.part_of(path.replace("pcf/", "/tree/planecycle_fast/"), function, "/tree/planecycle_fast") == part


def instruction(function, name):
    """Where a function calls something of this name, or begins."""
    code = function.__code__
    first = 0 if sys.version_info >= (3, 11) else -2  # where a function begins
    return code, next(at for at in range(first, len(code.co_code), 2) if host_times.called(code, at) == name)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="instructions have no positions in Python 3.10")
def test_operations_are_torchs_wherever_they_are_called():
    at = instruction(_run_parts, "attention_branch")
    assert host_times.place((at,), PACKAGE) == (REST, "engine/block.py:_run_parts")
    at = instruction(attention_branch, "flatten")
    assert host_times.place((at,), PACKAGE) == (TORCH, "engine/branches.py:attention_branch -> flatten")


def test_until_a_function_has_begun_its_caller_runs():
    begun = instruction(host_times.place, "")
    runs, checks = (_run_parts.__code__, 0), (check_stream.__code__, 0)
    assert host_times.place((begun, runs), PACKAGE)[0] == REST
    assert host_times.place((begun, checks, runs), PACKAGE)[0] == CHECKS
    assert host_times.place((begun,), PACKAGE) == (REST, "elsewhere: benchmarks/host_times.py:place")


def test_parts_add_up():
    lifted = toy_lift(ToyViT(depth=2).double(), backend="reference")
    volume = torch.randn(1, 3, 2, 2 * PATCH, 2 * PATCH, dtype=torch.float64)
    with torch.no_grad():
        found = host_times.sampled(lambda: lifted(volume), 0.2)
    parts, places, within = host_times.shares(found, str(ROOT / "planecycle_fast"))
    assert tuple(parts) == PARTS and sum(parts.values()) == pytest.approx(1) and parts[TORCH] > 0 and parts[LAUNCH] == 0
    assert sum(share for share, *_ in places) == pytest.approx(1)
    assert within[0][0] > 0.8 and max(share for share, _ in within) <= 1 + 1e-9
    with pytest.raises(ValueError, match="must be of some time, got none"):
        host_times.shares({}, "")


@pytest.mark.parametrize("file", ["backends.py", "runtime/backends.py", "other.py"])
def test_modules_are_found_where_they_were_and_are(tmp_path, file):
    path = tmp_path / "planecycle_fast" / file
    path.parent.mkdir(parents=True)
    for made in (tmp_path / "planecycle_fast" / "__init__.py", path.parent / "__init__.py", path):
        made.touch()
    script = "import host_times as h; h.keep_to_path(); print(h.module_of('backends').__file__)"
    path_of_modules = f"{ROOT / 'benchmarks'}:{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={"PYTHONPATH": path_of_modules}, capture_output=True, text=True,
    )  # fmt: skip
    if file == "other.py":
        assert "must have a module backends, in runtime or beside it" in done.stderr
    else:
        assert done.stdout.strip() == str(path), done.stderr


def made_up():
    """Times of all rows of one round, and their parts."""
    times, parts = host.Times(), {}
    us = {"lifted": 100, "accelerated": 130, "authors": 240}
    for step in host.STEPS:
        for commit in ("now", "0123456"):
            for model in host.MODELS:
                row = host.Row(commit, model, step)
                if model == host.AUTHORS and commit != "now":
                    continue
                for depth in host.DEPTHS:
                    times.add(row, depth, (depth + 1) * us[model] * (1 if commit == "now" else 4))
                shares = dict.fromkeys(PARTS, 0.1) | {TORCH: 0.5}
                parts[row] = {"parts": shares, "places": [(0.5, TORCH, "f")], "within": []}
    return times, parts


def test_the_page_has_all_rows_and_marks_what_is_past_its_bar():
    times, parts = made_up()
    page = host.report(times, parts, "0123456")
    assert "Bars: now / 0123456 0.33 at most, authors' / now 2.00 at least; **bold** is past its bar." in page
    for step in host.STEPS:
        assert f"| lifted | {step} | {host.WHOLE} | 108 | 433 | 0.25 | 260 | 2.40 |" in page
        assert f"| lifted | {step} | {host.BLOCK} | 100 | 400 | 0.25 | 240 | 2.40 |" in page
        assert f"| accelerated | {step} | {host.BLOCK} | 130 | 520 | 0.25 | 240 | **1.85** |" in page
        assert f"| now | lifted | {step} | 108 | 11 | 11 | 11 | 11 | 54 | 11 |" in page
    assert "54.2 us  torch's own calls  f" in host.places(parts, times, 1)


def test_what_is_missing_says_why():
    times, parts = made_up()
    for step in host.STEPS:
        row = host.Row("now", "authors", step)
        for depth in host.DEPTHS:
            del times.of[row, depth]
        del parts[row]
        times.missing[row] = "PLANECYCLE_REPO names no checkout of the authors' code"
    page = host.report(times, parts, None)
    assert "| lifted | inference | a block: 12 less 4 of them, / 8 | 100 | - | - | - | - |" in page
    assert "Not measured: now authors inference: PLANECYCLE_REPO names no checkout of the authors' code." in page


def test_a_baseline_is_a_commit():
    expected = "baseline must be a commit of this repository, got 'no-such-commit'"
    with pytest.raises(ValueError, match=expected), host.checkout("no-such-commit"):
        pass


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's history")
def test_a_checkout_has_the_package_alone():
    with host.checkout("HEAD") as tree:
        assert [path.name for path in tree.iterdir()] == ["planecycle_fast"]
        assert (tree / "planecycle_fast" / "runtime" / "backends.py").is_file()
    assert not tree.exists()


@pytest.mark.full
def test_it_runs(tmp_path, capsys, monkeypatch):
    """A round of everything; kernels are compiled for a GPU that is not there."""
    pytest.importorskip("triton")
    monkeypatch.delenv(host_times.REPO, raising=False)
    out = tmp_path / "host.md"
    assert host.main(["--rounds", "1", "--calls", "1", "--seconds", "0.3", "--top", "3", "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("| now | lifted | ") == 2 and page.count("\n| lifted | ") == 4
    assert page.count("PLANECYCLE_REPO names no checkout") == 4  # the authors' code, and that accelerated
    assert "launch arguments" in capsys.readouterr().out
