"""``make compile-check``: real Inductor, whole models, no GPU. Writes benchmarks/results/compile-check.md.

Status 1 where anything fails, 2 where nothing can be compiled: in one line, why.
"""

import json
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from . import no_gpu, report
from .cases import all_cases

PROJECT = Path(__file__).parents[2]
RESULT = PROJECT / "benchmarks" / "results" / "compile-check.md"


def main():
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = no_gpu.environment(folder)
        except no_gpu.Unavailable as reason:
            print(f"compile-check: {reason}", file=sys.stderr)
            return 2
        what, file = about(), Path(folder) / "results.jsonl"
        file.touch()
        command = [sys.executable, "-m", "tests.compilecheck.compile", str(file)]
        subprocess.run(command, cwd=PROJECT, env=environment)
        results = [json.loads(line) for line in file.read_text().splitlines()]
    return write(what, results, [case.name for case in all_cases()])


def write(what, results, expected):
    """Writes the page, prints what failed. Returns the status."""
    RESULT.write_text(report.markdown(what, no_gpu.TARGET, results, expected))
    failures = report.verdict(results, expected)
    for text, names in failures.items():
        print(f"FAILED in {len(names)} cases: {text}")
    print(f"{len(results)} of {len(expected)} cases compiled, {len(failures)} different failures: {RESULT}")
    return int(bool(failures))


def about():
    """Of what the result is, in one line."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    versions = ", ".join([f"{name} {version(name)}" for name in ("torch", "triton", "timm", "transformers")])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return f"{date}, commit {commit or 'unknown'}, {versions}, Python {platform.python_version()}, {no_gpu.TARGET}."


if __name__ == "__main__":
    sys.exit(main())
