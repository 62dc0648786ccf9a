"""The parts of the GPU benchmarks that need no GPU: who is compared, what is refused, what is written."""

import json
import os
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("timm", reason="needs timm, whose models it runs")


import planecycle_fast as pcf
from benchmarks import cpu, gpu_kernels, gpu_models, gpu_parts, gpu_smoke, gpu_warm, op_cells, op_measure
from benchmarks.budget import Part
from benchmarks.gpu_models import COMPILED, EAGER, GRAPH, GROUPS, OURS, PCM, REFERENCE, SLICES
from planecycle_fast.bench import contenders, costs, floor, measure
from planecycle_fast.bench.bars import BEST, Bar, bar_lines
from planecycle_fast.bench.cells import FLOOR, PRODUCTS, parse_volume
from planecycle_fast.bench.measure import Hosts, measure_group
from planecycle_fast.bench.report import times_table
from planecycle_fast.bench.timing import summary
from planecycle_fast.ops import tiles as configs
from planecycle_fast.optional import MissingPackageError

from .. import peers
from .test_make_gpu import clock  # noqa: F401

CPU = torch.device("cpu")


def on_cpu(group, names=None):
    """A group as it is measured on a GPU, but small."""
    cells = [cell._replace(dtype="fp32", volume="1x3x32") for cell in group.cells if names is None or cell[4:] in names]
    return group._replace(cells=cells)


