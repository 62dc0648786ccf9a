"""Counting before running: what a pass over a volume will compute, move and keep in memory.

May import `lifted`, `weights` and what is below them. Scans ask it for windows that fit, `bench` and the command
`plan` for times; tests hold operations against its ledger.

Start with `planning.plan`: the model's own code on tensors without data, watched by a `Meter`.

| | |
| --- | --- |
| `planning.py` | what a pass costs |
| `modes.py` | each mode's time on a machine, and the deepest volume that fits |
| `meter.py`, `traffic.py` | FLOPs, living bytes; bytes read and written, copies and launches |
| `workspaces.py` | what operations take beside their outputs, which no watcher sees |
| `gpus.py` | what devices can do at most, and what a host takes |
"""
