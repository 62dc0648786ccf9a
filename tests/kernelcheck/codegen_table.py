"""``make codegen``: compiles every kernel in every configuration for every GPU, and writes the committed table.

Kernels that have not changed since keep their rows, unless ``--again`` is given.
Also which of that a test run compiles (`pairwise`), and whether the table is still true (`stale`).
"""

import csv
import functools
import hashlib
import io
import itertools
import sys
import tokenize
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from .codegen import CodegenError, check_binary, compile_variant
from .launches import launches_of
from .layouts import contiguous, stepped

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "codegen.csv"
COLUMNS = [
    "kernel", "configuration", "architecture", "registers", "shared", "instructions", "loads", "stores",
    "tensor_cores", "triton", "source",
]  # fmt: skip
LAYOUTS = [contiguous, stepped]  # both ways channels can lie


def all_factors(spec):
    """Everything that a compiled kernel may depend on: names and their values."""
    calls = max([len(launches_of(spec, case, spec.dtypes[0])) for case in (spec.small[0], *spec.plain)])
    fixed = {"dtype": spec.dtypes, "layout": LAYOUTS, "call": range(calls), "arch": spec.architectures}
    fixed["aligned"] = [True, False] if spec.any_alignment else [True]
    return spec.factors | fixed


def build(spec, arch, aligned, **choice):
    """The (name, variant, whether its accesses must be wide) of one choice of every factor."""
    factors = tuple((name, choice[name]) for name in spec.factors)
    launches = _launches(spec.op.name, factors, choice["dtype"], choice["layout"])
    launch = launches[choice["call"] % len(launches)]  # some cases have fewer than others
    variant = launch.variant(aligned, arch)
    return variant.name, variant, aligned and choice["layout"] is contiguous and spec.wide(choice)


@functools.cache
def _launches(name, factors, dtype, layout):
    from ..specs import SPECS

    [spec] = [spec for spec in SPECS if spec.op.name == name]
    return launches_of(spec, spec.factors_case(**dict(factors)), dtype, layout)


def pairwise(factors):
    """A few choices of all factors, so that every pair of values of two factors is in one of them."""
    choices = [dict(zip(factors, values)) for values in itertools.product(*factors.values())]
    pairs = [set(itertools.combinations(choice.items(), 2)) for choice in choices]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(choices)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(choices[best])
    return chosen


def every_build(spec):
    """All different builds of an operation: {(name, arch): (variant, whether its accesses must be wide)}."""
    factors, builds = all_factors(spec), {}
    for values in itertools.product(*factors.values()):
        choice = dict(zip(factors, values))
        name, variant, wide = build(spec, **choice)
        before = builds.get((name, choice["arch"]), (None, False))
        builds[name, choice["arch"]] = variant, wide or before[1]
    return builds


def source_hash(kernel):
    """Of everything that a kernel compiles, in whatever module, comments left out."""
    return hashlib.sha256("".join(_code(f.src) for f in reached(kernel)).encode()).hexdigest()[:16]


def reached(kernel):
    """The kernel and all functions it calls, by name, directly or not."""
    found = [kernel]
    for function in found:
        called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        found += [f for f in dict.fromkeys(called) if isinstance(f, triton.JITFunction) and f not in found]
    return found


def _code(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL))


def _row(job):
    spec_index, name, arch = job
    from ..specs import SPECS

    spec = SPECS[spec_index]
    variant, wide = every_build_of(spec_index)[name, arch]
    binary = compile_variant(variant, arch)
    try:
        check_binary(binary, arch, wide, spec.exempt, tensor_cores=spec.tensor_cores)
    except CodegenError as error:
        return f"{name} on sm_{arch}: {error}"
    kernel, configuration = name.split(": ")
    return [
        kernel, configuration, f"sm_{arch}", binary.registers, binary.shared, binary.instructions,
        binary.text("load"), binary.text("store"), binary.tensor_cores, triton.__version__,
        source_hash(variant.kernel),
    ]  # fmt: skip


_builds = {}


def every_build_of(spec_index):
    """`every_build` of `SPECS[spec_index]`, once per process."""
    from ..specs import SPECS

    if spec_index not in _builds:
        _builds[spec_index] = every_build(SPECS[spec_index])
    return _builds[spec_index]


def read_table():
    """Rows of the committed table, as dictionaries."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def stale(spec, rows, builds):
    """Why the table is not that of these `builds` (of `every_build`), or None if it is."""
    kernels = {variant.kernel.__name__: source_hash(variant.kernel) for variant, _ in builds.values()}
    rows = [row for row in rows if row["kernel"] in kernels]
    listed = {(f"{row['kernel']}: {row['configuration']}", int(row["architecture"][3:])) for row in rows}
    if listed != set(builds):
        return f"{len(set(builds) - listed)} builds of {spec.op.name} are missing, {len(listed - set(builds))} are gone"
    for row in rows:
        if row["source"] != kernels[row["kernel"]]:
            return f"the source of {row['kernel']} has changed"
    return None


def _known():
    """Rows of the committed table whose kernel and triton are the same now, by job."""
    from ..specs import SPECS

    rows = {(f"{row['kernel']}: {row['configuration']}", int(row["architecture"][3:])): row for row in read_table()}
    known = {}
    for i in range(len(SPECS)):
        for (name, arch), (variant, _) in every_build_of(i).items():
            row = rows.get((name, arch))
            if row and (row["source"], row["triton"]) == (source_hash(variant.kernel), triton.__version__):
                known[i, name, arch] = list(row.values())
    return known


def main():
    from ..specs import SPECS

    jobs = [(i, name, arch) for i in range(len(SPECS)) for name, arch in every_build_of(i)]
    known = {} if "--again" in sys.argv else _known()
    rows = [known[job] for job in jobs if job in known]
    jobs = [job for job in jobs if job not in known]
    print(f"{len(jobs)} builds, and {len(rows)} of kernels that have not changed")
    with ProcessPoolExecutor() as pool:
        rows += pool.map(_row, jobs, chunksize=8)
    errors = [row for row in rows if isinstance(row, str)]
    rows = [row for row in rows if not isinstance(row, str)]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(rows))
    if errors:  # their builds are missing in the table, which a test notices
        sys.exit("\n".join(errors))
    print(f"wrote {TABLE.relative_to(Path.cwd())}: {len(rows)} builds, none spills")


if __name__ == "__main__":
    main()
