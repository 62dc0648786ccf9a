"""The pixels of DICOM files: plain ones by pydicom, packed ones by SimpleITK's GDCM in a process of its own.

A damaged JPEG can make GDCM crash, print, or take any amount of memory: there it does no harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from ...optional import reason, require
from ..checks import DAMAGED, Refused, damaged

PROCESS_BYTES = 8 * 2**30  # addresses, most of them never used, of a process that has loaded SimpleITK
ONE_THREAD = dict.fromkeys(
    ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


def decoded(
    paths: list[Path],
    rescales: list[list[tuple[float, float]]],
    size: tuple[int, int, int],
    dtype: np.dtype,
    packed: list[bool],
    memory: int,
) -> np.ndarray:
    """Voxels (files * frames, rows, columns) float32, rescaled, of files of (columns, rows, frames) pixels each.

    Args:
        paths: the files, in the order of the result.
        rescales: of each file, the slope and intercept of each frame.
        size: columns, rows and frames of every file.
        dtype: of the numbers that are stored.
        packed: of each file, whether its pixels are compressed.
        memory: bytes that decoding one file may take.

    Raises Refused for pixels that cannot be decoded.
    """
    columns, rows, frames = size
    shape = (frames, rows, columns)
    voxels = np.empty((len(paths), *shape), np.float32)
    unpacked = _by_gdcm([path for path, is_packed in zip(paths, packed) if is_packed], shape, dtype, memory)
    with closing(unpacked):
        for path, is_packed, rescale, target in zip(paths, packed, rescales, voxels):
            stored = next(unpacked) if is_packed else _by_pydicom(path, shape)
            for frame, numbers, (slope, intercept) in zip(target, stored, rescale):
                frame[:] = numbers * slope + intercept
    return voxels.reshape(-1, rows, columns)


def _by_pydicom(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Stored numbers (frames, rows, columns) of a plain file."""
    pydicom = require("pydicom", "scans")
    with damaged(path):
        return pydicom.dcmread(path).pixel_array.reshape(shape)


def _by_gdcm(paths: list[Path], shape: tuple[int, int, int], dtype: np.dtype, memory: int) -> Iterator[np.ndarray]:
    """Stored numbers (frames, rows, columns) of each of the packed files."""
    if not paths:
        return
    # The packages of this process, and no module that happens to lie in the working directory.
    search = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", Path(__file__).with_name("gdcm_child.py").read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as folder:  # not the process's own, which may not live to remove it
        task = {"paths": [str(path.absolute()) for path in paths], "bare": os.path.join(folder, "bare.dcm")}
        task |= {"size": shape[::-1], "dtype": dtype.str, "memory": memory + PROCESS_BYTES}
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ONE_THREAD | search,
        ) as process:
            try:
                process.stdin.write(json.dumps(task).encode())
                process.stdin.close()
                stored = np.empty(shape, dtype)
                for path in paths:
                    state = process.stdout.read(1)
                    if state != b"\1" or process.stdout.readinto(memoryview(stored).cast("B")) != stored.nbytes:
                        said = process.stdout.read(2**16).decode(errors="replace") if state == b"\0" else ""
                        said = reason(Exception(said)) if said else f"its decoder ended with status {process.wait()}"
                        raise Refused(f"{DAMAGED}: {said} (file {path.name})")
                    yield stored
            finally:
                process.kill()
