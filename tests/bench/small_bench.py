"""What tests of the benchmark suite share: a small network in place of ViT-S, small ceilings, and made-up rows."""

from functools import partial

import pytest

from planecycle_fast.bench import contenders, costs, estimate, measure, timing
from planecycle_fast.bench.cells import Cell

EFFORT = measure.Effort("test", rounds=3, warmups=0, seconds=60)
VOLUME = "1x4x64"
HERE = {"device": "A CPU", "kind": "cpu", "threads": 2, "planecycle-fast version": "0.1", "torch version": "2.13",
        "triton version": "3.7", "python version": "3.11"}  # fmt: skip
STAMP = {"command": "planecycle-fast bench --quick", "commit": "abc1234", "date": "2026-11-25 05:00 UTC"}


@pytest.fixture
def small(monkeypatch):
    """ViT-S is two blocks of 128 channels, and nothing large is multiplied."""
    made = partial(contenders.vit, depth=2, embed_dim=128, num_heads=2)
    for module in (measure, costs, estimate):
        monkeypatch.setattr(module, "vit", made)
    monkeypatch.setattr(timing, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(timing, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(measure, "_plans", {})
    costs.flops.cache_clear()
    yield made
    costs.flops.cache_clear()


def cell(mode="PCg", code="fast", volume=VOLUME, step="inference", model="ViT-S"):
    return Cell(model, "fp32", volume, step, mode, code)


def row(of, seconds=1.0, group="g", status="measured", reason="", **more):
    """A row as a sweep writes it, with figures that are easily recognised."""
    found = {"cell": of._asdict(), "status": status, "reason": reason, "effort": "quick", "group": group,
             "environment": HERE, "stamp": STAMP, "ceiling_flops": 2e11, "ceiling_bandwidth": 2e10}  # fmt: skip
    if status == "measured":
        found |= {"seconds": seconds, "p20": 0.9 * seconds, "p80": 1.1 * seconds, "rounds": 5, "error": 1e-7,
                  "compared_at": of.volume, "peak_bytes": 100 * 2**20, "planned_bytes": 95 * 2**20,
                  "weight_bytes": 2**26, "flops": 10**11, "attention_flops": 10**10, "planned_flops": 10**11,
                  "launches": 1234, "moved_bytes": 5 * 10**9}  # fmt: skip
    return found | more
