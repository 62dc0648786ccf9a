"""What a volume will cost, before anything runs: memory as torch records it, and the table. FLOPs: test_bench_costs."""

import pytest
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast import native, plan_table
from planecycle_fast.benchmark.costs import peak_bytes
from planecycle_fast.cli import main
from planecycle_fast.gpus import GPUS, gpu
from planecycle_fast.plan_table import MODES, deepest, parse_shape, seconds
from planecycle_fast.planning import Planned, make_head, plan, take_step

from .hosts import BY_NAME


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


@pytest.mark.parametrize("needs", [lambda d: 1000 + 7 * d, lambda d: 1000 + d * d, lambda d: 1000 + 64 * (d // 64)])
@pytest.mark.parametrize("available", [0, 999, 1000, 1001, 1007, 5000, 10**5])
@pytest.mark.parametrize("depth", [1, 3, 400])
def test_the_deepest_volume_that_fits(needs, available, depth):
    calls = []
    found = deepest(lambda d: calls.append(d) or needs(d), available, depth)
    assert found == max([d for d in range(10**5) if needs(d) <= available], default=0)
    assert len(calls) < 40


def test_seconds_are_a_roofline():
    planned = Planned((1, 3, 1, 16, 16), 10**15, 2 * 10**12, 10**12, 100, 0, 0, 0, 0, "triton")
    machine = GPUS["h100"]._replace(flops={torch.bfloat16: 1e15}, bandwidth=1e12)
    shortest, longest = seconds(planned, machine, torch.bfloat16)
    assert shortest == pytest.approx(3.0)  # of traffic, while products take one
    assert longest == pytest.approx(1 / 0.35 + 3 / 0.6 + 100 * 10e-6)


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
    monkeypatch.setitem(plan_table.__dict__, "gpu", lambda name: tiny)
    assert main(command) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("PCg"))
    assert row.split()[-1] == "0"


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
