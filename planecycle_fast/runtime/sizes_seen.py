"""Whether volumes of a size have come before in this process: what takes a second for a new size pays from then on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .tracing import recorder, transforms_active

MOST = 64  # sizes that are known: where there are more, they do not repeat

_seen: dict[tuple[int, ...], None] = {}


def seen_before(sizes: Sequence[int]) -> bool:
    """Whether a pass over a volume of these sizes has begun before; from now on it has.

    Never where the answer could be another one when the same pass is computed again: within backward, and where
    somebody decides what is kept for it, as activation checkpointing around a whole model does. (Around blocks it asks
    nothing: their pass has begun outside.) Nor in torch.compile, records and transforms, which outlive what they ask.
    """
    if torch.compiler.is_compiling() or recorder() is not None or transforms_active():
        return False
    computed_again = torch._C._current_graph_task_id() != -1  # backward is running
    if computed_again or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    key = tuple(sizes)
    if not all([type(size) is int for size in key]):  # symbols
        return False
    if key in _seen:
        return True
    if len(_seen) < MOST:
        _seen[key] = None
    return False
