"""The part of `make gpu` that attention's table is corrected from, and the page that shows the table."""

import json
import re

import pytest
import torch

from benchmarks import attention_page, gpu_attention, gpu_parts
from benchmarks.budget import Part
from benchmarks.op_cells import INFERENCE, TRAINING
from planecycle_fast.bench.contenders import NotHereError
from planecycle_fast.runtime.attention_table import TABLE, ChosenAttention
from planecycle_fast.runtime.attentions import ATTENTIONS, why_not_attention

CELL = gpu_attention.AttentionCell(64, 21, torch.float32, INFERENCE)


def test_the_page_is_up_to_date():
    written = attention_page.PAGE.read_text(encoding="utf-8")
    assert written == attention_page.page(), "python -m benchmarks.attention_page"


def test_the_page_has_every_row_and_a_reason_of_one_of_two_kinds():
    lines = [line for line in attention_page.page().splitlines() if re.search(r"\| (measured on an H100|static)", line)]
    assert len(lines) == len(TABLE)
    for row in TABLE:
        assert row.attention in ATTENTIONS and row.why.startswith(("measured on an H100, ms: at ", "static: "))


def test_what_is_measured():
    cells = list(gpu_attention.cells())
    assert [cell.rows for cell in cells[:3]] == [*gpu_attention.BARS]  # first
    assert {cell.rows for cell in cells} == {21, 69, 133, 261, 517, 1029, 4101}
    assert {(cell.head_dim, cell.dtype, cell.step) for cell in cells} == {
        (hd, dtype, step) for hd in (64, 128) for dtype in gpu_attention.ELEMENTS for step in (INFERENCE, TRAINING)
    }
    for rows, (height, width) in gpu_attention.GRIDS.items():
        assert rows == gpu_attention.GLOBALS + height * width
    assert "attention" in gpu_parts.RUN


@pytest.fixture
def on_cpu(monkeypatch):
    """The part on this machine: what runs everywhere stands for what needs a GPU."""
    monkeypatch.setattr(gpu_attention, "ARCHITECTURES", {"sdpa": (), "reference": (), "triton": ()})
    monkeypatch.setattr(gpu_attention, "ELEMENTS", {torch.float32: 2**13, torch.bfloat16: 2**13})
    monkeypatch.setattr(gpu_attention, "choose_attention", lambda *_: ChosenAttention("sdpa", ""))
    times = iter([2.0, 1.0] * 40)
    monkeypatch.setattr(gpu_attention, "time_of", lambda attend, packed, step: next(times))


@pytest.mark.parametrize("step", [INFERENCE, TRAINING])
def test_contenders_are_compared_and_what_is_not_here_says_why(on_cpu, step):
    row = gpu_attention.measure(CELL._replace(step=step), "cpu")
    assert row["ms"] == {"sdpa": 2.0, "reference": 1.0} and row["refused"] == {}
    assert row["missing"] == {"triton": why_not_attention("triton")}
    assert (row["rows"], row["any"], row["repeat"]) == (21, "sdpa", "sdpa")


def test_what_computes_something_else_is_refused(on_cpu, monkeypatch):
    wrong = lambda name, q, k, v, scale: q if name == "sdpa" else gpu_attention.attention_ref(q, k, v)  # noqa: E731
    monkeypatch.setattr(gpu_attention, "attention_on", wrong)
    row = gpu_attention.measure(CELL, "cpu")
    assert set(row["ms"]) == {"reference"} and "outputs" in row["refused"]["sdpa"]


def test_training_has_the_gradient_of_the_packed_tensor(on_cpu):
    packed = torch.randn(2, 21, 18, 64, requires_grad=True)
    angles = gpu_attention.Axial(gpu_attention.Rope(gpu_attention.make_periods(16, base=100.0)), (4, 4))
    attend = gpu_attention.contender("sdpa", CELL._replace(step=TRAINING), angles)
    (gradient,) = torch.autograd.grad(attend(packed).sum(), packed)
    assert gradient.shape == packed.shape and gradient.abs().sum() > 0


@pytest.mark.parametrize("step, backward", [(INFERENCE, False), (TRAINING, True)])
def test_what_is_compiled_ahead(monkeypatch, step, backward):
    seen = []

    def contender(name, cell, angles):
        def attend(qkv):
            qkv.requires_grad and qkv.register_hook(lambda gradient: seen.append("backward"))
            seen.append((name, tuple(qkv.shape)))
            return qkv[:, :, :6] * 1

        return attend

    monkeypatch.setattr(gpu_attention, "contender", contender)
    gpu_attention.compile_only(CELL._replace(step=step), "cpu")
    shape = (gpu_attention.CHECKED, 21, 18, 64)
    assert ("backward" in seen) == backward and {("triton", shape), ("sdpa", shape)} <= set(seen)


def row(rows=261, step=INFERENCE, chosen=("flash", "cudnn"), **ms):
    return {"head_dim": 64, "heads": 6, "rows": rows, "sequences": 9, "dtype": "bfloat16", "step": step, "ms": ms,
            "missing": {}, "refused": {}, "any": chosen[0], "repeat": chosen[1]}  # fmt: skip


def test_where_another_choice_is_faster():
    found = list(gpu_attention.corrections(row(flash=1.0, cudnn=0.5, efficient=0.8)))
    assert found == ["- 261 rows, head dimension 64, bfloat16, inference, sizes: any: flash is chosen, efficient takes "
                     "1/1.25 of its time"]  # fmt: skip
    assert list(gpu_attention.corrections(row(flash=1.0, cudnn=0.99))) == []


def test_bars_of_attention():
    line = gpu_attention.bar_line(row(triton=0.5, flash=0.9, cudnn=0.8))
    assert line == "- 261 rows, head dimension 64, bfloat16, inference: cudnn / triton: 1.60, met (bar 1.4)"
    assert "0.50, **missed** (bar 2.0)" in gpu_attention.bar_line(row(rows=21, triton=1.0, flash=0.5))
    assert gpu_attention.bar_line(row(flash=1.0)).endswith("not measured (bar 1.4)")
    assert gpu_attention.bar_line(row(rows=69)) is gpu_attention.bar_line(row(step=TRAINING)) is None


def test_rows_are_written_as_they_come(on_cpu, monkeypatch, tmp_path):
    cells = [CELL, CELL._replace(rows=261)]
    monkeypatch.setattr(gpu_attention, "cells", lambda: iter(cells))
    assert gpu_attention.run(tmp_path / "attention.md", "Some GPU\n", Part("attention", 100), "cpu") == 0
    about, *rows = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert about == {"about": "Some GPU", "left_out": []} and [each["rows"] for each in rows] == [21, 261]
    text = (tmp_path / "attention.md").read_text()
    assert (
        text.startswith("Some GPU")
        and "| 21 rows, head dimension 64, float32, inference | sdpa | sdpa | 2.000 |" in text
    )
    assert "sdpa is chosen, reference takes 1/2.00 of its time" in text and "- triton: no CUDA device was found" in text


def test_our_kernels_that_raise_fail_the_part(on_cpu, monkeypatch, tmp_path):
    def contender(name, *_):
        raise RuntimeError("out of resources") if name == "triton" else NotHereError("not here")

    monkeypatch.setattr(gpu_attention, "contender", contender)
    monkeypatch.setattr(gpu_attention, "cells", lambda: iter([CELL]))
    assert gpu_attention.run(tmp_path / "attention.md", "Some GPU\n", Part("attention", 100), "cpu") == 1
    assert "- triton: RuntimeError: out of resources" in (tmp_path / "attention.md").read_text()
