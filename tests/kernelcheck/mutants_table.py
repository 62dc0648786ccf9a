"""``make mutants``: edits every kernel in every way of `mutate`, runs `mutants`, and writes the committed tables.

`mutants.csv` has a row per mutant; why a survivor is harmless is written into it by hand, and kept as long as the edit
stays the same. `mutants.md` counts them, and compares plain tests with all of the test bed. Mutants that are known to
be killed, or explained, do not run again until the function that they edit changes, or what it calls and reads, or with
``--again``. To run all takes hours: the tables may be behind by some of the mutants, which they count (`stale`).
"""

import argparse
import csv
import functools
import hashlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .mutate import code_of, mutants

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "results"
TABLE, SUMMARY = RESULTS / "mutants.csv", RESULTS / "mutants.md"
EDIT = ["operation", "module", "function", "kind", "line", "before", "after", "occurrence"]
STAGES = ["plain tests", "all checks"]
COLUMNS = [*EDIT, *STAGES, "test", "error", "why it is harmless", "source"]
LEAST, SHARE = 70, 0.95  # mutants of an operation; of them killed
MOST = 300  # mutants of an operation that are run
BEHIND = 0.4  # of all mutants: may be due, as their function has changed since they ran


def operations():
    """The stems of all operations under test."""
    return sorted(path.stem for path in (PROJECT / "tests" / "specs").glob("*.py") if path.stem != "__init__")


def modules_of(operation):
    """Where the kernels of an operation are, relative to the project: all of one stem."""
    found = (PROJECT / "planecycle_fast" / "ops").glob(f"*/{operation}*_triton.py")
    return sorted(str(path.relative_to(PROJECT)) for path in found)


@functools.cache
def source_hash(module, function):
    """Of the code of a function, by the stem of its module, and of what it needs there."""
    [path] = (PROJECT / "planecycle_fast" / "ops").glob(f"*/{module}.py")
    text = path.read_text()
    return hashlib.sha256(code_of(text, function).encode()).hexdigest()[:12]


@functools.cache
def edits(operation):
    """[(row with the columns of EDIT, mutant)] of an operation as its source is now, `MOST` or few of each kind."""
    for most in (4, 2, 1):
        found = _edits(operation, most)
        if len(found) <= MOST:
            break
    return found


def _edits(operation, most):
    seen, found = Counter(), []
    for module in modules_of(operation):
        for mutant in mutants((PROJECT / module).read_text(), module, most):
            one_line = {name: " ".join(getattr(mutant, name).split()) for name in ("line", "before", "after")}
            row = {"operation": operation, "module": Path(module).stem, "function": mutant.function}
            row |= {"kind": mutant.kind, **one_line}
            seen[tuple(row.values())] += 1
            found.append((row | {"occurrence": str(seen[tuple(row.values())])}, mutant))
    return found


