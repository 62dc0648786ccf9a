"""A sweep that is interrupted goes on where it was; what is kept is decided by all that decides a result."""

import json

import pytest
import torch

from planecycle_fast.bench import command, environment, measure, rows, sweep
from planecycle_fast.bench.cells import groups, quick
from planecycle_fast.bench.measure import Group
from planecycle_fast.commands import cli

from .small_bench import EFFORT, VOLUME, cell, row, small  # noqa: F401

CPU = torch.device("cpu")
CELLS = [cell(mode, volume=volume) for volume in (VOLUME, "2x4x64", "3x4x64") for mode in ("slice2d", "PCg")]


class Measurements:
    """Stands in for `Group.measure`: which groups were measured, and one that is interrupted."""

    def __init__(self):
        self.made, self.stop_at = [], None

    def __call__(self, group, effort):
        of = group.cells[0].volume
        if of == self.stop_at:
            raise KeyboardInterrupt
        self.made.append(of)
        return {each: {"status": "measured", "reason": "", "seconds": 0.5} for each in group.cells}


@pytest.fixture
def made(small, monkeypatch):  # noqa: F811
    found = Measurements()
    monkeypatch.setattr(Group, "measure", lambda group, effort: found(group, effort))
    return found


def run(folder, cells=CELLS, effort=EFFORT, limit=None):
    return sweep.run_sweep(cells, CPU, folder, effort, "planecycle-fast bench", limit)


