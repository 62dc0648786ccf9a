"""The benchmark suite on a GPU: contenders agree there, and a graph is few launches."""

import pytest
import torch

from planecycle_fast.bench.cells import FAST, GRAPH, MODES, REFERENCE
from planecycle_fast.bench.measure import Group

from ..bench.small_bench import EFFORT, VOLUME, cell, small  # noqa: F401

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
]  # fmt: skip


@pytest.mark.parametrize("step", ["inference", "finetune"])
def test_a_group(small, step):  # noqa: F811
    pytest.importorskip("timm")
    device = torch.device("cuda")
    codes = (FAST, REFERENCE, GRAPH)
    cells = [cell(mode, code, step=step)._replace(dtype="bf16") for mode in MODES for code in codes]
    results = Group(cells, device, small("ViT-S", device, torch.bfloat16)).measure(EFFORT)
    for of, result in results.items():
        assert result["status"] == "measured", (of, result["reason"])
        assert result["compared_at"] == VOLUME and 0 < result["p20"] <= result["seconds"] <= result["p80"]
        assert result["peak_bytes"] > 0 and result["launches"] > 0
    eager, graph = (results[cell(code=code, step=step)._replace(dtype="bf16")] for code in (FAST, GRAPH))
    assert graph["launches"] < eager["launches"] / 4
