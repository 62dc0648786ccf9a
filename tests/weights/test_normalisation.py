"""What preprocessor_config.json says is followed whole or refused by name, and so are timm's statistics."""

import json
import sys

import numpy as np
import pytest
import timm
import torch

from planecycle_fast.commands import demo
from planecycle_fast.commands.cli import main
from planecycle_fast.scans.feature_files import load_metadata
from planecycle_fast.scans.preprocess import Window, prepare
from planecycle_fast.scans.scan import IMAGENET_MEAN, IMAGENET_STD, Scan, in_channels
from planecycle_fast.weights.load import load_model
from planecycle_fast.weights.normalisation import normalisation_by_name

from ..host_models import BY_NAME
from ..scan_writers import write_nifti

MODEL = torch.nn.Identity()  # with nothing of timm's
NOISE = np.random.default_rng(0).normal(100, 30, size=(32, 32, 2)).astype(np.float32)
STATISTICS = {"image_mean": [0.1, 0.1, 0.1], "image_std": [0.2, 0.2, 0.2]}


def pixels(folder, settings, channels=3, file="preprocessor_config.json"):
    """Black, and white, in each channel."""
    (folder / file).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    mean, std = normalisation_by_name(MODEL, str(folder), channels)
    found = in_channels(torch.tensor([0.0, 1.0]).view(1, 1, 2), mean, std)
    assert found.shape == (1, channels, 1, 1, 2) and found.dtype == torch.float32
    return found[0, :, 0, 0].T.tolist()  # [black, white], per channel


