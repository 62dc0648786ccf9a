"""Reading takes no more memory than was checked against the limit."""

import os
import subprocess
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from planecycle_fast.scans.files import load_scan

from ..scan_writers import COUNTS, NOISE, write_dicom, write_frames, write_mgh, write_nifti, write_nrrd


def test_the_limit_is_checked_before_any_voxel_is_read(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz", NOISE)
    needed = NOISE.size * (4 + 8 + 8)  # float32 in the file, scaled in float64, two copies in float32
    assert load_scan(path, max_bytes=needed).voxels.shape == (12, 13, 14)

    def read(*_, **__):
        raise AssertionError("voxels were read")

    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "__array__", read)
    monkeypatch.setattr(np.lib.format, "read_array", read)
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", read)
    monkeypatch.setattr(subprocess, "Popen", read)
    np.savez(tmp_path / "a.npz", NOISE)
    paths = [path, tmp_path / "a.npz", write_nrrd(tmp_path / "a.nrrd", NOISE), write_dicom(tmp_path / "a", COUNTS)]
    for path, size in zip(paths, (needed, NOISE.size * 12, NOISE.size * 12, COUNTS.size * 8)):
        with pytest.raises(ValueError, match=r"must need at most .*, got a header that asks for"):
            load_scan(path, max_bytes=size - 1)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npy", "a.npz", "fortran.npz", "a.mha", "packed.mha", "a.mgz"])
def test_reading_keeps_to_what_was_declared(tmp_path, name, dtype):
    array = np.random.default_rng(0).integers(0, 2, (120, 110, 100)).astype(dtype)
    if name == "a.npy":
        np.save(tmp_path / name, array)
    elif name.endswith(".npz"):
        np.savez_compressed(tmp_path / name, np.asfortranarray(array) if "fortran" in name else array)
    elif name.endswith("mha"):
        write_nrrd(tmp_path / name, array, packed="packed" in name)
    elif name == "a.mgz":
        write_mgh(tmp_path / name, array := array.astype("f4" if dtype == "f8" else dtype))
    else:
        image = nibabel.Nifti1Image(array, np.eye(4))
        image.header.set_slope_inter(2.0, 1.0)
        nibabel.save(image, tmp_path / name)
    declared = array.size * (array.itemsize + (8 if ".np" in name or "mha" in name else 8 + 8))
    tracemalloc.start()
    load_scan(tmp_path / name, max_bytes=declared)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.05 * declared
    with pytest.raises(ValueError, match="got a header that asks for"):
        load_scan(tmp_path / name, max_bytes=declared - 1)


RESIDENT = """
import resource, sys
from pathlib import Path
from planecycle_fast.scans.files import load_scan

def children():
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

def own():
    status = Path("/proc/self/status").read_text()
    return [1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM")]

load_scan(sys.argv[1])
for path, limit in (sys.argv[2:4], sys.argv[4:6]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    (before, _), before_children = own(), children()
    load_scan(path, max_bytes=int(limit))
    print(own()[1] - before + children() - before_children)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux, to measure memory")
def test_reading_by_simpleitk_keeps_to_what_was_declared(tmp_path):
    array = np.random.default_rng(0).integers(0, 2, (240, 300, 120)).astype(np.int16)
    (tmp_path / "small").mkdir()
    small = write_frames(tmp_path / "small" / "a", COUNTS)  # a first child
    nrrd_limit, frames_limit = array.size * (2 + 8), array.size * (8 + 4 * 2) + array[..., 0].size * 16
    large = write_nrrd(tmp_path / "a.nrrd", array, None, True), write_frames(tmp_path / "a", array)
    arguments = [small, large[0], str(nrrd_limit), large[1], str(frames_limit)]
    done = subprocess.run([sys.executable, "-c", RESIDENT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for used, limit in zip(map(int, done.stdout.split()), (nrrd_limit, frames_limit)):
        assert 0.4 * limit < used < limit + 2**24, done.stdout  # less, and nothing was measured
    for path, limit in zip(large, (nrrd_limit, frames_limit)):
        with pytest.raises(ValueError, match="got a header that asks for"):
            load_scan(path, max_bytes=limit - 1)