def stored(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_say_all_that_decides_them(tmp_path, made):
    found = run(tmp_path)
    assert found == stored(tmp_path) and [rows.cell_of(each) for each in found] == CELLS
    for each in found:
        assert each["stamp"].keys() == {"command", "commit", "date"}
        assert {"device", "threads", "source", "torch version", "python version"} <= each["environment"].keys()
        assert each["ceiling_flops"] > 0 and each["ceiling_bandwidth"] > 0
    assert len({each["group"] for each in found}) == 3


def test_an_interrupted_sweep_resumes(tmp_path, made, capsys):
    made.stop_at = "2x4x64"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert made.made == [VOLUME] and len(stored(tmp_path)) == 2
    first, made.stop_at = stored(tmp_path), None
    found = run(tmp_path)
    assert made.made == [VOLUME, "2x4x64", "3x4x64"] and found[:2] == first and len(stored(tmp_path)) == 6
    assert "kept 2 cells of an earlier run" in capsys.readouterr().err
    assert run(tmp_path) == found and len(made.made) == 3
    assert "kept 6 cells of an earlier run" in capsys.readouterr().err


def test_a_group_that_was_cut_off_is_measured_again_as_a_whole(tmp_path, made):
    run(tmp_path, CELLS[:4])
    path = tmp_path / "rows.jsonl"
    text = path.read_text()
    path.write_text(text[:-40])  # killed while it wrote its last row
    found = run(tmp_path, CELLS[:4])
    assert made.made == [VOLUME, "2x4x64", "2x4x64"]
    assert len({each["group"] for each in found[2:]}) == 1 and len(stored(tmp_path)) == 5


@pytest.mark.parametrize("change", ["source", "threads", "effort"])
def test_other_code_threads_and_effort_are_measured_anew(tmp_path, made, monkeypatch, change):
    run(tmp_path, CELLS[:2])
    effort = EFFORT._replace(name="other") if change == "effort" else EFFORT
    if change != "effort":
        here = environment.environment_of(CPU)
        monkeypatch.setattr(sweep, "environment_of", lambda device: here | {change: "other"})
    found = run(tmp_path, CELLS[:2], effort)
    assert made.made == [VOLUME, VOLUME] and len(stored(tmp_path)) == 4
    assert found == stored(tmp_path)[2:]


def test_more_cells_in_a_group_are_measured_together(tmp_path, made):
    run(tmp_path, CELLS[:1])
    assert len({each["group"] for each in run(tmp_path, CELLS[:2])}) == 1
    assert run(tmp_path, CELLS[:1])[0]["group"] == stored(tmp_path)[-1]["group"]  # the newest
    assert len(made.made) == 2


def test_another_file_is_refused(tmp_path, made):
    (tmp_path / "rows.jsonl").write_text('{"something": "else"}\n{}\n')
    with pytest.raises(ValueError, match="rows of planecycle-fast bench, got in line 1"):
        run(tmp_path)


def test_a_limit_leaves_out_what_would_end_too_late(tmp_path, made, monkeypatch):
    monkeypatch.setattr(
        sweep.Estimator, "seconds", lambda self, group, _: {VOLUME: 9.0, "2x4x64": 1e9, "3x4x64": 2.0}[group[0].volume]
    )
    found = run(tmp_path, limit=1000)
    assert made.made == ["3x4x64", VOLUME]  # the shortest first
    assert [each["status"] for each in found] == ["measured"] * 2 + ["left out: no time"] * 2 + ["measured"] * 2
    assert len(stored(tmp_path)) == 4  # what was left out is tried again


def test_a_slow_machine_leaves_out_more(tmp_path, made, monkeypatch):
    now = [0.0]

    def measure(group, effort):
        now[0] += 30  # three times the estimate
        return made(group, effort)

    monkeypatch.setattr(Group, "measure", measure)
    monkeypatch.setattr(sweep, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sweep.Estimator, "seconds", lambda *_: 10.0)
    monkeypatch.setattr(sweep.Estimator, "once", lambda *_: 0.0)
    run(tmp_path, limit=75)
    assert made.made == [VOLUME, "2x4x64"]  # the third would end after 90 seconds, not after 70


def test_weights_that_do_not_fit_are_a_result(tmp_path, made, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1000)
    assert {each["status"] for each in run(tmp_path)} == {"out of memory"} and made.made == []


def test_volumes_that_do_not_fit_are_a_result(tmp_path, small, monkeypatch):  # noqa: F811
    def randn(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(sweep, "_ceilings", lambda *_: {"ceiling_flops": 1.0, "ceiling_bandwidth": 1.0})
    assert {each["status"] for each in run(tmp_path)} == {"out of memory"}


def test_one_library_that_is_missing_stops_nothing(tmp_path, made, monkeypatch):
    def without(*_, **__):
        raise sweep.MissingPackageError("package 'timm' is not installed")

    monkeypatch.setattr(measure, "vit", without)
    assert {(each["status"], each["reason"]) for each in run(tmp_path)} == {
        ("not here", "package 'timm' is not installed")
    }


ARGUMENTS = ["bench", "--models", "ViT-S", "--volumes", VOLUME, "--steps", "inference", "--device", "cpu"]


def test_the_command_writes_rows_report_and_says_where(tmp_path, made, monkeypatch, capsys):
    cells = groups(quick(CPU, ["ViT-S"], [VOLUME], steps=["inference"]))[0]
    whole = {each: row(each) for each in cells}
    monkeypatch.setattr(Group, "measure", lambda group, effort: whole)
    assert cli.main([*ARGUMENTS, "--out", str(tmp_path / "new" / "out")]) == 0
    printed = capsys.readouterr()
    assert str(tmp_path / "new" / "out" / "report.md") in printed.out
    report = (tmp_path / "new" / "out" / "report.md").read_text()
    assert "planecycle-fast bench --models ViT-S --volumes 1x4x64" in report
    assert len(stored(tmp_path / "new" / "out")) == len(cells)
    whole[cells[0]] = {"status": "refused: outputs differ", "reason": "they are off"}
    assert cli.main([*ARGUMENTS, "--out", str(tmp_path / "other")]) == 1
    assert "they are off" in (tmp_path / "other" / "report.md").read_text()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, made, capsys):
    made.stop_at = VOLUME
    assert cli.main([*ARGUMENTS, "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "ViT-X"], "models must be some of ViT-S"),
        (["--volumes", "1x2"], "volumes must be like"),
        (["--dtype", "fp8"], "dtype must be some of"),
        (["--steps", "sleep"], "steps must be some of"),
        (["--device", "tpu9"], "device must be"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--out", str(tmp_path / "file")]) == 1
    assert "out must be a folder" in capsys.readouterr().err
    assert cli.main(["bench", "--out", str(tmp_path / "rows.csv")]) == 1
    assert "out must be a folder, got" in capsys.readouterr().err and not (tmp_path / "rows.csv").exists()


def test_without_matplotlib_there_is_a_report(tmp_path, made, monkeypatch, capsys):
    from planecycle_fast.bench import plots

    def missing(*_):
        raise command.MissingPackageError("package 'matplotlib' is not installed; it comes with")

    monkeypatch.setattr(plots, "require", missing)
    monkeypatch.setattr(Group, "measure", lambda group, effort: {each: row(each) for each in group.cells})
    assert cli.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert "No pictures: package 'matplotlib' is not installed" in (tmp_path / "report.md").read_text()
    assert "no pictures" in capsys.readouterr().err


def test_a_terminal_sees_a_bar_with_the_time_left(tmp_path, made, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run(tmp_path)
    err = capsys.readouterr().err
    assert "6 cells in 3 groups, about" in err and "left" in err and "ViT-S, 2x4x64, fp32, inference" in err


def test_the_digest_is_of_the_code(tmp_path, monkeypatch):
    environment.source_digest.cache_clear()
    first = environment.source_digest()
    environment.source_digest.cache_clear()
    (tmp_path / "planecycle_fast" / "bench").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "planecycle_fast" / "bench" / "environment.py"))
    empty = environment.source_digest()
    assert empty != first
    for name, changes in (("plots.py", False), ("timing.py", True)):  # pictures may change, how it is timed not
        (tmp_path / "planecycle_fast" / "bench" / name).write_text("x = 1\n")
        environment.source_digest.cache_clear()
        assert (environment.source_digest() != empty) is changes
    environment.source_digest.cache_clear()
