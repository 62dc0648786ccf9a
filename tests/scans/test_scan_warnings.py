"""What is odd in a scan but no reason to refuse it: a warning in Python, a line on the command line."""

import warnings

import nibabel
import numpy as np
import pytest

from planecycle_fast.scans import extraction as extract
from planecycle_fast.scans.checks import ScanWarning, warn, warnings_printed
from planecycle_fast.scans.files import load_scan

from ..commands.test_features import NOISE
from ..scan_writers import COUNTS, write_nifti


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


@pytest.mark.parametrize("name", ["a  b.npy", "a\tb.npy", "a\nb.npy"])
def test_names_with_other_blanks_are_said_once(run, tmp_path, name):
    np.save(tmp_path / name, np.where(NOISE > 0, NOISE, np.float32(np.nan)))
    status, out, err = run(name, "--out", "out", "--pool")
    assert status == 1 and out == [] and len(err) == 1
    assert err[0].startswith("planecycle-fast: volume a b.npy must hold finite voxels") and err[0].count("volume") == 1


def test_other_warnings_stay_warnings(tmp_path, capsys):
    with pytest.warns(UserWarning, match="of somebody else"), warnings_printed(tmp_path):
        warnings.warn("of somebody else", stacklevel=1)
    assert capsys.readouterr().err == ""


# Two affines in one NIfTI


def two_forms(path, sform, qform, codes=(1, 1)):
    image = nibabel.Nifti1Image(COUNTS, None)
    image.header.set_qform(qform, codes[1])
    image.header.set_sform(sform, codes[0])
    nibabel.save(image, path)
    return path


BASE = np.diag([2.0, 2, 3, 1])
TURNED = BASE.copy()
TURNED[:3, :3] = BASE[:3, :3] @ [[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]]


@pytest.mark.parametrize("other, apart", [
    (BASE + np.eye(4, k=3) * 1.1, "1.1"),
    (np.diag([2.0, 2, 3.5, 1]), "2"),  # only at the far end
    (TURNED, "4.67"),
    (BASE * [[-1], [1], [1], [1]], "24"),
])  # fmt: skip
def test_an_sform_and_a_qform_that_disagree(run, tmp_path, other, apart):
    path = two_forms(tmp_path / "a.nii", BASE, other)
    line = f"has an sform and a qform that are up to {apart} mm apart: its sform was taken"
    with pytest.warns(ScanWarning, match=f"^volume {path} {line}$"):
        scan = load_scan(path, axes="RAS")
    assert np.allclose(scan.affine, BASE)
    status, _, err = run("a.nii", "--out", "f.npz", "--pool")
    assert status == 0 and err == [f"planecycle-fast: volume a.nii {line}"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("other, codes", [
    (BASE, (1, 1)),
    (BASE + np.eye(4, k=3) * 0.9, (4, 1)),  # less than half a voxel
    (TURNED, (1, 0)),
])  # fmt: skip
def test_forms_that_agree_or_are_alone(tmp_path, other, codes):
    scan = load_scan(two_forms(tmp_path / "a.nii", BASE, other, codes), axes="RAS")
    assert np.allclose(scan.affine, BASE)


def test_a_qform_that_is_none(tmp_path):
    path = two_forms(tmp_path / "a.nii", BASE, BASE)
    data = bytearray(path.read_bytes())
    data[256:268] = np.array([3, 3, 3], "<f4").tobytes()  # a quaternion of more than unit length
    path.write_bytes(data)
    with pytest.warns(ScanWarning, match="has a qform that cannot be read .*: its sform was taken"):
        load_scan(path)
