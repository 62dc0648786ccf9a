"""`make bench-compare` on made-up runs: what fails, what does not, what is said of what is gone."""

import json
import os

import pytest

from benchmarks import compare

OURS, PEER = "planecycle_fast", "reference"
RUN = {"rope, ViT-S": {OURS: 1.0, PEER: 2.0, "liger": 4.0}, "gelu, ViT-S": {OURS: 3.0, PEER: 3.0}}


@pytest.fixture
def store(tmp_path):
    """Writes a run {group: {contender: seconds}} as pytest-benchmark does; later ones are newer."""
    made = []

    def write(run, machine="Some CPU", info=None):
        benchmarks = [
            dict(group=group, name=f"test_op[{name}]", stats=dict(median=seconds),
                 extra_info=dict(contender=name, ours=name.startswith(OURS)) if info is None else info)
            for group, times in run.items() for name, seconds in times.items()
        ]  # fmt: skip
        stored = dict(benchmarks=benchmarks, machine_info=dict(cpu=dict(brand_raw=machine)),
                      commit_info=dict(id="0123456789"), datetime="2026-01-02T03:04:05+00:00")  # fmt: skip
        path = tmp_path / "Linux" / f"{len(made) + 1:04}_run.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(stored))
        os.utime(path, (1e9 + len(made), 1e9 + len(made)))
        made.append(path)
        return path

    return write


def with_ours(factor):
    return {group: {name: t * (factor if name == OURS else 1) for name, t in of.items()} for group, of in RUN.items()}


def status(*arguments):
    return compare.main(list(map(str, arguments)))


@pytest.mark.parametrize("factor, expected", [(0.5, 0), (1.0, 0), (1.09, 0), (1.11, 1), (3.0, 1)])
def test_more_than_a_tenth_fails(store, capsys, factor, expected):
    assert status(store(RUN), store(with_ours(factor))) == expected
    out = capsys.readouterr().out
    assert out.count("WORSE by") == (3 if expected else 0)
    assert f"3 ratios compared, {3 if expected else 0} worsened by more than 10%" in out
    if factor == 1.11:
        assert "WORSE by 11.0%: rope, ViT-S: time of planecycle_fast / liger: 0.250 became 0.278" in out


def test_a_machine_half_as_fast_changes_nothing(store, capsys):
    slow = {group: {name: 2 * t for name, t in of.items()} for group, of in RUN.items()}
    assert status(store(RUN), store(slow, machine="Another CPU")) == 0
    out = capsys.readouterr().out
    assert "machines differ" in out and "WORSE" not in out


def test_one_ratio_is_enough_and_named(store, capsys):
    new = RUN | {"gelu, ViT-S": {OURS: 3.5, PEER: 3.0}}
    assert status(store(RUN), store(new)) == 1
    out = capsys.readouterr().out
    assert out.count("WORSE by") == 1 and "WORSE by 16.7%: gelu, ViT-S: time of planecycle_fast / reference" in out


def test_a_faster_peer_counts(store):
    faster = RUN | {"gelu, ViT-S": {OURS: 3.0, PEER: 2.0}}
    assert status(store(RUN), store(faster)) == 1


def test_what_is_gone_is_said(store, capsys):
    new = {"rope, ViT-S": {OURS: 1.0, PEER: 2.0}, "swiglu, ViT-S": {OURS: 1.0, PEER: 2.0}}
    assert status(store(RUN), store(new)) == 0
    out = capsys.readouterr().out
    assert "group vanished: gelu, ViT-S" in out and "swiglu" not in out
    assert "ratio vanished: rope, ViT-S: planecycle_fast / liger" in out


def test_several_of_ours_are_compared_each(store, capsys):
    run = {"model": {OURS: 1.0, f"{OURS}, CUDA graph": 0.5, PEER: 2.0}}
    worse = {"model": {OURS: 1.0, f"{OURS}, CUDA graph": 0.6, PEER: 2.0}}
    assert status(store(run), store(worse)) == 1
    assert "time of planecycle_fast, CUDA graph / reference: 0.250 became 0.300" in capsys.readouterr().out


def test_nothing_in_common_is_no_pass(store, capsys):
    assert status(store(RUN), store({"other": {OURS: 1.0, PEER: 2.0}})) == 2
    assert "no ratio in common" in capsys.readouterr().err
    assert status(store(RUN, info={}), store(RUN)) == 2
    assert "5 benchmarks name no contender" in capsys.readouterr().out


def test_the_last_two_runs_are_taken(store, tmp_path, capsys):
    store(with_ours(0.1))
    assert status("--storage", tmp_path) == 2
    assert "must hold two stored runs, got 1" in capsys.readouterr().err
    store(RUN), store(with_ours(1.05))
    assert status("--storage", tmp_path) == 0
    assert status("--storage", tmp_path, "--limit", 0.04) == 1


def test_bad_files_are_named(store, tmp_path, capsys):
    good, bad = store(RUN), tmp_path / "bad.json"
    for text in ("{", "[]", '{"benchmarks": [{}]}'):
        bad.write_text(text)
        assert status(good, bad) == 2
        assert "bad.json is no run stored by pytest-benchmark" in capsys.readouterr().err
    assert status(good, tmp_path / "none.json") == 2
    assert status(good) == 2 and "two files or none, got 1" in capsys.readouterr().err
    assert status(good, store({"g": {OURS: 0.0, PEER: 1.0}})) == 2
    assert "has a median of 0.0 for 'planecycle_fast' in group 'g'" in capsys.readouterr().err


def test_a_contender_twice_is_refused(store, capsys):
    path = store(RUN)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"benchmarks": stored["benchmarks"] * 2}))
    assert status(path, path) == 2
    assert "has contender 'planecycle_fast' twice in group 'rope, ViT-S'" in capsys.readouterr().err


def test_without_rich_it_is_plain(store, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert status(store(RUN), store(with_ours(1.5))) == 1
    assert "rope, ViT-S  planecycle_fast  reference  0.500      0.750      +50.0% WORSE" in capsys.readouterr().out
