"""One pass of blocks on the residual stream: what a lifted model is made of, and what runs when it is called.

May import `inputs`, `hosts`, `ops` and what is below them; `lifted.LiftedModel` puts it together, `authors` runs the
authors' models by it.

Start with `stream.py`: the stream between two blocks, and `Layer`, what a block needs to know besides it. Then
`block.py`, how a block runs, part by part or as a whole, and `branches.py`, its attention and its MLP; `passes.py` runs
consecutive blocks.

| | |
| --- | --- |
| `lifted_block.py`, `shared_module.py`, `module_tree.py`, `framework_class.py` | modules that stand for the host's |
| `embedding.py` | slices become tokens: by the host's convolution, or by one matrix product |
| `prepared_block.py`, `block_functions.py` | blocks that repeat what they did the last time, and their gradients |
| `cpu_groups.py` | inference on a CPU, a few sequences at a time |
| `cuda_graphs.py`, `graph_store.py` | a pass captured for one shape, with gradients; several of a model, and when |
| `cuda_recorder.py`, `snapshot.py` | what capture needs of CUDA; whether a model still is what was captured |
| `depth_position.py` | `lift(depth_position=...)` |
| `attention_maps.py`, `taps.py`, `report.py`, `finite.py` | looking into a pass |
"""
