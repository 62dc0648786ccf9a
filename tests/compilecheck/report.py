"""What ``make compile-check`` writes: a table of cases, a list of failures, a verdict."""

from collections import Counter

from ..specs import COMPILED

COLUMNS = ["model", "mode", "step", "sizes", "dtype", "graphs", "our kernels", "Inductor's", "copies", "failures"]
INTRODUCTION = """\
Whole models, small in width and depth, compiled by `torch.compile(fullgraph=True)` and Inductor for a GPU that is not
there, forward and, in training, backward; nothing runs. Each of our kernels that Inductor writes into its code is
compiled by triton for {target} as Inductor compiles it; what Inductor finds to be written to are exactly its outputs;
no pointer of it is advanced by 32 bits, and no 32-bit product of two variables is widened. "dynamic": one graph serves
a second volume of other batch and depth, in inference also of other height and width.

*Graphs* that Dynamo made (1 is expected); *our kernels*, compiled; *Inductor's* own, counted; *copies*: launches of the
generated code whose name says that they clone or copy, and calls of aten's.
"""


def verdict(results, expected):
    """Failures by text, each with the cases it is of: also cases and kernels that should be there and are not."""
    failures = {}
    for row in results:
        for text in row["failures"]:
            failures.setdefault(text, []).append(name_of(row))
    missing = [name for name in expected if name not in map(name_of, results)]
    if missing:
        failures["not compiled: the process ended before"] = missing
    for kernel in sorted(COMPILED):
        if not any([kernel in row["ours"] for row in results]):
            failures[f"{kernel} is in no generated code"] = expected
    return failures


def name_of(row):
    """A case in words."""
    return " ".join([row[key] for key in COLUMNS[:5]])


def markdown(about, target, results, expected):
    """The page.

    Args:
        about: date, commit, versions, in one line.
        target: e.g. "sm_90".
        results: of each case, what `cases.main` wrote.
        expected: names of all cases.
    """
    failures = verdict(results, expected)
    kernels = sum([Counter(row["ours"]) for row in results], Counter())
    if failures:
        failed = {name for names in failures.values() for name in names}
        said = f"**FAILED**: {len(failures)} different failures, in {len(failed)}"
    else:
        said = "**Passed**: no failure in any"
    lines = ["# torch.compile for a GPU that is not there", "", about, "", f"{said} of {len(expected)} cases.", ""]
    lines += [INTRODUCTION.format(target=target), f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in results]
    lines += ["", f"Our kernels in all: {_kernels(kernels) or 'none'}.", ""]
    if failures:
        lines += ["## Failures", ""]
        lines += [f"- `{text}` in {_cases(names, expected)}" for text, names in failures.items()]
        lines.append("")
    return "\n".join(lines)


def _cases(names, expected):
    return f"all {len(names)}" if len(names) == len(expected) else f"{len(names)}: {'; '.join(names)}"


def _cells(row):
    numbers = [row["graphs"], _kernels(row["ours"]) or "none", row["inductors"], row["copies"]]
    return [*[row[key] for key in COLUMNS[:5]], *map(str, numbers), str(len(row["failures"]) or "none")]


def _kernels(counts):
    short = {name.removesuffix("_kernel"): count for name, count in counts.items()}
    return ", ".join([f"{short[name]} {name}" for name in sorted(short)])
