"""What a volume will cost, before anything runs: memory as torch records it, and the table. FLOPs: test_bench_costs."""

from pathlib import Path

import pytest
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast.bench import rows
from planecycle_fast.bench.cells import DTYPES, FAST, GRAPH, parse_volume
from planecycle_fast.bench.costs import peak_bytes
from planecycle_fast.commands.cli import main
from planecycle_fast.commands.plan import chosen_machine
from planecycle_fast.cost import gpus, modes
from planecycle_fast.cost.gpus import GPUS, MEASURED_HOST, Host, Machine, gpu
from planecycle_fast.cost.modes import MODES, deepest, seconds
from planecycle_fast.cost.planning import Planned, make_head, plan, take_step
from planecycle_fast.inputs import parse_shape
from planecycle_fast.runtime import native
from planecycle_fast.runtime.repeats import first_rounds_only

from ..host_models import BY_NAME

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def model():
    """Wide enough for tokens to matter beside what every pass has."""
    return BY_NAME["timm-dinov3-s"].make(embed_dim=192, num_heads=3, depth=4)


@pytest.mark.skipif(not native.ready(), reason="plans what backend 'cpu' does")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", ["inference", "finetune"])
@pytest.mark.parametrize("mode", MODES)
def test_peak_memory_is_what_torch_records(mode, step, dtype):
    """Within 10 %, of every allocation above weights and volume."""
    host, shape = model(), (1, 3, 24, 96, 96)
    planned = plan(host, shape, step=step, dtype=dtype, **MODES[mode])
    assert planned.path == "cpu"
    lifted, volume = pcf.lift(host.to(dtype), **MODES[mode]).train(step == "finetune"), torch.randn(shape).to(dtype)
    head, target = make_head(lifted, volume), torch.zeros(1, dtype=torch.long)

    def run(volume):
        lifted.zero_grad()
        head.zero_grad()
        return take_step(lifted, volume, step, head, target)

    run(volume)
    lifted.zero_grad()
    head.zero_grad()
    assert planned.peak_bytes == pytest.approx(peak_bytes(run, volume), rel=0.1)


def test_a_large_model_on_a_gpu_that_is_not_there():
    """Nothing of its size is allocated, and its weights are counted. Kernels are planned where triton is."""
    pytest.importorskip("triton", reason="plans Triton kernels")
    planned = plan("vit_7b_patch16_dinov3", (1, 3, 4, 64, 64), dtype=torch.bfloat16, device="cuda")
    assert planned.path == "triton" and 13e9 < planned.weight_bytes < 14e9
    rows = 4 * (16 + 5)
    assert planned.flops == pytest.approx(2 * 6.7e9 * rows, rel=0.1)