INFERENCE, TRAINING = (on_cpu(GROUPS[i]) for i in (0, 2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measure, "vit", partial(contenders.vit, depth=3, embed_dim=128, num_heads=2))


def measured(group):
    rows = measure_group(group.cells, Hosts(CPU), gpu_models.EFFORT)
    return {(row["cell"]["mode"], row["cell"]["code"]): row for row in rows}


@pytest.mark.parametrize("group", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_contenders_are_compared_and_timed(small, group):
    rows, products = measured(group), ("PCg", PRODUCTS)
    assert list(rows) == [cell[4:] for cell in group.cells]
    for name in {OURS, SLICES, PCM, REFERENCE, products} & set(rows):
        assert rows[name]["seconds"] > 0 and rows[name]["reason"] == "", name
        assert name == products or (rows[name]["error"] < 1e-4 and rows[name]["peak_bytes"] > 0)
    if "PLANECYCLE_REPO" not in os.environ:
        assert rows[EAGER]["status"] == "not here" and rows[EAGER]["reason"].startswith("needs PLANECYCLE_REPO")
    assert GRAPH not in rows or rows[GRAPH]["reason"] == "CUDA graphs need a CUDA device"
    assert "flash_attn_interface is not installed" in rows["PCg", "products + FlashAttention 3"]["reason"]


@peers.needs_planecycle
@pytest.mark.parametrize("group", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_the_authors_code_is_compared_and_timed(small, group):
    row = measured(on_cpu(group, (OURS, EAGER)))[EAGER]
    assert row["seconds"] > 0 and row["error"] < 1e-4


def test_what_computes_something_else_is_refused(small, monkeypatch, tmp_path):
    original = measure.network

    def network(cell, host, volume):
        made = original(cell, host, volume)
        return made._replace(run=lambda x: tuple([2 * t for t in made.run(x)])) if cell.mode == "PCm" else made

    monkeypatch.setattr(measure, "network", network)
    group, path = on_cpu(INFERENCE, (OURS, PCM)), tmp_path / "models.md"
    assert gpu_models.run(path, "about", Part("models", 100), [group], "cpu") == 1
    text = path.read_text()
    assert "| PCm | planecycle_fast | refused: outputs differ |" in text
    assert "- **refused: outputs differ**: its outputs are off by" in text
    assert "| PCg | planecycle_fast | " in text and "1.00 |" in text


def test_what_raises_or_does_not_fit_is_a_row_and_the_others_are_timed(small, monkeypatch):
    original = measure.network

    def network(cell, host, volume):
        if (cell.mode, cell.code) == SLICES:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(cell, host, volume)

    monkeypatch.setattr(measure, "network", network)
    rows = measured(on_cpu(TRAINING, (OURS, SLICES, REFERENCE)))
    assert rows[SLICES]["status"] == "out of memory" and "seconds" not in rows[SLICES]
    assert "seconds" in rows[OURS] and "seconds" in rows[REFERENCE]


@pytest.mark.parametrize(
    ("error", "why", "status"),
    [(MissingPackageError("package 'timm' is not installed"), "not here", 0),
     (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 1)],
)  # fmt: skip
def test_a_model_that_cannot_be_made_is_a_row(monkeypatch, tmp_path, error, why, status):
    def vit(*_):
        raise error

    monkeypatch.setattr(measure, "vit", vit)
    path = tmp_path / "models.md"
    assert gpu_models.run(path, "about", Part("models", 100), [INFERENCE, TRAINING], "cpu") == status
    assert path.read_text().count(f"| {why} |") == len(INFERENCE.cells) + len(TRAINING.cells)


def test_a_contender_that_stops_within_its_turns_leaves_the_others(small, monkeypatch):
    calls = []

    def step_of(step, network):
        def stops(volume):
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("no more")

        return stops

    monkeypatch.setattr(measure, "step_of", step_of)
    rows = measured(on_cpu(INFERENCE, (OURS, ("PCg", PRODUCTS))))
    assert (rows[OURS]["status"], rows[OURS]["reason"]) == ("failed", "RuntimeError: no more")
    assert rows["PCg", PRODUCTS]["rounds"] == gpu_models.EFFORT.rounds and "seconds" not in rows[OURS]


class Attentions(TorchFunctionMode):
    """The shapes of what attends."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_floors_make_the_products_and_the_attention_of_the_model():
    """FLOPs of products by torch's counter, which does not know a CPU's attention; of that the shapes."""
    host = contenders.vit("ViT-S", "cpu", torch.float32, depth=4, embed_dim=128, num_heads=2)
    size = parse_volume("2x3x32x48")
    volume, made = torch.randn(size.shape), floor.Floor(host, size, training=False)
    with torch.no_grad(), Attentions() as expected:
        products = costs.count(pcf.lift(host, backend="reference"), volume).total
    with Attentions() as found:
        assert costs.count(made.make(PRODUCTS), volume).total == products and found.shapes == []
        assert costs.count(made.make("products + flash"), volume).total == products
    assert len(found.shapes) == 4 and sorted(found.shapes) == sorted(expected.shapes)
    trained = floor.Floor(host, size, training=True).make(PRODUCTS)
    of_patches = 2 * size.batch * size.patches * 3 * 16 * 16 * 128
    assert costs.count(trained, volume).total == 3 * products - of_patches  # pixels need no gradient


def test_patches_are_those_that_the_convolution_takes():
    volume, conv = torch.randn(2, 3, 2, 32, 48), torch.nn.Conv2d(3, 8, 16, 16)
    expected = conv(volume.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2).flatten(0, 1)
    got = torch.nn.functional.linear(floor.patches(volume), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def row(turns, group, name, seconds=None, peak=None, status="measured"):
    cell = dict(zip(("model", "dtype", "volume", "step", "mode", "code"), (*group, *name)))
    found = {"cell": cell, "group": turns, "status": status, "reason": ""}
    found |= {} if seconds is None else {"seconds": seconds, "p20": seconds, "p80": seconds, "rounds": 7}
    return found if peak is None else found | {"peak_bytes": peak}


def test_the_table_says_what_is_met_missed_and_not_measured():
    eager, compiled, trained = (group.cells[0].group for group in GROUPS[:3])
    flash, cudnn = [("PCg", f"products + {name}") for name in ("flash", "cuDNN")]
    rows = [row("1", eager, OURS, 0.050, 2**20), row("1", eager, EAGER, 0.140), row("1", eager, flash, 0.045),
            row("1", eager, cudnn, 0.043), row("1", eager, GRAPH, status="out of memory"),
            row("2", compiled, OURS, 0.052), row("2", compiled, COMPILED, 0.071),
            row("3", trained, OURS, 0.2, 50), row("3", trained, EAGER, 0.4, 110)]  # fmt: skip
    text, bars = "\n".join(times_table(rows)), "\n".join(bar_lines(gpu_models.BARS, rows))
    where = "| ViT-S | bf16 | 8x32x512 | inference | PCg |"
    assert f"{where} planecycle_fast | 50 (50 to 50) | 1 | | 1.00 |" in text
    assert f"{where} planecycle_fast, CUDA graph | out of memory |" in text and "- **out of memory** (" in text
    assert f"{where} products + flash | 45 (45 to 45) | | | 0.90 |" in text
    assert "| fine-tuning | PCg | authors' code | 400 (400 to 400) | 0 | | 2.00 |" in text
    where = "- ViT-S, bf16, 8x32x512, inference: time of"
    assert f"{where} authors' code, compiled / planecycle_fast: 1.37, met (bar 1.35)" in bars  # within its own turns
    assert f"{where} authors' code / planecycle_fast: 2.80, **missed** (bar 3.00)" in bars
    assert f"{where} products and best attention / planecycle_fast: 0.86, met (bar 0.83)" in bars
    assert f"{where} planecycle_fast, slice2d / planecycle_fast: not measured (bar 0.97)" in bars
    assert "fine-tuning: peak of authors' code / planecycle_fast: 2.20, met (bar 2.00)" in bars
    assert list(bar_lines([Bar(eager, EAGER, SLICES, 1.0)], rows)) == [
        f"{where} authors' code / planecycle_fast, slice2d: not measured (bar 1.00)"
    ]


def test_bars_are_of_what_is_measured():
    for bar in gpu_models.BARS:
        names = {cell[4:] for group in GROUPS for cell in group.cells if cell.group == bar.where}
        assert bar.ours in names and (bar.other in names or bar.other == BEST), bar


def test_a_cpu_has_a_floor_and_bars_of_what_it_measures(small, monkeypatch):
    group = cpu.cells("fp32", "1x16x256", compiled=False)
    bars = cpu.bars(group)
    assert {cell[4:] for cell in group} >= {bar.other for bar in bars} | {bar.ours for bar in bars}
    assert [bar.other for bar in cpu.bars(cpu.cells("fp32", "1x32x256", False))].count(SLICES) == 0  # not cubic
    monkeypatch.delenv("PLANECYCLE_REPO", raising=False)
    rows = measured(on_cpu(GROUPS[0]._replace(cells=group)))
    assert rows["PCg", FLOOR]["seconds"] > 0 and rows[OURS]["error"] < 1e-4
    rows = [each | {"cell": each["cell"] | {"volume": "1x16x256"}} for each in rows.values()]
    lines = list(bar_lines(bars, rows))
    assert "products + attention / planecycle_fast: " in lines[0] and "not measured" not in lines[0]
    assert lines[-1].endswith("peak of authors' code / planecycle_fast: not measured (bar 1.67)")


def test_smoke_goes_on_after_what_is_broken(tmp_path, monkeypatch, clock):  # noqa: F811
    def broken():
        raise ValueError("no such kernel\nmore")

    def late():
        clock.now += 100
        return "fine"

    found = [("one", broken), ("two", late), ("three", late)]
    monkeypatch.setattr(gpu_smoke, "checks", lambda device: iter([(name, (name, each)) for name, each in found]))
    assert gpu_smoke.run(tmp_path / "smoke.md", "Some GPU\n", Part("smoke", 50, clock)) == 1
    text = (tmp_path / "smoke.md").read_text()
    assert "| one | BROKEN | ValueError: no such kernel |" in text and "| two | ok | fine |" in text
    assert "Left out, as 50 s were over (1): three" in text


def test_smoke_compares_every_mode_operation_and_way_to_run():
    from ..specs import SPECS

    names = [name for name, _ in gpu_smoke.checks("cpu")]
    assert {f"operation {spec.op.name}" for spec in SPECS} <= set(names)
    assert {f"model, {mode}" for mode in ("slice2d", "PCg", "PCm", "flatten3d")} <= set(names)
    assert {"a training step", "CUDA graph", "torch.compile"} <= set(names)
    for check in (gpu_smoke.model, partial(gpu_smoke.model, step="finetune"), gpu_smoke.attention):
        assert "off by" in check("cpu")


def result(milliseconds, name, cell):
    times = summary([milliseconds / 1e3] * 5)
    info = {"contender": name, "GB/s": cell.bytes / times.median / 1e9, "ceiling": 3000.0}
    return op_measure.Result(times, (times.median,) * 5, info=info | {"share": info["GB/s"] / 3000})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tmp_path


def test_operations_are_written_for_people_and_programs(folder, monkeypatch, clock):  # noqa: F811
    cells = [
        op_cells.OpCell("rope", label, "inference", torch.bfloat16, {}, {}, moved=1.5e8) for label in ("S", "B", "L")
    ]
    monkeypatch.setattr(gpu_parts, "quick_cells", lambda: iter(cells))

    def measure(cell, device):
        clock.now += 60
        found = {op_cells.OURS: result(0.2, op_cells.OURS, cell), "eager": result(0.5, "eager", cell)}
        return found | {"Liger": op_measure.Result(missing="liger_kernel is not installed")}

    monkeypatch.setattr(op_measure, "measure", measure)
    assert gpu_parts.ops(folder / "ops.md", "Some GPU\n", Part("ops", 100, clock)) == 0
    text = (folder / "ops.md").read_text()
    assert text.startswith("Some GPU\n") and "Left out, as 100 s were over (1): rope: L, bfloat16, inference" in text
    assert (
        "| rope: B, bfloat16, inference | planecycle_fast | 200 us | 200 us to 200 us | 1.5e+03 GB/s | 50% | 1.00 |"
        in text
    )
    assert "| eager | 500 us | 500 us to 500 us | 600 GB/s | 20% | 2.50 |" in text
    assert "| Liger | not measured: liger_kernel is not installed |" in text
    assert "Ceiling: a copy, 3000 GB/s, in the same run." in text
    stored = json.loads((folder / "ops.json").read_text())
    assert len(stored["rows"]) == 6 and stored["left_out"] == ["rope: L, bfloat16, inference"]
    assert stored["rows"][0]["share"] == pytest.approx(0.5) and stored["rows"][2]["missing"]


def test_something_refused_is_a_failure(folder, monkeypatch):
    cell = op_cells.OpCell("rope", "S", "inference", torch.bfloat16, {}, {}, moved=1)
    monkeypatch.setattr(gpu_parts, "quick_cells", lambda: iter([cell]))
    monkeypatch.setattr(op_measure, "measure", lambda *_: {op_cells.OURS: op_measure.Result(refused="off by 1")})
    assert gpu_parts.ops(folder / "ops.md", "Some GPU\n", Part("ops", 100)) == 1
    assert "not measured: REFUSED: off by 1" in (folder / "ops.md").read_text()


def time_call(op, label, channels, arguments):
    [microseconds] = arguments
    return {"label": label, "channels": channels, "megabytes": 100.0, "microseconds": microseconds,
            "bandwidth": 100 / microseconds, "copy": 2.0, "ratio": 50 / microseconds}  # fmt: skip


def test_every_kernel_is_timed_against_a_copy_or_as_a_product(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, whose kernels they are")
    from ..specs import SPECS, rope

    original = rope.case
    monkeypatch.setattr(rope, "case", lambda *a, device, **k: original(*a, **k))  # periods are on the GPU there
    monkeypatch.setattr(gpu_kernels, "_tensors", lambda c: c.make(torch.bfloat16, device="meta"))
    calls, timed = list(gpu_kernels.calls(one_volume=True)), set()
    for name, make in calls:
        if op_cells.SHAPES["cuda"][0].label in name:
            op, label, channels, arguments = make()
            cost = op.cost(*arguments)
            timed.add(op.name)
            assert cost.read > 0 and cost.written > 0 and channels == 384 and label in name
    assert {"self_attention", "self_attention_backward", "patchify", "rope"} <= timed
    products = {kernel for _, kernel in gpu_kernels.tile_calls()}
    assert {spec.op.name for spec in SPECS} <= {name.split(":")[0] for name, _ in calls} | products


def test_kernels_below_their_bar_stand_in_bold_and_each_is_written_at_once(tmp_path, monkeypatch, clock):  # noqa: F811
    path, seen = tmp_path / "kernels.md", []

    def call(channels, microseconds):
        def make():
            seen.append(path.read_text())
            clock.now += 30
            return None, "forward", channels, (microseconds,)

        return f"kernel at {channels}", make

    monkeypatch.setattr(gpu_kernels, "calls", lambda: [call(1024, 50), call(4096, 62), call(384, 100)])
    monkeypatch.setattr(gpu_kernels, "time_call", time_call)
    monkeypatch.setattr(gpu_kernels, "host_time", lambda: "per block: 600 us")
    assert gpu_kernels.run(path, "about", Part("kernels", 50, clock)) == 0
    text = path.read_text()
    assert "| forward | 1024 | 100.0 | 50.0 | 2.00 | 2.00 | 100% |" in text and "per block: 600 us" in text
    assert "| forward | 4096 | 100.0 | 62.0 | 1.61 | 2.00 | **81%** |" in text
    assert "Left out, as 50 s were over (1): kernel at 384" in text
    assert len(seen) == 2 and "| forward | 1024 |" in seen[1] and "Not finished: kernel at 4096" in seen[1]


def test_a_kernel_that_raises_leaves_the_others(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("out of resources: shared memory")

    calls = [("first", broken), ("second", lambda: (None, "forward", 384, (50,)))]
    monkeypatch.setattr(gpu_kernels, "calls", lambda: calls)
    monkeypatch.setattr(gpu_kernels, "time_call", time_call)
    monkeypatch.setattr(gpu_kernels, "host_time", broken)
    assert gpu_kernels.run(tmp_path / "kernels.md", "about", Part("kernels", 50)) == 1
    text = (tmp_path / "kernels.md").read_text()
    assert "first: raised RuntimeError: out of resources" in text and "| forward | 384 |" in text


def test_tiles_are_compiled_ahead_and_then_timed(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(gpu_warm, "run", lambda jobs, *_: compiled.extend([job.name for job in jobs]))
    monkeypatch.setattr(
        gpu_kernels, "faster_tile", lambda shape, kernel: f"- {kernel}" if shape.channels > 4000 else ""
    )
    assert gpu_parts.tiles(tmp_path / "tiles.md", "about", Part("tiles", 50)) == 0
    text = (tmp_path / "tiles.md").read_text()
    assert len(compiled) == 15 and "- forward\n- backward\n- linear_gelu\n\n15 kernels were looked at" in text


@pytest.mark.parametrize(("shape", "kernel"), [gpu_kernels.tile_calls()[i] for i in (0, 3)], ids=str)
def test_each_tile_is_chosen_while_it_is_timed_and_the_shipped_one_afterwards(monkeypatch, shape, kernel):
    pytest.importorskip("triton", reason="needs triton, whose kernels have tiles")
    monkeypatch.setattr(gpu_kernels, "_tensors", lambda c: c.make(torch.bfloat16, device="meta"))
    before, channels = dict(configs.TABLE), shape.channels
    shipped, seen = configs.tile(kernel, channels), []
    for tile, _ in gpu_kernels.with_tiles(shape, kernel):
        assert configs.tile(kernel, channels) == tile
        seen.append(tile)
    assert seen[0] == shipped and sorted(seen) == configs.candidates(kernel, channels)
    assert before == configs.TABLE


def test_each_tile_of_a_matrix_product_is_what_its_kernel_takes(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, whose kernels have tiles")
    from planecycle_fast.ops.activations import linear_gelu_table, linear_gelu_triton

    monkeypatch.setattr(gpu_kernels, "_tensors", lambda c: c.make(torch.bfloat16, device="meta"))
    shape, kernel = gpu_kernels.tile_calls()[-5]
    assert (shape.channels, kernel) == (384, "linear_gelu")
    seen, launched = [], []
    monkeypatch.setattr(linear_gelu_triton, "launch", lambda *_, **constants: launched.append(constants))
    for tile, call in gpu_kernels.with_tiles(shape, kernel):
        call()
        seen.append(tile)
        assert (launched[-1]["BLOCK_H"], launched[-1]["num_stages"]) == (tile.hidden, tile.stages)
    assert seen[0] == linear_gelu_table.tiling(1536) and set(seen[1:]) == set(linear_gelu_table.CANDIDATES)
    assert linear_gelu_triton.tiling is linear_gelu_table.tiling


def test_the_cells_of_the_quick_run_are_those_of_the_benchmarks(monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark, by which they are marked")
    monkeypatch.setitem(op_cells.SHAPES, "cuda", [op_cells.TINY] * len(op_cells.SHAPES["cuda"]))
    original = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: original(*a, **k | {"device": "cpu"}))  # RoPE's periods
    cells = list(gpu_parts.quick_cells())
    assert {cell.op for cell in cells} == set(gpu_parts.OPERATIONS)
    assert all([cell.dtype == torch.bfloat16 for cell in cells])
