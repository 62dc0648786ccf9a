"""Which implementation runs here, and building it; nothing of it knows a model, or what an operation computes.

May import nothing else of this package. `ops` asks it for a backend, commands for reasons why one is not usable.

Start with `backends.pick`: what "auto" becomes. Whatever cannot run has a reason in words, which errors, the log and
`planecycle-fast info` show; what was asked for by name never falls back.

| | |
| --- | --- |
| `backends.py`, `attentions.py` | which backend, which attention, and why not another |
| `attention_table.py`, `attention_times.py` | what attention "auto" is on a GPU, and the measurements that it goes by |
| `sizes_seen.py` | whether volumes of a size have come before |
| `tracing.py` | who records or transforms operations now, and so which of them may not be fast, or write in place |
| `recording.py` | whether a CUDA graph is being recorded, and what a pass draws on the host |
| `compiling.py` | csrc into one library; read by setup.py too, by itself |
| `native.py` | that library: found, built on first use, trusted or not, loaded |
| `repeats.py` | loops over groups that are all alike, of which a plan runs the first round |
| `torchvision_fix.py` | a torchvision of another build |
"""