def test_the_model_stays_as_it_is():
    host = model()
    before = {name: (t, t.clone(), t.requires_grad) for name, t in host.state_dict(keep_vars=True).items()}
    plan(host, (1, 3, 2, 64, 64), dtype=torch.bfloat16, step="finetune")
    for name, t in host.state_dict(keep_vars=True).items():
        same, value, grad = before[name]
        assert t is same and torch.equal(t, value) and t.requires_grad == grad and t.grad is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step": "train"}, "step must be one of inference, probe, finetune, got 'train'"),
        ({"shape": (3, 2, 64, 64)}, "shape must be five sizes"),
        ({"shape": (1, 3, 2, 60, 64)}, "multiple of the patch"),
        ({"device": "mps"}, "device must be one of cpu, cuda, got 'mps'"),
        ({"mode": "3d"}, "mode must be one of"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(model(), **({"shape": (1, 3, 2, 64, 64)} | settings))


@pytest.mark.skipif(not native.ready(), reason="plans what backend 'cpu' does")
@pytest.mark.parametrize("size, depth", [(96, 50), (224, 24), (32, 4000)])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_rounds_tell_the_peak(mode, size, depth):
    """Of loops over groups of slices and sequences, of which there are several here."""
    host, shape = model(), (1, 3, depth, size, size)
    whole = plan(host, shape, **MODES[mode])
    with first_rounds_only():
        first = plan(host, shape, **MODES[mode])
    assert first.launches < whole.launches and first.total_bytes == whole.total_bytes


@pytest.mark.skipif(not native.ready(), reason="plans what backend 'cpu' does")
@pytest.mark.parametrize("mode", MODES)
def test_a_deep_volume_is_planned_as_quickly_as_a_flat_one(mode):
    host = model()
    with first_rounds_only():
        flat, deep = [plan(host, (1, 3, depth, 64, 64), **MODES[mode]) for depth in (8, 200_000)]
    assert deep.launches < 2 * flat.launches and deep.peak_bytes > 10_000 * flat.peak_bytes


@pytest.mark.parametrize("needs", [lambda d: 1000 + 7 * d, lambda d: 1000 + d * d, lambda d: 1000 + 64 * (d // 64)])
@pytest.mark.parametrize("available", [0, 999, 1000, 1001, 1007, 5000, 10**5])
@pytest.mark.parametrize("depth", [1, 3, 400])
def test_the_deepest_volume_that_fits(needs, available, depth):
    calls = []
    found = deepest(lambda d: calls.append(d) or needs(d), available, depth)
    assert found == max([d for d in range(10**5) if needs(d) <= available], default=0)
    assert len(calls) < 40


def planned_of(flops=0, moved=0, launches=0, blocks=0):
    return Planned((1, 3, 1, 16, 16), flops, moved, 0, launches, blocks, 0, 0, 0, 0, "triton")


def test_seconds_are_a_roofline():
    machine = Machine("some GPU", {torch.bfloat16: 1e15}, 1e12, 1e9, (0.5, 0.75), (1e-3, 2e-3))
    times = seconds(planned_of(10**15, 3 * 10**12, 100), machine, torch.bfloat16)
    assert times.shortest == pytest.approx(4.0) and times.limit == "bandwidth"  # while products take two
    assert times.longest == pytest.approx(1 / 0.33 + 3 / 0.6 + 100 * 2e-3)
    assert seconds(planned_of(10**16, 3 * 10**12, 100), machine, torch.bfloat16).limit == "products"
    assert seconds(planned_of(1, 1, 100), machine, torch.bfloat16)[::2] == (pytest.approx(0.1), "launches")


def test_the_gpu_waits_for_its_host_and_the_host_for_the_gpu():
    host = Host(launch=1e-3, block=0.1)
    machine = Machine("some GPU", {torch.bfloat16: 1e15}, 1e12, 1e9, host=host)
    busy, idle = (seconds(planned_of(flops, 0, 100, 12), machine, torch.bfloat16) for flops in (10**16, 10**14))
    assert busy.limit == "products" and busy.shortest == pytest.approx(10)
    assert idle.limit == "host" and idle.shortest == pytest.approx(100 * 1e-3 + 12 * 0.1)
    assert idle.longest == pytest.approx(idle.shortest / 0.6)
    alone = seconds(planned_of(10**14, 0, 100, 12), machine._replace(host=None), torch.bfloat16)
    assert alone.limit == "products" and alone.shortest == pytest.approx(0.1)


def test_blocks_are_counted_with_their_backward():
    host, shape = model(), (1, 3, 2, 64, 64)  # of four blocks
    assert [plan(host, shape, step=step).blocks for step in ("inference", "probe", "finetune")] == [4, 4, 12]


MEASURED_ON_GPU = [
    row for row in rows.load(RESULTS / "nvidia-h100-80gb-hbm3" / "rows.jsonl")
    if row["stamp"]["commit"] == "8a2b271" and row["cell"]["code"] in (FAST, GRAPH)
]  # fmt: skip
SIZES = {"ViT-S": "small", "ViT-B": "base", "ViT-L": "large"}


def planned_for_h100(cell):
    name = f"vit_{SIZES[cell['model']]}_patch16_dinov3"
    shape, dtype = parse_volume(cell["volume"]).shape, DTYPES[cell["dtype"]]
    return plan(name, shape, dtype=dtype, device="cuda", step=cell["step"], **MODES[cell["mode"]])


def shown(row):
    """All of `make test-full`, in `make test` those of PlaneCycle itself, without graphs."""
    name, cell = "-".join(map(str, row["cell"].values())), row["cell"]
    few = cell["mode"] == "PCg" and cell["code"] == FAST
    return pytest.param(row, id=name, marks=[] if few else pytest.mark.full)


@pytest.mark.parametrize("row", [shown(row) for row in MEASURED_ON_GPU])
def test_what_an_h100_measured(row):
    """Its time lies in the range, which is not just wide, and its peak of memory within 10 %."""
    pytest.importorskip("triton", reason="plans Triton kernels")
    cell, planned = row["cell"], planned_for_h100(row["cell"])
    machine = chosen_machine("h100", DTYPES[cell["dtype"]], graph=cell["code"] == GRAPH)
    if row["status"] == "out of memory":
        assert planned.total_bytes > machine.memory
        return
    shortest, longest, limit = seconds(planned, machine, DTYPES[cell["dtype"]])
    assert shortest <= row["seconds"] <= longest
    assert longest / shortest <= (5.5 if cell["code"] == GRAPH else 4)
    small = cell["code"] == FAST and cell["dtype"] == "bf16" and not cell["volume"].endswith("512")
    assert (limit == "host") == small
    if "peak_bytes" in row:  # measured when a pass kept a copy of volumes, slice by slice, which no part of it needs
        copy = planned.volume_bytes if cell["step"] == "inference" and planned.shape[0] > 1 else 0
        assert planned.peak_bytes + copy == pytest.approx(row["peak_bytes"], rel=0.1)


def test_there_are_measurements_to_hold_against():
    assert {row["cell"]["step"] for row in MEASURED_ON_GPU} == {"inference", "finetune"}
    assert {row["cell"]["volume"] for row in MEASURED_ON_GPU} >= {"4x64x64", "1x32x256", "8x32x512", "32x64x64"}


def test_what_gpus_reach_is_what_one_reached():
    measured = next(row for row in MEASURED_ON_GPU if "ceiling_flops" in row)
    h100 = GPUS["h100"]
    assert h100.reached[0] == pytest.approx(measured["ceiling_flops"] / h100.flops[torch.bfloat16], abs=0.005)
    assert h100.reached[1] == pytest.approx(measured["ceiling_bandwidth"] / h100.bandwidth, abs=0.005)


def test_a_host_of_ones_own():
    machine = chosen_machine("a100", torch.bfloat16, block_us=500.0)
    assert machine.host == MEASURED_HOST._replace(block=500e-6) and machine.bandwidth == GPUS["a100"].bandwidth
    assert chosen_machine("a100", torch.bfloat16, graph=True).host is None
    for wrong, message in (
        ({"gpu_name": None, "graph": True}, "graph, launch_us and block_us are of a GPU: give them with gpu"),
        ({"gpu_name": None, "block_us": 1.0}, "are of a GPU"),
        ({"gpu_name": "h100", "graph": True, "launch_us": 1.0}, "with graph it waits for none"),
        ({"gpu_name": "h100", "launch_us": -1.0}, "launch_us must be microseconds, 0 or more, got -1.0"),
        ({"gpu_name": "h100", "block_us": float("nan")}, "block_us must be microseconds, 0 or more, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_machine(dtype=torch.bfloat16, **wrong)


def test_shapes_and_gpus_by_name():
    assert parse_shape("2x32x256") == (2, 3, 32, 256, 256) and parse_shape("1x5x28x42") == (1, 3, 5, 28, 42)
    for text in ("32x256", "1x0x256", "1x2x3x4x5", "axbxc"):
        with pytest.raises(ValueError, match="volume must be like"):
            parse_shape(text)
    assert gpu("H100").memory == 80e9
    with pytest.raises(ValueError, match="gpu must be one of a10, .*, got 'tpu'"):
        gpu("tpu")


def test_the_table(capsys, monkeypatch):
    """Of a GPU: a volume that fits, and one that does not, by the exit status."""
    pytest.importorskip("triton", reason="plans Triton kernels")
    command = ["plan", "vit_small_patch16_dinov3", "--volume", "1x4x64", "--gpu", "h100", "--modes", "PCg,flatten3d"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for part in ("PCg", "flatten3d", "NVIDIA H100 SXM", "not a measurement", "at worst", "slices", "triton"):
        assert part in text
    assert "slice2d" not in text
    tiny = GPUS["h100"]._replace(memory=1e6)
    monkeypatch.setattr(gpus, "gpu", lambda name: tiny)
    assert main(command) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("PCg"))
    assert row.split()[-1] == "0"


def test_rows_appear_as_they_are_known(capsys, monkeypatch):
    """The first mode's is there before the second one is planned, and columns stand below their names."""
    seen, real = [], modes.plan

    def planned(*args, **settings):
        seen.append((settings, capsys.readouterr().out))
        return real(*args, **settings)

    monkeypatch.setattr(modes, "plan", planned)
    monkeypatch.setattr(modes, "deepest", lambda *_: 123456)
    assert main(["plan", "vit_small_patch16_dinov3", "--volume", "1x2x32", "--modes", "PCg,PCm"]) == 0
    assert [settings["pool_method"] for settings, _ in seen] == ["PCg", "PCm"] and seen[0][1] == ""
    _, head, row = seen[1][1].splitlines()
    assert row.startswith("PCg ") and row.endswith(" 123,456") and len(row) == len(head) == max(map(len, (head, row)))
    assert capsys.readouterr().out.splitlines()[0].startswith("PCm ")


@pytest.mark.full
def test_modes_that_a_model_cannot_be_lifted_in_are_named(capsys, monkeypatch):
    """BEiT knows no third axis: flatten3d is a line of its own, or if it was asked for by name an error."""
    monkeypatch.setattr(modes, "deepest", lambda *_: 1)
    command = ["plan", "beit_base_patch16_224", "--volume", "1x2x224"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["mode", "slice2d", "PCg", "PCm", "flatten3d:"]
    assert "DHW" in lines[5]
    assert main([*command, "--modes", "PCg,flatten3d"]) == 1
    assert "DHW" in capsys.readouterr().err


def test_the_table_says_what_limits_and_for_which_host(capsys, monkeypatch):
    pytest.importorskip("triton", reason="plans Triton kernels")
    monkeypatch.setattr(modes, "deepest", lambda *_: 1)
    command = ["plan", "vit_small_patch16_dinov3", "--volume", "1x4x64", "--gpu", "h100", "--modes", "PCg"]
    for more, limit, about in (
        ([], "host", "1250 us per block"),
        (["--launch-us", "3", "--block-us", "500"], "host", "3 us per launch and 500 us per block"),
        (["--graph"], "launches", "as a CUDA graph"),
    ):
        assert main([*command, *more]) == 0
        text = capsys.readouterr().out
        row = next(line for line in text.splitlines() if line.startswith("PCg"))
        assert limit in row.split() and about in text
        assert ("The host takes" in text) == (limit == "host") and ("--block-us" in text) == (not more)


def test_bad_arguments_of_the_command(capsys):
    for change, message in (
        (["--dtype", "int8"], "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (["--modes", "2d"], "modes must be of slice2d, PCg, PCm, flatten3d, got '2d'"),
        (["--gpu", "tpu"], "gpu must be one of"),
    ):
        assert main(["plan", "vit_small_patch16_dinov3", "--volume", "1x4x64", *change]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not native.ready(), reason="plans what backend 'cpu' does")
@pytest.mark.parametrize("step", ["inference", "finetune"])
@pytest.mark.parametrize("patch, shape", [(14, (1, 3, 8, 224, 224)), (16, (4, 3, 16, 64, 64))], ids=str)
def test_bfloat16_where_onednn_changes_its_ways(patch, shape, step):
    """Convolutions of three images and more take a hundred times the memory, linear layers copy their weight."""
    name = {14: "vit_small_patch14_dinov2", 16: "vit_small_patch16_dinov3"}[patch]
    host = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=3).to(torch.bfloat16)
    planned = plan(host, shape, step=step, dtype=torch.bfloat16)
    lifted, volume = pcf.lift(host).train(step == "finetune"), torch.randn(shape).to(torch.bfloat16)
    head, target = make_head(lifted, volume), torch.zeros(shape[0], dtype=torch.long)

    def run(volume):
        take_step(lifted, volume, step, head, target)
        lifted.zero_grad()
        head.zero_grad()

    run(volume)
    assert planned.peak_bytes == pytest.approx(peak_bytes(run, volume), rel=0.1)


@pytest.mark.parametrize("step", ["inference", "finetune"])
def test_hugging_face_trains_on_kernels(step):
    """Where RoPE draws a part of its augmentation, whose gradients torch wants otherwise than of whole lists."""
    pytest.importorskip("triton", reason="plans Triton kernels")
    planned = plan("facebook/dinov3-vits16-pretrain-lvd1689m", (1, 3, 2, 32, 32), device="cuda", step=step)
    assert planned.path == "triton" and planned.flops > 0
