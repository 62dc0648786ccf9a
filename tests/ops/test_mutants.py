"""Mutants: the edits are what they say, runs end as they must, and the committed tables are true."""

import ast
import itertools
import textwrap
from pathlib import Path

import pytest

from ..kernelcheck import mutants_table
from ..kernelcheck.mutants import ALL, PLAIN, Bench, run_all
from ..kernelcheck.mutate import KINDS, code_of, mutants
from ..specs import SPECS

KERNEL = textwrap.dedent('''\
    """A module that is never imported."""


    @triton.jit
    def scale_kernel(x, out, n, x_row: tl.int64, x_col: tl.int64, out_row, ACC: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, n, BLOCK):
            c = start + tl.arange(0, BLOCK)
            i1, i2 = c // 2, tl.cast(c % 2, tl.int64)
            mask = (c < n)[:, None] & (i2 >= 0)[None, :]
            total += tl.load(x + row * x_row + i1 * x_col, mask=mask, other=0).to(ACC)
        if ACC:
            total = tl.where(total > 1, tl.sum(total, 0), tl.maximum(total, 1))
        tl.store(out + row * out_row, total, mask=tl.cdiv(n, 2) < 3)
        tiles.store([row, 0], total)


    def _scale(x, before, after):
        num_in = before.slices(x)
        launch(scale_kernel, num_in)
        return num_in if x else after.slices(x)


    def not_a_kernel(x):
        return x * 2 + 1
''')
EXPECTED = {  # of every kind one edit: what it makes of KERNEL
    "another_stride": ("x_row", "x_col"),
    "another_axis_of_the_plane": ("i2", "i1"),
    "the_other_plane": ("after", "before"),
    "drop_mask": (
        "tl.store(out + row * out_row, total, mask=tl.cdiv(n, 2) < 3)",
        "tl.store((out + row * out_row), total)",
    ),
    "half_mask": ("(c < n)[:, None] & (i2 >= 0)[None, :]", "(c < n)[:, None] & ((i2 >= 0)[None, :] | True)"),
    "bound_off_by_one": ("c < n", "c <= n"),
    "wrong_axis": ("(c < n)[:, None]", "(c < n)[None, :]"),
    "narrow_integer": ("x_row: tl.int64", "x_row: tl.int32"),
    "drop_edge": ("tl.cdiv(n, 2)", "((n) // (2))"),
    "shorter_loop": ("range(0, n, BLOCK)", "range(0, n - BLOCK, BLOCK)"),
    "another_reduction": ("tl.sum(total, 0)", "tl.max(total, 0)"),
    "another_operator": ("c % 2", "(c // 2)"),
    "drop_factor": ("row * x_row", "row"),
    "other_branch": ("num_in if x else after.slices(x)", "(after.slices(x) if x else num_in)"),
    "drop_dependency": ("tl.store(out + row * out_row, total, mask=tl.cdiv(n, 2) < 3)", "pass"),
    "another_constant": ("2", "3"),
    "coarse_sum": (
        "tl.load(x + row * x_row + i1 * x_col, mask=mask, other=0).to(ACC)",
        "tl.load(x + row * x_row + i1 * x_col, mask=mask, other=0).to(ACC).to(tl.float16).to(ACC)",
    ),
    "used_masked_lanes": ("other=0", "other=2"),
    "another_tile": ("tiles.store([row, 0], total)", "tiles.store([0, row], total)"),
}


def test_every_kind_of_edit():
    assert len(KINDS) >= 12
    found = mutants(KERNEL, "scale_triton", most=100)
    edits = {(m.kind, m.before, m.after) for m in found}
    assert {kind.__name__ for kind in KINDS} == set(EXPECTED)
    for kind, (before, after) in EXPECTED.items():
        assert (kind, before, after) in edits, kind


def test_what_outcomes_depend_on():
    """A function, what it calls and which constants that reads; neither docstrings nor anything else."""
    text = 'LIMIT = 2\nOTHER = 3\n\n\ndef helper(x):\n    """Adds."""\n    return x + LIMIT\n\n\n'
    text += "def unused(x):\n    return OTHER\n\n\n@triton.jit(a=1)\ndef k(x):\n    return helper(x)\n"
    code = code_of(text, "k")
    for same in (("Adds", "Subtracts"), ("= 3", "= 4"), ("return OTHER", "return x")):
        assert code_of(text.replace(*same), "k") == code, same
    for different in (("= 2", "= 4"), ("x + LIMIT", "x - LIMIT"), ("a=1", "a=2"), ("helper(x)\n", "x\n")):
        assert code_of(text.replace(*different), "k") != code, different
    assert code_of(text.replace("a=1", "a=2"), "helper") == code_of(text, "helper")


def test_edits_change_one_place_of_a_kernel():
    for mutant in mutants(KERNEL, "scale_triton", most=100):
        edited = mutant.source(KERNEL)
        assert ast.dump(ast.parse(edited)) != ast.dump(ast.parse(KERNEL)), mutant
        assert len(edited) == len(KERNEL) + len(mutant.after) - len(mutant.before)
        assert edited.count("x * 2 + 1") == 1 and mutant.function in ("scale_kernel", "_scale")


