"""The Triton kernels of patchify pass everything."""

import pytest
import torch

from ..kernelcheck.harness import op_tests
from ..kernelcheck.layouts import contiguous, offset
from ..kernelcheck.observers import Observer, observing
from ..specs.patchify import SPEC, case

TestPatchify = op_tests(SPEC, examples=14)


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
