"""The benchmark of RoPE in the epilogue of qkv, and the machine code of its candidate, without a GPU."""

import pytest
import torch

from benchmarks import gpu_rope_epilogue as bench
from benchmarks.budget import Part


@pytest.fixture
def on_cpu(monkeypatch):
    """The part on this machine: a linear layer and rope stand for the candidate."""
    monkeypatch.setattr(bench, "GRIDS", {21: (4, 4)})
    monkeypatch.setattr(bench, "cells", lambda: iter([bench.RopeCell(384, 21, torch.float32, 4)]))
    monkeypatch.setattr(bench, "epilogue", stand_in)
    times = iter([4.0, 1.0] + [3.5, 1.5] * len(bench.VARIANTS))
    monkeypatch.setattr(bench, "time_of", lambda call, x, step: next(times))


def stand_in(x, layer, tables, columns):
    linear = torch.nn.functional.linear(x, layer.weight, layer.bias).unflatten(2, (3 * layer.heads, -1))
    return bench.rope_ref(linear, tables, bench.GLOBALS, 2 * layer.heads)


def test_what_is_measured():
    assert [(cell.channels, cell.rows) for cell in bench.cells()] == [
        (channels, rows) for channels in (384, 768, 1024) for rows in (1029, 581)
    ]
    for rows, (height, width) in bench.GRIDS.items():
        assert rows == bench.GLOBALS + height * width


def test_it_says_which_is_faster(on_cpu, tmp_path, capsys):
    assert bench.run(tmp_path / "rope_epilogue.md", "Some GPU\n", Part("rope_epilogue", 100), "cpu") == 0
    line = "- 21 rows, C = 384: in the epilogue, 1.14 times as fast; product in the epilogue: 1.50 times a linear layer"
    assert line in capsys.readouterr().out
    text = (tmp_path / "rope_epilogue.md").read_text()
    assert text.startswith("Some GPU") and line in text and "| 21 rows, C = 384 | 4.000 | 1.000 | 3.500 |" in text


def test_what_computes_something_else_or_raises_fails(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "epilogue", lambda x, layer, tables, columns: stand_in(x, layer, tables, 0).flip(1))
    assert bench.run(tmp_path / "rope_epilogue.md", "Some GPU\n", Part("rope_epilogue", 100), "cpu") == 1
    text = (tmp_path / "rope_epilogue.md").read_text()
    assert "- in the epilogue: its outputs are off" in text and "C = 384: not compared" in text


def test_without_such_a_gpu_it_says_why(on_cpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(bench, "GRIDS", {21: (4, 4)})
    monkeypatch.setattr(bench, "time_of", lambda *_: 1.0)
    row = bench.measure(bench.RopeCell(384, 21, torch.float32, 4), "cpu")
    assert set(row["ms"]) == {bench.ENGINE, bench.LINEAR} and row["refused"] == {}
    assert set(row["missing"].values()) == {"it is made for compute capability 9.x"}


@pytest.mark.parametrize(
    "channels, heads, dense",
    [(768, 12, False), *[pytest.param(*case, marks=pytest.mark.full) for case in
     ((384, 6, False), (384, 6, True), (768, 12, True), (1024, 8, False), (1024, 32, False))]],
)  # fmt: skip
def test_machine_code(channels, heads, dense):
    triton = pytest.importorskip("triton", reason="needs triton, to compile kernels")
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are not compiled under TRITON_INTERPRET=1")
    from triton.backends.compiler import GPUTarget

    from benchmarks.rope_epilogue_triton import linear_rope
    from planecycle_fast.ops import Tables

    from ..kernelcheck.codegen import check_binary, compile_variant
    from ..kernelcheck.launches import OPTIONS, recorded_launches

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    half = channels // heads // 2
    shapes = [(1024, half)] if dense else [(32, half // 2)] * 2
    tables = Tables(*[tuple([empty(*shape, dtype=torch.float32) for shape in shapes]) for _ in range(2)])
    with recorded_launches(linear_rope) as launches:
        x, weight, bias = empty(8, 1029, channels), empty(3 * channels, channels), empty(3 * channels)
        linear_rope(x, weight, bias, tables, 5, heads)
    variant = launches[0].variant(True, 90)
    binary = compile_variant(variant, 90)
    check_binary(binary, 90, tensor_cores=True)  # nothing is spilled
    options = {name: getattr(variant.options, name) for name in OPTIONS}
    compiled = triton.compile(variant.source(), target=GPUTarget("cuda", 90, 32), options=options)  # kept on disk
    assert "wgmma.mma_async" in compiled.asm["ptx"] and "mma.sync" not in compiled.asm["ptx"]
