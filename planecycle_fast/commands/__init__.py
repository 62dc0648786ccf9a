"""The command line: one file per verb, of which each says what it prints, and raises ValueError in one line.

The highest floor: it may import everything, and nothing but `__main__` imports it. What a verb needs beyond the package
is imported when it runs, so that `planecycle-fast --help` is quick; typer and rich are optional. `options.py` has the
options that several of them take.

Start with `cli.py`, which collects the verbs, and where errors become one line on stderr. `features.py` runs over many
scans, and goes on after one that is refused. `demo.py`, `plan.py`, `verify.py` and `info.py` do what they say; what
`series`, `bench`, `export` and `build` ask for is done in `scans`, `bench`, `export` and `runtime.native`.
"""