def test_edits_are_the_same_at_every_call():
    few = mutants(KERNEL, "scale_triton", most=2)
    assert few == mutants(KERNEL, "scale_triton", most=2)
    everything = [m.source(KERNEL) for m in mutants(KERNEL, "scale_triton", most=100)]
    assert {m.source(KERNEL) for m in few} < set(everything) and len(set(everything)) == len(everything)
    for (kind, _), same in itertools.groupby(few, lambda m: (m.kind, m.function)):
        assert len(list(same)) <= 2 or kind == "narrow_integer"


TOY = "def value():\n    return 1\n"
TOY_TESTS = """
import os

import planecycle_fast.toy


def test_plain():
    value = planecycle_fast.toy.value()
    if value == 7:
        os.abort()
    assert value != 2


def test_error_budget():
    assert planecycle_fast.toy.value() != 3


def test_layouts():
    while planecycle_fast.toy.value() == 4:
        pass


def test_opcheck():
    assert planecycle_fast.toy.value() == 1  # left out


def test_overflow():
    assert planecycle_fast.toy.value() != 3
"""


class Edit:
    module = "planecycle_fast/toy.py"

    def __init__(self, text, kind=""):
        self.text, self.kind = text, kind

    def source(self, original):
        return original.replace("return 1", self.text)


@pytest.mark.full
def test_how_runs_end(tmp_path):
    """Killed by a plain test, by another, by time, by a crash, by an error at import; or not at all."""
    project = tmp_path / "project"
    for folder in ("planecycle_fast", "tests"):
        (project / folder).mkdir(parents=True)
        (project / folder / "__init__.py").touch()
    (project / "planecycle_fast" / "toy.py").write_text(TOY)
    (project / "tests" / "test_toy.py").write_text(TOY_TESTS)
    benches = [Bench(project, [Edit.module], "tests/test_toy.py", tmp_path / str(i)) for i in range(2)]
    edits = [Edit(f"return {i}") for i in (2, 3, 4, 5, 7)] + [Edit("return 1 +"), Edit("return 3", "narrow_integer")]
    lines = []
    results = {}
    run_all(benches, edits, lambda edit, *ends: results.update({edit: ends}), 8, lambda *line: lines.append(line))
    assert len(lines) == len(edits) + 4  # what a plain test killed is not run again
    ends = [[(outcome.test, outcome.error) for outcome in results[edit]] for edit in edits]
    assert ends == [
        [("test_plain", "AssertionError")] * 2,
        [("", ""), ("test_error_budget", "AssertionError")],
        [("", ""), ("test_layouts", "time limit")],
        [("", "")] * 2,
        [("test_plain", "SIGABRT")] * 2,
        [("collection", "CollectError")] * 2,
        [("", ""), ("test_overflow", "AssertionError")],
    ]
    assert (project / "planecycle_fast" / "toy.py").read_text() == TOY
    (project / "planecycle_fast" / "toy.py").write_text(TOY.replace("1", "2"))
    with pytest.raises(RuntimeError, match="the original fails test_plain: AssertionError"):
        bench = Bench(project, [Edit.module], "tests/test_toy.py", tmp_path / "2")
        run_all([bench], edits, results.update)
    assert {PLAIN, ALL} == set(mutants_table.STAGES)


def test_the_table_is_not_stale():
    rows = mutants_table.read_table()
    assert mutants_table.stale(rows) is None, "run `make mutants` and commit its tables"
    assert mutants_table.SUMMARY.read_text() == mutants_table.summary(rows)


@pytest.mark.parametrize("operation", mutants_table.operations())
def test_nearly_all_mutants_are_killed(operation):
    rows = [row for row in mutants_table.read_table() if row["operation"] == operation]
    killed = [row for row in rows if row["all checks"] == "killed"]
    assert len(rows) >= mutants_table.LEAST
    assert len({row["kind"] for row in rows}) >= 12
    assert len(killed) >= mutants_table.SHARE * len(rows)
    for row in rows:
        assert (row in killed) == bool(row["error"]) == bool(row["test"]), row
        assert (row in killed) != bool(row["why it is harmless"].strip()), f"explain this survivor: {row}"


def test_a_stale_table_is_noticed():
    edits = [row for operation in mutants_table.operations() for row, _ in mutants_table.edits(operation)]
    rows = [row | {"source": mutants_table.source_hash(row["module"], row["function"])} for row in edits]
    few, many = len(rows) // 10, len(rows) // 2
    assert mutants_table.stale(rows) is None
    assert mutants_table.stale(rows[few:]) is None
    assert mutants_table.stale(rows[many:]) == f"{many} of {len(rows)} mutants are due"
    older = [row | {"source": "another"} for row in rows[:many]]
    assert mutants_table.stale([*older, *rows[many:]]) == f"{many} of {len(rows)} mutants are due"
    changed = [rows[0] | {"after": "something else"}, *rows[1:]]
    assert mutants_table.stale(changed) == "1 mutants are gone"
    for operation in mutants_table.operations():
        mine = [row for row in edits if row["operation"] == operation]
        assert mutants_table.due(operation, rows) == [] and mutants_table.due(operation, older + rows[many:]) == [
            row for row in mine if row in edits[:many]
        ]


def test_every_operation_has_mutants():
    """By one stem: tests/specs/<stem>.py, ops/*/<stem>*_triton.py, tests/interpreted/test_<stem>.py."""
    assert mutants_table.operations() == sorted(spec.op.name for spec in SPECS)
    for operation in mutants_table.operations():
        assert f"{operation}_triton.py" in {Path(module).name for module in mutants_table.modules_of(operation)}