def read_table():
    """Rows of the committed table, as dictionaries."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def edit_of(row):
    return tuple(row[name] for name in EDIT)


def is_current(row):
    """Whether the function that was edited is still the same."""
    return row["source"] == source_hash(row["module"], row["function"])


def due(operation, rows):
    """The edits of an operation that have to be run: new ones, and those whose function has changed since they ran."""
    current = {edit_of(row) for row in rows if row["operation"] == operation and is_current(row)}
    return [row for row, _ in edits(operation) if edit_of(row) not in current]


def stale(rows):
    """Why the rows are not those of the operations as they are now, but for some that are due, or None if they are."""
    now = {edit_of(row) for operation in operations() for row, _ in edits(operation)}
    if gone := len({edit_of(row) for row in rows} - now):
        return f"{gone} mutants are gone"
    waiting = sum(len(due(operation, rows)) for operation in operations())
    if waiting > BEHIND * len(now):
        return f"{waiting} of {len(now)} mutants are due"
    return None


def summary(rows):
    """The text of mutants.md, of finished operations."""
    lines = [
        "# Mutants: faults planted in kernels, and what notices them",
        "",
        "`make mutants` writes this page and [mutants.csv](mutants.csv), a row per mutant. *Plain tests* compare",
        "outputs and gradients with the reference at round sizes in fp32, without sanitizers; *all checks* is all of",
        "the test bed. Outcomes of mutants that are due, as what they edit has changed since, are those of before.",
    ]
    for operation in operations():
        mine = [row for row in rows if row["operation"] == operation]
        lines += ["", f"## {operation}", "", f"Due: {len(due(operation, rows))} of {len(edits(operation))}."]
        if not mine:
            lines += ["", "Not run as a whole yet."]
        else:
            lines += ["", *_by_kind(mine), "", *_by_check(mine), "", *_survivors(mine)]
    return "\n".join(lines) + "\n"


def _killed(rows, stage):
    return sum(row[stage] == "killed" for row in rows)


def _by_kind(rows):
    yield "| kind of edit | mutants | killed by plain tests | killed by all checks |"
    yield "|---|---|---|---|"
    for kind in sorted({row["kind"] for row in rows}):
        mine = [row for row in rows if row["kind"] == kind]
        plain, everything = (_killed(mine, stage) for stage in STAGES)
        yield f"| {kind.replace('_', ' ')} | {len(mine)} | {plain} | {everything} |"
    plain, everything = (_killed(rows, stage) for stage in STAGES)
    shares = f"{plain} ({plain / len(rows):.1%}) | {everything} ({everything / len(rows):.1%})"
    yield f"| **all** | {len(rows)} | {shares} |"


def _by_check(rows):
    yield "What killed those that plain tests let live, first:"
    yield ""
    yield "| error | in | mutants |"
    yield "|---|---|---|"
    late = [row for row in rows if [row[stage] for stage in STAGES] == ["survived", "killed"]]
    found = Counter((row["error"], row["test"]) for row in late)
    for (error, test), number in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        yield f"| {error} | {test} | {number} |"


def _survivors(rows):
    survivors = [row for row in rows if row["all checks"] == "survived"]
    yield f"Survivors: {len(survivors)}"
    if survivors:
        yield ""
        yield "| where | edit | why it is harmless |"
        yield "|---|---|---|"
    for row in survivors:
        before, after = (row[name].replace("|", "\\|") for name in ("before", "after"))
        where, why = f"{row['module']}.{row['function']}", row["why it is harmless"] or "NOT EXPLAINED"
        yield f"| {where} | `{before}` to `{after}` | {why} |"


def main():
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("needs TRITON_INTERPRET=1, as in `make mutants`")
    parser = argparse.ArgumentParser(description="Runs mutants of kernels against their tests.")
    parser.add_argument("--operation", choices=operations(), nargs="*", default=operations())
    parser.add_argument("--only", default="", help="edits with this text, all of them; writes no table")
    parser.add_argument("--again", action="store_true", help="also those that are known to be killed, or explained")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    rows = {edit_of(row): row for row in read_table()}
    for operation in arguments.operation:
        now = {edit_of(row) for row, _ in edits(operation)}
        rows = {edit: row for edit, row in rows.items() if row["operation"] != operation or edit in now}
        known = {} if arguments.again or arguments.only else _known(operation, rows)
        _run(operation, rows, known, arguments)
    if not arguments.only:
        print(_write(rows))


def _write(rows):
    """Both tables; every finished mutant is in them, so that an interrupted run can go on."""
    order = [edit_of(row) for operation in operations() for row, _ in edits(operation)]
    rows = [rows[edit] for edit in order if edit in rows]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    SUMMARY.write_text(summary(rows))
    killed = [_killed(rows, stage) for stage in reversed(STAGES)]
    return f"{killed[0]} of {len(rows)} killed, {killed[1]} by plain tests alone"


def _known(operation, rows):
    known = {edit: row for edit, row in rows.items() if row["operation"] == operation and is_current(row)}
    return {edit: row for edit, row in known.items() if row["error"] or row["why it is harmless"]}


def _word(outcome):
    return "killed" if outcome.killed else "survived"


def _run(operation, table, known, arguments):
    """Runs every edit that is not known, and writes its row into the table."""
    import hypothesis  # noqa: F401  (imported once, before forking)
    import torch._dynamo  # noqa: F401
    import triton.language  # noqa: F401

    from .mutants import Bench, run_all

    chosen = [pair for pair in edits(operation) if arguments.only in f"{pair[0]}" and edit_of(pair[0]) not in known]
    rows = {mutant: row for row, mutant in chosen}

    def tell(progress, mutant, stage, outcome):
        result = f"{outcome.error} in {outcome.test}" if outcome.killed else "SURVIVED"
        print(f"{progress} | {stage} | {mutant.kind} | {mutant.before} -> {mutant.after} | {result}", flush=True)

    def done(mutant, plain, everything):
        row = rows[mutant]
        why = "" if everything.killed else table.get(edit_of(row), {}).get("why it is harmless", "")
        table[edit_of(row)] = row | {
            "plain tests": _word(plain), "all checks": _word(everything), "test": everything.test,
            "error": everything.error, "why it is harmless": why,
            "source": source_hash(row["module"], row["function"]),
        }  # fmt: skip
        if not arguments.only:
            _write(table)

    if not rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        places = [PROJECT, modules_of(operation), f"tests/interpreted/test_{operation}.py"]
        benches = [Bench(*places, Path(folder) / str(i)) for i in range(arguments.jobs)]
        run_all(benches, list(rows), done, tell=tell)


if __name__ == "__main__":
    main()
