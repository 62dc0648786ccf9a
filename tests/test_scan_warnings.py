"""What is odd in a scan but no reason to refuse it: a warning in Python, a line on the command line."""

import warnings

import pytest

from planecycle_fast import extract
from planecycle_fast.scan_checks import ScanWarning, warn, warnings_printed
from planecycle_fast.scan_files import load_scan

from .scans import write_nifti
from .test_extract import NOISE


def test_a_warning_is_of_the_line_that_asked_for_the_scan():
    with pytest.warns(ScanWarning, match="^odd$") as caught:
        warn("odd")
    assert caught[0].filename == __file__


def test_features_prints_each_as_a_line_and_goes_on(run, tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii", NOISE)
    write_nifti(tmp_path / "b.nii", NOISE)

    def load(path, **options):
        warn(f"volume {path} is odd")
        warn("and\nstrange")
        return load_scan(path, **options)

    monkeypatch.setattr(extract, "load_scan", load)
    status, out, err = run("a.nii", "b.nii", "--out", "out", "--pool")
    assert status == 0 and len(out) == 2
    assert err == [f"planecycle-fast: volume {n}.nii{t}" for n in "ab" for t in (" is odd", ": and strange")]


def test_other_warnings_stay_warnings(tmp_path, capsys):
    with pytest.warns(UserWarning, match="of somebody else"), warnings_printed(tmp_path):
        warnings.warn("of somebody else", stacklevel=1)
    assert capsys.readouterr().err == ""