FOLLOWED = {  # settings, and what black and white become: numbers of transformers' image processors
    "plain": (STATISTICS, [-0.5] * 3, [4.5] * 3),
    "not normalised": (STATISTICS | {"do_normalize": False}, [0] * 3, [1] * 3),
    "not rescaled": (
        {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
        [-2.1179, -2.0357, -1.8044],
        [2.2489, 2.4286, 2.64],
    ),
    "neither": ({"do_rescale": False, "do_normalize": False}, [0] * 3, [255] * 3),
    "to [0, 2]": ({"rescale_factor": 2 / 255, "do_normalize": False}, [0] * 3, [2] * 3),
    "another factor": (STATISTICS | {"rescale_factor": 1 / 127.5}, [-0.5] * 3, [9.5] * 3),
    "the factor is not used": ({"rescale_factor": 7, "do_rescale": False, "image_std": [50], "image_mean": 0},
                               [0] * 3, [5.1] * 3),
    "one number": ({"image_mean": 0.5, "image_std": 0.25}, [-2] * 3, [2] * 3),
    "one value": ({"image_mean": [0.5], "image_std": [0.25]}, [-2] * 3, [2] * 3),
    "whole numbers": ({"image_mean": [0, 0, 0], "image_std": 1}, [0] * 3, [1] * 3),
    "true by name": (STATISTICS | {"do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098},
                     [-0.5] * 3, [4.5] * 3),
    "null for normalised": (STATISTICS | {"do_normalize": None, "do_pad": None}, [0] * 3, [1] * 3),
    "null for both": (STATISTICS | {"do_normalize": None, "do_rescale": None}, [0] * 3, [255] * 3),
    "sizes": (STATISTICS | {"do_resize": True, "size": [3, 224, 224], "do_center_crop": True, "crop_size": 224,
                            "do_pad": True, "do_convert_rgb": True, "do_flip_channel_order": True, "resample": 3},
              [-0.5] * 3, [4.5] * 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_is_followed(tmp_path, kind):
    settings, black, white = FOLLOWED[kind]
    assert pixels(tmp_path, settings) == [pytest.approx(black, abs=1e-4), pytest.approx(white, abs=1e-4)]


@pytest.mark.parametrize(
    "kind",
    ["plain", "not normalised", "not rescaled", "neither", "another factor", "null for normalised", "null for both"],
)
def test_numbers_are_those_of_transformers(tmp_path, kind):
    vit = pytest.importorskip("transformers.models.vit.image_processing_pil_vit", reason="not in transformers 5.0")
    settings, black, white = FOLLOWED[kind]
    processor = vit.ViTImageProcessorPil(**settings, do_resize=False)
    picture = np.zeros((3, 4, 4), np.uint8)
    picture[:, :2] = 255
    theirs = np.asarray(processor(picture, input_data_format="channels_first")["pixel_values"][0])
    assert theirs[:, 0, 0].tolist() == pytest.approx(white, abs=1e-3)
    assert theirs[:, 3, 3].tolist() == pytest.approx(black, abs=1e-3)


REFUSED = {
    "broken": ('{"image_mean": [0.5', "preprocessor_config.json must be readable JSON"),
    "empty": ("", "preprocessor_config.json must be readable JSON"),
    "a list": ("[1, 2]", r"preprocessor_config.json must hold an object of settings, got \[1, 2\]"),
    "std 0": (STATISTICS | {"image_std": [0.2, 0, 0.2]}, "image_std must be a finite number above 0, got 0$"),
    "std below 0": (STATISTICS | {"image_std": -1}, "image_std must be a finite number above 0, got -1"),
    "std NaN": (STATISTICS | {"image_std": [float("nan")] * 3}, "image_std must be a finite number above 0, got nan"),
    "mean infinite": (STATISTICS | {"image_mean": float("inf")}, "image_mean must be a finite number, got inf"),
    "a word": (STATISTICS | {"image_mean": ["0.5"] * 3}, "image_mean must be a finite number, got '0.5'"),
    "a flag": (STATISTICS | {"image_std": True}, "image_std must be a finite number above 0, got True"),
    "no values": (STATISTICS | {"image_mean": []}, r"image_mean must be a number, or one per channel, got \[\]"),
    "two values": (STATISTICS | {"image_mean": [0.1, 0.2]}, "mean must have one value or one for .* 3 channels, got 2"),
    "four values": (STATISTICS | {"image_std": [1] * 4}, "the std must have one value or one for .* 3 channels, got 4"),
    "no std": ({"image_mean": 0.5}, "image_mean and image_std must both be given, or do_normalize be false"),
    "nothing": ({"size": 224}, "image_mean and image_std must both be given"),
    "factor 0": (STATISTICS | {"rescale_factor": 0}, "rescale_factor must be a finite number above 0, got 0"),
    "factor null": (STATISTICS | {"rescale_factor": None}, "rescale_factor must be a finite number above 0, got None"),
    "a factor in words": (STATISTICS | {"rescale_factor": "1/255"}, "rescale_factor must be a finite number above 0"),
    "a flag that is a word": (STATISTICS | {"do_normalize": "no"}, "do_normalize must be true or false, got 'no'"),
    "a flag that is 0": (STATISTICS | {"do_rescale": 0}, "do_rescale must be true or false, got 0"),
    "unknown": (STATISTICS | {"do_equalize": True}, "do_equalize must be false or left out: it is not supported here"),
    "an offset": (STATISTICS | {"offset": True}, "offset must be false or left out"),
    "of 8 bits": ({"image_mean": 123.7, "image_std": 58.4}, "must be of pixels from 0 to 1, .* 0.0171 to 0.0171 dev"),
    "of [0, 1]": (STATISTICS | {"do_rescale": False}, "must be of pixels from 0 to 255, .* 1.28e.03 to 1.28e.03 dev"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    settings, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as raised:
        pixels(tmp_path, settings)
    assert "\n" not in str(raised.value) and f"{tmp_path / 'preprocessor_config.json'}" in str(raised.value)


def test_a_file_for_several_processors(tmp_path):
    nested = {"image_processor": STATISTICS | {"do_normalize": False}, "processor_class": "SomeProcessor"}
    assert pixels(tmp_path, nested, file="processor_config.json") == [[0] * 3, [1] * 3]
    assert pixels(tmp_path, STATISTICS)[1] == pytest.approx([4.5] * 3)  # the file of its own comes first


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels(tmp_path, channels):
    mean, std = normalisation_by_name(MODEL, str(tmp_path), channels)  # nothing is known: ImageNet's grey
    assert mean == (pytest.approx(sum(IMAGENET_MEAN) / 3),) * channels
    assert std == (pytest.approx(sum(IMAGENET_STD) / 3),) * channels
    assert pixels(tmp_path, {"image_mean": 0.5, "image_std": [0.25]}, channels) == [[-2] * channels, [2] * channels]
    each = [0.1 * i for i in range(channels)]
    black, white = pixels(tmp_path, {"image_mean": each, "image_std": 0.5}, channels)
    assert black == pytest.approx([-2 * m for m in each]) and white == pytest.approx([2 - 2 * m for m in each])
    with pytest.raises(ValueError, match=f"each of the model's {channels} channels, got 3"):
        pixels(tmp_path, {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}, channels)


def timms(channels, **config):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, in_chans=channels)
    model.pretrained_cfg |= config
    return model


def test_timms_statistics():
    assert normalisation_by_name(timms(3, mean=(0.1,), std=0.5), "x") == ((0.1,) * 3, (0.5,) * 3)
    of_three = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 224, 224))
    mean, std = normalisation_by_name(timms(1, **of_three), "x", 1)  # of the architecture
    assert (mean, std) == ((pytest.approx(0.2),), (pytest.approx(0.5),))
    assert normalisation_by_name(timms(2, mean=(0.1, 0.2), std=(0.5, 0.6)), "x", 2) == ((0.1, 0.2), (0.5, 0.6))
    for change, message in (
        (dict(std=(0.5, 0.0, 0.5)), "pretrained_cfg of model x: std must be a finite number above 0"),
        (dict(mean=(0.1, 0.2)), "pretrained_cfg of model x: the mean must have one value or one for each of .* 3"),
        (dict(mean=(float("nan"),) * 3), "mean must be a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            normalisation_by_name(timms(3, **change), "x")


def test_mean_and_deviation_given_in_python():
    scan = Scan(torch.rand(2, 8, 8), np.eye(4), "SPR")
    given = prepare(scan, (4, 4), Window(0, 1), mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(given.pixels[0, 0], (given.image - 0.5) / 0.25)
    assert given.pixels.shape == (1, 1, 2, 8, 8)
    for mean, std in (
        ((0.5,), (0.0,)),
        ((0.5,), (float("nan"),)),
        ((float("inf"),), (1.0,)),
        ((0.5, 0.5), (1.0,)),
        ((), ()),
    ):
        with pytest.raises(ValueError, match="mean .*std .*, got"):
            prepare(scan, (4, 4), Window(0, 1), mean=mean, std=std)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    BY_NAME["hf-dinov3"].make(num_hidden_layers=2).save_pretrained(tmp_path / "m")
    write_nifti(tmp_path / "a.nii", NOISE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_follow_it(folder, monkeypatch):
    (folder / "m" / "preprocessor_config.json").write_text(json.dumps(STATISTICS | {"do_normalize": False}))
    assert main(["features", "a.nii", "--model", "m", "--out", "f.npz", "--pool"]) == 0
    metadata = load_metadata("f.npz")
    assert (metadata["mean"], metadata["std"]) == ([0] * 3, [1] * 3)
    seen = []
    monkeypatch.setattr(demo, "_measure", lambda model, given: seen.append(given) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["demo", "--volume", "a.nii", "--model", "m", "--size", "32", "--out", "p.png"])
    assert 0 <= seen[0].min() < 0.3 and 0.7 < seen[0].max() <= 1  # with ImageNet's from -2 to 2


@pytest.mark.parametrize("command", ["features", "demo"])
@pytest.mark.parametrize("kind", ["broken", "std 0", "unknown"])
def test_the_commands_refuse_in_one_line(folder, capsys, monkeypatch, command, kind):
    settings = REFUSED[kind][0]
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "m" / "preprocessor_config.json").write_text(text)
    monkeypatch.setattr("planecycle_fast.scans.extraction.load_scan", lambda *_: pytest.fail("a scan was read"))
    rest = {"features": ["a.nii", "--out", "f.npz"], "demo": ["--volume", "a.nii", "--out", "p.png", "--size", "32"]}
    assert main([command, "--model", "m", *rest[command]]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "preprocessor_config.json" in err, err
    assert sorted(p.name for p in folder.iterdir()) == ["a.nii", "m"]


def test_load_model_does_not_need_it(folder):
    (folder / "m" / "preprocessor_config.json").write_text("{")
    assert load_model("m")[1] == "weights from m"
