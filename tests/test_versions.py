"""`make test-versions`: its sets, its table, and what it counts."""

import re
import subprocess
import sys

import pytest

from .versions import __main__ as versions


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "TABLE", tmp_path / "versions.md")
    return tmp_path / "versions.md"


def cells(name, passed):
    return [name, "3.10.1", *["1.0"] * len(versions.SHOWN), passed, "0", "0", "none", "2026-01-01", "abc"]


def test_a_row_replaces_the_last_one_of_its_set(table):
    for name, passed in (("newest", "1"), ("lowest", "2"), ("newest", "3")):
        versions.write_row(name, cells(name, passed))
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.read_text().splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows] == ["set", "---", "lowest", "newest"]  # in the order of the sets
    assert {len(row) for row in rows} == {len(rows[0])}
    column = rows[0].index("passed")
    assert [row[column] for row in rows[2:]] == ["2", "3"]


SUITE = '<testsuites><testsuite name="pytest" errors="{}" failures="{}" skipped="{}" tests="{}"/></testsuites>'


@pytest.mark.parametrize("errors, failures, skipped, tests", [(0, 0, 0, 5), (1, 2, 3, 10)])
def test_what_is_counted(tmp_path, errors, failures, skipped, tests):
    report = tmp_path / "tests.xml"
    report.write_text(SUITE.format(errors, failures, skipped, tests))
    failed = errors + failures
    assert versions.counted(report) == {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def test_a_process_that_reports_nothing_has_failed(tmp_path):
    assert versions.counted(tmp_path / "tests.xml") == {"failed": 1}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("status", [0, 1])
def test_a_set_that_fails_fails_the_command(table, tmp_path, monkeypatch, status, small):
    def pytest_(python, tests, report):
        report.write_text(SUITE.format(0, status, 0, 3))
        return status

    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(versions, "install", lambda name: python)
    monkeypatch.setattr(versions, "pytest", pytest_)
    monkeypatch.setattr(versions, "row", lambda name, python, counts: cells(name, str(counts["passed"])))
    assert versions.main(["newest", *["--small"] * small]) == status
    assert table.exists() != small


def test_unknown_sets(capsys):
    with pytest.raises(SystemExit):
        versions.main(["oldest"])
    assert "sets must be of lowest, torch-2.11, newest, got oldest" in capsys.readouterr().err


def test_a_python_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHON310", "no-such-python")
    with pytest.raises(
        SystemExit, match=r"set lowest needs Python 3\.10, but there is no no-such-python; PYTHON310=\.\.\. n"
    ):
        versions.install("lowest")


def test_every_set_names_the_same_packages_and_a_python():
    pinned = [
        set(re.findall(r"^([\w-]+)==", (versions.HERE / f"{name}.txt").read_text(), re.M)) for name in versions.SETS
    ]
    assert all(names == pinned[0] >= set(versions.SHOWN) for names in pinned)
    assert [versions.wanted_python(name) for name in versions.SETS] == ["3.10", "3.12", "3.13"]


def test_what_runs_is_there():
    for tests in (*versions.ALL, *versions.SMALL):
        for path in tests[: tests.index("-k") if "-k" in tests else None]:
            assert (versions.ROOT / path).exists(), path


def test_the_command_needs_no_library():
    command = [sys.executable, "-S", "-m", "tests.versions", "--help"]  # -S: without site-packages
    assert "set" in subprocess.run(command, cwd=versions.ROOT, check=True, capture_output=True, text=True).stdout
