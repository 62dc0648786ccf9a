"""A GPU that is not there (`no_gpu.c`), for a process that is about to start: torch and triton find an H100."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("no_gpu.c")
LIBRARY = "libcuda.so.1"  # the driver's name: triton and torch open it by that
TARGET = "sm_90"


class Unavailable(Exception):
    """Why nothing can be compiled for a GPU here, in one line."""


def headers():
    """Folders of CUDA's headers: those that come with a CUDA build of torch, and triton's for what these lack."""
    import torch
    import triton

    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is no CUDA build; `make compile-check` installs one of its own")
    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda_runtime_api.h"))
    if not found:
        raise Unavailable(f"the headers of CUDA are not beside torch {torch.__version__}: nvidia/*/include is missing")
    return [*[header.parent for header in found], Path(triton.__file__).parent / "backends" / "nvidia" / "include"]


def environment(folder):
    """Builds the library into `folder`; the environment of a process that finds the GPU. Raises Unavailable."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise Unavailable("a C compiler (cc, gcc, clang) was not found")
    flags = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY}", *[f"-I{path}" for path in headers()]]
    library = Path(folder) / LIBRARY
    done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{compiler} failed on {SOURCE.name}: {(done.stderr.strip() or '?').splitlines()[0]}")
    search = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": ":".join(filter(None, search)),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # everything is compiled
        "CUDA_VISIBLE_DEVICES": "0",
    }
