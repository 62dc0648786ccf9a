"""Bad input to `lift` and to lifted models: named argument, what it got, what it expects, before any work."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.optional import MissingPackageError, require

from .host_models import BY_NAME
from .toy import ToyAdapter, ToyViT, toy_lift


@pytest.fixture
def lifted(monkeypatch):
    model = toy_lift(ToyViT(depth=2))

    def no_work(*_):
        raise AssertionError("the model ran on bad input")

    monkeypatch.setattr(model.adapter.model, "embed", no_work)
    return model


def volume(*shape, **kwargs):
    return torch.zeros(shape or (1, 3, 2, 4, 6), **kwargs)


VOLUMES = [
    (volume(3, 2, 4, 6), ValueError, r"volume must have shape \(B, 3, D, height, width\), got \(3, 2, 4, 6\)"),
    (volume(1, 1, 3, 2, 4, 6), ValueError, r"volume must have shape .* got \(1, 1, 3, 2, 4, 6\)"),
    (volume(1, 1, 2, 4, 6), ValueError, r"got \(1, 1, 2, 4, 6\); repeat the one channel of a scan to three"),
    (volume(1, 4, 2, 4, 6), ValueError, r"volume must have shape .* got \(1, 4, 2, 4, 6\)"),
    (volume(1, 3, 2, 5, 6), ValueError, "volume's slices must be a multiple of the patch, 2 x 2 pixels, got 5 x 6"),
    (volume(1, 3, 2, 4, 7), ValueError, "volume's slices must be a multiple of the patch, 2 x 2 pixels, got 4 x 7"),
    (volume(0, 3, 2, 4, 6), ValueError, r"volume must not be empty, got shape \(0, 3, 2, 4, 6\)"),
    (volume(1, 3, 0, 4, 6), ValueError, r"volume must not be empty, got shape \(1, 3, 0, 4, 6\)"),
    (volume(1, 3, 2, 0, 6), ValueError, r"volume must not be empty, got shape \(1, 3, 2, 0, 6\)"),
    (volume(dtype=torch.int16), TypeError, "volume must have a floating-point dtype, got torch.int16"),
    (volume(dtype=torch.uint8), TypeError, "volume must have a floating-point dtype, got torch.uint8"),
    (volume(dtype=torch.complex64), TypeError, "volume must have a floating-point dtype, got torch.complex64"),
    (volume(dtype=torch.float64), ValueError, "volume must have the model's dtype, torch.float32, got torch.float64"),
    (volume(dtype=torch.bfloat16), ValueError, "volume must have the model's dtype, torch.float32, got torch.bfloat16"),
    (volume(device="meta"), ValueError, "volume must be on the model's device, cpu, got meta"),
    (volume().numpy(), TypeError, "volume must be a torch.Tensor, got ndarray"),
    (None, TypeError, "volume must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize("bad, error, message", VOLUMES, ids=[str(i) for i in range(len(VOLUMES))])
@pytest.mark.parametrize("method", ["forward", "intermediate"])
def test_volumes(lifted, method, bad, error, message):
    with pytest.raises(error, match=message):
        (lifted if method == "forward" else lifted.intermediate)(bad)


@pytest.mark.parametrize(
    "n, error, message",
    [
        (0, ValueError, "n must be between 1 and the model's 2 layers, got 0"),
        (3, ValueError, "n must be between 1 and the model's 2 layers, got 3"),
        ([2], ValueError, r"n must hold indices of the model's 2 layers, got \[2\]"),
        ([0, -3], ValueError, r"n must hold indices of the model's 2 layers, got \[0, -3\]"),
        ([], ValueError, r"n must hold indices of the model's 2 layers, got \[\]"),
        ([True, False], TypeError, r"n must be a number of layers or a sequence of indices, got \[True, False\]"),
        (b"\x00", TypeError, "n must be a number of layers or a sequence of indices"),
        (None, TypeError, "n must be a number of layers or a sequence of indices, got None"),
        (True, TypeError, "n must be a number of layers or a sequence of indices, got True"),
        ("last", TypeError, "n must be a number of layers or a sequence of indices, got 'last'"),
        ([0.5], TypeError, r"n must be a number of layers or a sequence of indices, got \[0.5\]"),
    ],
)
def test_intermediate_layers(lifted, n, error, message):
    with pytest.raises(error, match=message):
        lifted.intermediate(volume(), n)


def test_which_intermediate_layers():
    model, v = toy_lift(ToyViT(depth=4).double()), torch.randn(1, 3, 2, 4, 6).double()
    every = [f.patches for f in model.intermediate(v, 4)]
    assert torch.equal(every[-1], model(v).patches)
    choices = [(1, [3]), (2, [2, 3]), ([0, 2], [0, 2]), ([2, 0, 0], [0, 2]), ((-1, 1), [1, 3]), (range(2), [0, 1])]
    for n, expected in [*choices, (np.int64(2), [2, 3]), (np.arange(2), [0, 1]), (iter([1, 3]), [1, 3])]:
        got = model.intermediate(v, n)
        assert len(got) == len(expected)
        assert all(torch.equal(f.patches, every[i]) for f, i in zip(got, expected))


def test_no_layer_runs_in_vain():
    model, ran = toy_lift(ToyViT(depth=4).double()), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.intermediate(torch.randn(1, 3, 2, 4, 6).double(), [1, 0])
    assert ran == [0, 1]


def test_float64_under_autocast(lifted):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must have the model's dtype"):
        lifted(volume(dtype=torch.float64))


def test_the_models_dtype_is_that_of_its_floating_point_parameters():
    model = ToyViT(depth=2)
    quantised = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.__dict__["_parameters"] = {"quantised": quantised, **model._parameters}
    assert next(model.parameters()) is quantised
    with pytest.raises(ValueError, match="volume must have the model's dtype, torch.float32, got torch.float64"):
        toy_lift(model)(volume(dtype=torch.float64))


LIFTS = [
    (dict(mode="3d"), ValueError, "mode must be one of planecycle, slice2d, flatten3d, got '3d'"),
    (dict(cycle_order=()), ValueError, "cycle_order must name at least one plane, got an empty cycle"),
    (dict(cycle_order=("HW", "XY")), ValueError, r"cycle_order\[1\] must be one of HW, DW, DH, DHW, got 'XY'"),
    (dict(cycle_order=7), TypeError, "cycle_order must be a sequence of plane names, got int 7"),
    (dict(pool_method="max"), ValueError, "pool_method must be one of PCg, PCm, got 'max'"),
    (dict(globals_at="slice"), ValueError, "globals_at must be one of depth, plane, got 'slice'"),
    (dict(mode="slice2d", pool_method="max"), ValueError, "pool_method must be one of"),
    (dict(backend="cuda"), ValueError, "backend must be 'auto' or one of triton, cpu, reference, got 'cuda'"),
    (dict(backend="triton"), ValueError, "backend 'triton' is not usable: .*; usable: (cpu, )?reference"),
    (dict(attention="flash9"), ValueError, "attention must be one of auto, triton, .*, got 'flash9'"),
    (
        dict(attention="flash3"),
        ValueError,
        "attention 'flash3' is not usable: .* not installed; .*usable: auto, sdpa",
    ),
    (dict(adapter="timm"), TypeError, "adapter must be a class or function that makes an Adapter, got str"),
    (dict(adapter=lambda model: model), TypeError, "adapter must make an Adapter, got ToyViT"),
]


@pytest.mark.parametrize("change, error, message", LIFTS, ids=[str(i) for i in range(len(LIFTS))])
def test_lift(change, error, message):
    with pytest.raises(error, match=message):
        pcf.lift(ToyViT(), **(dict(adapter=ToyAdapter) | change))


def timm_model(name, **settings):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **settings)


def timm_dinov3(**settings):
    return timm_model("vit_small_patch16_dinov3", depth=1, **settings)


def sam():
    config = tr.SamVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    return tr.models.sam.modeling_sam.SamVisionModel(config)


SUPPORTED = "supported: transformers DINOv3ViTModel, .*timm DINOv3"
MODELS = [
    (lambda: "dinov3", TypeError, "model must be a torch.nn.Module, got str"),
    (lambda: nn.Linear(2, 2), ValueError, f"supported class, got torch.nn.modules.linear.Linear; {SUPPORTED}"),
    (lambda: nn.Linear(2, 2), ValueError, "subclass planecycle_fast.Adapter and pass it: lift"),
    (lambda: timm_model("resnet18"), ValueError, f"got timm.models.resnet.ResNet; {SUPPORTED}"),
    (lambda: timm_model("samvit_base_patch16"), ValueError, r"VisionTransformerSAM attends in windows .*SAM"),
    (sam, ValueError, r"SamVisionModel attends in windows with relative positions"),
    (
        lambda: tr.Dinov2ForImageClassification(
            tr.Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
        ),
        ValueError,
        "model.dinov2 is supported: lift that",
    ),
    (
        lambda: timm.create_model("vit_small_patch14_dinov2", depth=1, patch_drop_rate=0.2),
        ValueError,
        r"model drops patches in training \(patch_drop_rate > 0\)",
    ),
    (
        lambda: timm.create_model("vit_small_patch16_dinov3", depth=1, patch_drop_rate=0.2),
        ValueError,
        "model drops patches",
    ),
    (lambda: timm_model("vit_small_resnet26d_224"), ValueError, f"VisionTransformer; {SUPPORTED}"),  # a hybrid
    (lambda: timm_dinov3(rope_rotate_half=False), ValueError, "got timm.models.eva.Eva; supported: .*type 'dinov3'"),
    (lambda: timm_dinov3(rope_grid_offset=0.5), ValueError, f"got timm.models.eva.Eva; {SUPPORTED}"),
    (lambda: timm_dinov3(rope_grid_indexing="xy"), ValueError, f"got timm.models.eva.Eva; {SUPPORTED}"),
    (lambda: timm_dinov3(use_abs_pos_emb=True), ValueError, f"got timm.models.eva.Eva; {SUPPORTED}"),
    (lambda: toy_lift(ToyViT()), ValueError, "model is lifted already .*; lift unlift"),
]


@pytest.mark.parametrize("build, error, message", MODELS, ids=[str(i) for i in range(len(MODELS))])
def test_models(build, error, message):
    with pytest.raises(error, match=message):
        pcf.lift(build())


def test_flatten3d_of_a_head_dim_without_sections():
    model = ToyViT(head_dim=8)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 for 3D RoPE, got 8"):
        toy_lift(model, mode="flatten3d")


def test_unlift():
    with pytest.raises(TypeError, match=r"lifted must be a model made by lift\(\), got ToyViT"):
        pcf.unlift(ToyViT())


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3", "timm-dinov2-s", "hf-dinov2"])
def test_patches_of_real_hosts(name):
    host = BY_NAME[name]
    lifted = pcf.lift(host.make())
    with pytest.raises(ValueError, match=f"multiple of the patch, {host.patch} x {host.patch} pixels, got 50 x 48"):
        lifted(torch.zeros(1, 3, 2, 50, 48))


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        MissingPackageError, match=r"'nibabel' is not installed; .* 'planecycle-fast\[demo\]'"
    ) as caught:
        require("nibabel", "demo")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, ImportError)


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs") as caught:
        require("half_there", "demo")
    assert not isinstance(caught.value, MissingPackageError)


def test_import_is_silent_and_lean():
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import torch; before = set(sys.modules)\n"
        "import planecycle_fast\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = 'timm transformers triton flash_attn nibabel nilearn onnx matplotlib rich typer psutil torchvision'\n"
        "assert not new & set(heavy.split()), new & set(heavy.split())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
