"""The pixels of DICOM files: plain ones by pydicom, packed ones by SimpleITK's GDCM in a process of its own.

A damaged JPEG can make GDCM crash, print, or take any amount of memory: there it does no harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from .optional import require
from .scan_checks import DAMAGED, Refused, reason

PROCESS_BYTES = 8 * 2**30  # addresses, most of them never used, of a process that has loaded SimpleITK
ONE_THREAD = dict.fromkeys(
    ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


def decoded(
    paths: list[Path], rescale: list[tuple[float, float]], size: tuple[int, int, int], packed: bool, memory: int
) -> np.ndarray:
    """Voxels (files * frames, rows, columns) float32, rescaled, of files of (columns, rows, frames) pixels each.

    Args:
        paths: the files, in the order of the result.
        rescale: slope and intercept of each.
        size: columns, rows and frames of every file.
        packed: whether pixels are compressed, in some file at least.
        memory: bytes that decoding one file may take.

    Raises Refused for pixels that cannot be decoded.
    """
    if packed:
        return _by_gdcm(paths, size, memory)
    pydicom = require("pydicom", "scans")
    columns, rows, frames = size
    voxels = np.empty((len(paths), frames, rows, columns), np.float32)
    for path, (slope, intercept), target in zip(paths, rescale, voxels):
        try:
            stored = pydicom.dcmread(path).pixel_array.reshape(target.shape)
        except OSError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise Refused(f"{DAMAGED}: {reason(error)} (file {path.name})") from error
        target[:] = stored * slope + intercept
    return voxels.reshape(-1, rows, columns)


def _by_gdcm(paths: list[Path], size: tuple[int, int, int], memory: int) -> np.ndarray:
    """As `decoded`; GDCM rescales by itself."""
    columns, rows, frames = size
    voxels = np.empty((len(paths) * frames, rows, columns), np.float32)
    task = {"paths": [str(path.absolute()) for path in paths], "size": size, "memory": memory + PROCESS_BYTES}
    # The packages of this process, and no module that happens to lie in the working directory.
    search = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", Path(__file__).with_name("gdcm_child.py").read_text(encoding="utf-8")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ONE_THREAD | search,
    )
    with process:
        try:
            process.stdin.write(json.dumps(task).encode())
            process.stdin.close()
            for number, path in enumerate(paths):
                part = voxels[number * frames : (number + 1) * frames]
                state = process.stdout.read(1)
                if state != b"\1" or process.stdout.readinto(memoryview(part).cast("B")) != part.nbytes:
                    said = process.stdout.read(2**16).decode(errors="replace") if state == b"\0" else ""
                    said = reason(Exception(said)) if said else f"its decoder ended with status {process.wait()}"
                    raise Refused(f"{DAMAGED}: {said} (file {path.name})")
        finally:
            process.kill()
    return voxels
