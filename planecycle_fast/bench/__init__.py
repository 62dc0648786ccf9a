"""The suite that measures whole models: `planecycle-fast bench`, `make bench`, `make bench-cpu` and `make gpu` are its.

What is measured is a cell (`cells.py`): a model, a dtype, a volume, a step (inference, a linear probe, fine-tuning), a
mode of `lift` and a code that computes it: ours in each form, the reference, the authors', or a floor beneath them.
Cells of one model, dtype, volume and step are a group: same weights, and they take turns.

Start with `measure.py`: one group, made, compared, timed. It rests on

- `contenders.py`, `peers.py`, `networks.py`, `steps.py`: implementations, other networks, and what a call of one is;
- `floor.py`: products and attention alone; `expected.py`: what outputs must be; `costs.py`: FLOPs, memory, launches;
- `timing.py`: turns, clocks, comparison, ceilings, for any callables: the benchmarks of operations use it as well.

It returns rows (`rows.py`). `sweep.py` measures all groups within a time that `estimate.py` foresees, and keeps what an
earlier run has measured (`environment.py` says what that depends on). `report.py`, `plots.py` and `laws.py` show rows,
`bars.py` holds them to what they should be, `table.py` writes Markdown and units.

May import all packages but `scans`, `export` and `commands`; `commands` and `benchmarks/`, scripts alone, use it.
"""
