"""What PENDING.md tells people to run is there: modules, files, parts, verbs, targets, and the options of each."""

import importlib.util
import re
import shlex

import pytest

from benchmarks import gpu
from planecycle_fast.commands import cli

from ..pages import ROOT, read

COMMANDS = {  # by what they start; `time` and variables before them are the shell's
    re.sub(r"^(\w+=\S+ |time )*", "", text)
    for text in re.findall(r"`([^`\n]+)`", read("benchmarks/results/PENDING.md"))
    if re.match(r"(\w+=\S+ |time )*(make|python|pytest|planecycle-fast) ", text)
}


def wrong(line):
    """What of a command is not there, in words; None if all is."""
    first, *words = shlex.split(line)
    if first == "python":
        module, *words = words[1:]
        if module != "pytest":
            if importlib.util.find_spec(module) is None:
                return f"no module {module}"
            return next((f"no part {word}" for word in words if word not in ("--only", *gpu.PARTS)), None)
    if first == "make":
        targets = [word for word in words if "=" not in word]
        makefile = read("Makefile")
        return next((f"no target {name}" for name in targets if not re.search(rf"^{name}:", makefile, re.M)), None)
    if first == "planecycle-fast":
        verb, *words = words
        options = cli._collected().commands[verb].params
        known = {name for each in options for name in (*each.opts, *each.secondary_opts)}
        return next((f"no option {word}" for word in words if word.startswith("--") and word not in known), None)
    files = [word for word in words if word.startswith(("tests/", "benchmarks"))]
    sources = [(ROOT / file).read_text() for file in files if (ROOT / file).is_file()]
    if gone := [file for file in files if not (ROOT / file).exists()]:
        return f"no file {gone[0]}"
    chosen = words[words.index("-k") + 1] if "-k" in words else ""
    return None if not chosen or any(chosen in source for source in sources) else f"no test {chosen}"


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_what_is_to_be_run_is_there(line):
    assert wrong(line) is None


def test_what_is_not_there_is_noticed():
    assert len(COMMANDS) > 15
    assert wrong("python -m benchmarks.gpus --only ops") == "no module benchmarks.gpus"
    assert wrong("python -m benchmarks.gpu --only op") == "no part op"
    assert wrong("make gpu-smoke gpu-fire TOOL=x") == "no target gpu-fire"
    assert wrong("planecycle-fast bench --quick --gpu h100") == "no option --gpu"
    assert wrong("pytest -m gpu tests/gpu/test_gpu_op.py") == "no file tests/gpu/test_gpu_op.py"
    assert wrong("pytest -m gpu tests/gpu/test_gpu_ops.py -k no_such") == "no test no_such"
