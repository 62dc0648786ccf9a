"""The Triton kernels of patchify pass everything."""

import pytest
import torch

from planecycle_fast.ops.patch_embedding import patchify_triton

from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import contiguous, offset
from ..kernelcheck.observers import Observer, observing
from ..specs.patchify import SPEC, case

TestPatchify = op_tests(SPEC, examples=14)


def test_kernels_are_not_wrapped_in_the_interpreter(monkeypatch):
    """Where torch cannot: `registration` says why."""

    def refuse(kernel):
        raise AssertionError(f"{kernel} was wrapped")

    monkeypatch.setattr(patchify_triton, "wrap_triton", refuse)
    tensors = SPEC.typical.make(torch.float32)
    for op, call in SPEC.op_arguments(tensors, SPEC.typical.settings):
        op.body(*call)


class Seen(Observer):
    """The constants of every launch."""

    def __init__(self):
        self.constants = []

    def launched(self, launch):
        self.constants.append(launch.values)


@pytest.mark.parametrize("layout, patch, unit, elements", [(contiguous, 8, 4, 2048), (offset, 9, 1, 512)])
def test_tiles_are_small_where_each_element_has_an_address(layout, patch, unit, elements):
    volume = layout(case((1, 2, 2 * patch, 3 * patch), (patch, patch)).make(torch.float32)["volume"])
    seen = Seen()
    with observing(seen):
        for op, call in SPEC.op_arguments({"volume": volume}, dict(patch=(patch, patch), num_globals=0, dtype=None)):
            op.body(*call)
    there, back = seen.constants
    assert there["UNIT"] == back["UNIT"] == unit
    assert there["BLOCK_R"] * there["BLOCK_K"] == back["BLOCK_Y"] * back["BLOCK_X"] == elements
    assert back["BLOCK_Y"] == (8 if patch == 8 else 16)
