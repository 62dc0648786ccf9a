"""The parts of the GPU benchmarks that need no GPU: who is compared, that the same comes out, what is written."""

import pytest
import torch

pytest.importorskip("timm", reason="needs timm, whose models it runs")

from benchmarks import gpu_models as bench

from . import peers


def test_contenders_give_patches_of_a_volume():
    found = bench.contenders(bench.backbone(128, 2, depth=4))
    for name, model in found.items():
        out = model(torch.randn(2, 3, 3, 32, 48))
        assert out.numel() == 2 * 3 * 2 * 3 * 128 and out.isfinite().all(), name
        assert bench.training(model, torch.randn(1, 3, 3, 32, 48)) is None
        assert all(p.grad is None for p in model.parameters())


@peers.needs_planecycle
def test_the_authors_code_is_compared_before_it_is_timed():
    found = bench.contenders(bench.backbone(128, 2, depth=4))
    bench.check(found, "cpu")
    with torch.no_grad():
        next(p for name, p in found[bench.OURS].named_parameters() if "qkv.weight" in name)[0, 0] += 1
    with pytest.raises(RuntimeError, match="differ by .* nothing is timed"):
        bench.check(found, "cpu")


def test_bars_are_of_what_is_timed():
    assert {shape for _, shape in bench.BARS} == set(bench.VOLUMES)
    assert {label for label, _ in bench.BARS} == set(bench.SIZES)


def test_the_table_says_what_is_missed_and_what_was_not_measured():
    large = bench.VOLUMES[2]
    rows = [("ViT-S", large, "inference", bench.OURS, 2.0, 1e6), ("ViT-S", large, "inference", bench.EAGER, 3.0, 2e6)]
    text = bench.table(rows)
    assert "| ViT-S | 8x3x32x512x512 | inference | PlaneCycle, PCg | 2.00 | 4000.0 | 1 | 1.50 |" in text
    assert "time of authors' code / PlaneCycle, PCg: **1.50**, bar 2.00" in text
    assert "time of slice2d / PlaneCycle, PCg: not measured, bar 0.97" in text
