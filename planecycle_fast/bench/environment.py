"""Where and of what a result is: code, versions, device, command, date."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from ..inputs import usable_device
from ..runtime import native
from ..version import versions

PACKAGES = ("planecycle-fast", "python", "torch", "triton", "timm", "transformers", "torchvision")
SHOWING = ("bench/plots.py", "bench/report.py", "bench/laws.py", "bench/table.py", "bench/bars.py", "bench/command.py",
           "bench/estimate.py")  # fmt: skip


def environment_of(device: torch.device) -> dict[str, str | int]:
    """All that decides a time besides the cell itself. A result of another environment is another result."""
    found = {f"{name} version": version for name, version in versions().items() if name in PACKAGES}
    return found | {
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "source": source_digest(),
        "authors": os.environ.get("PLANECYCLE_REPO") is not None,
        "backend": os.environ.get("PLANECYCLE_FAST_BACKEND", "auto"),
    }


def stamp(command: str) -> dict[str, str]:
    """What a reader wants to know besides: command, commit and date."""
    return {"command": command, "commit": commit(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"}


def about(device: torch.device, command: str) -> str:
    """The same in a line, as the head of a file."""
    found, threads = versions(), f"{torch.get_num_threads()} threads, {native.capability()}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        threads = f"sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}"
    return (
        f"{device_name(device)}, {threads}, torch {found['torch']}, triton {found['triton']}, "
        f"Python {found['python']}, commit {commit()}, {datetime.now(timezone.utc):%Y-%m-%d}, `{command}`\n"
    )


@cache
def commit() -> str:
    """Of the checkout that this package is in, with "-dirty" where files differ from it; "unknown" without git."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@cache
def source_digest() -> str:
    """Of the package's Python and C++ files, but those that only show results: what ran, committed or not."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    python = [file for file in sorted(package.rglob("*.py")) if file.relative_to(package).as_posix() not in SHOWING]
    files = [*python, *sorted(native.csrc().glob("*.cpp")), *sorted(native.csrc().glob("*.h"))]
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return name or platform.processor() or platform.machine()


def folder_name(device: torch.device) -> str:
    """The device's name as a folder's: of results that are kept."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


if __name__ == "__main__":
    print(folder_name(usable_device("auto")))
