"""The benchmark suite: what `planecycle-fast bench` and `benchmarks/` measure, how, and what they make of it.

May import `cost`, `lifting`, `weights` and what is below them; the commands `bench`, `plan` and `verify`, and the
scripts in benchmarks/, use it.

Start with `timing.py`: everything is synchronised, in turns, on inputs that change, and outputs are compared before.

| | |
| --- | --- |
| `cells.py`, `contenders.py`, `networks.py`, `peers.py`, `steps.py` | what is measured, and of whom |
| `measure.py`, `expected.py`, `costs.py` | one group of cells: compared, memory, FLOPs, times |
| `sweep.py`, `rows.py`, `estimate.py`, `environment.py` | all groups; earlier runs; how long it takes |
| `report.py`, `plots.py`, `laws.py` | what is made of it |
"""
