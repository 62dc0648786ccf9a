"""Models that hold one that can be lifted, CLIP's and SigLIP's image towers, by every command and in Python."""

import numpy as np
import pytest
import torch
import transformers as tr
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.hosts import supported_parts
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.weights.load import load_model, model_without_weights
from planecycle_fast.weights.loaded_keys import part_of

from ..host_models import BY_NAME, randomise
from ..saved_models import edit

SIZES = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48)
IMAGE = SIZES | dict(image_size=32, patch_size=16)
TEXT = SIZES | dict(vocab_size=99, bos_token_id=0, eos_token_id=1)


def dual(text=TEXT, image=IMAGE):
    return dict(text_config=text, vision_config=image)


def vit_and_bert():
    text = tr.BertModel(tr.BertConfig(**SIZES, vocab_size=99))
    return tr.VisionTextDualEncoderModel(vision_model=tr.ViTModel(tr.ViTConfig(**IMAGE)), text_model=text)


MODELS = {
    "CLIP": lambda: tr.CLIPModel(tr.CLIPConfig(**dual())),
    "SigLIP": lambda: tr.SiglipModel(tr.SiglipConfig(**dual())),
    "CLIP's image tower with a head": lambda: tr.CLIPForImageClassification(tr.CLIPConfig(**dual())),
    "SigLIP's image tower with a head": lambda: tr.SiglipForImageClassification(tr.SiglipConfig(**dual())),
    "ViT and BERT": vit_and_bert,
}


def saved(kind, folder):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_part_is_taken(tmp_path, kind):
    model = saved(kind, tmp_path)
    loaded, note = load_model(str(tmp_path))
    assert note == f"vision_model of the weights from {tmp_path}" and not loaded.training
    bare = model_without_weights(str(tmp_path))
    assert type(bare) is type(loaded) is type(model.vision_model) and all(p.is_meta for p in bare.parameters())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=images).last_hidden_state
        assert torch.equal(loaded(pixel_values=images).last_hidden_state, expected)
    # Its own weights must all be there; those of the rest need not be.
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if ".1." not in k or "vision_model" not in k})
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=r"lacking 1\d \(vision_model\.[^)]*\.1\.[^)]*\)$"):
            load(str(tmp_path))


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_the_commands(tmp_path, monkeypatch, capfd, kind):
    model = saved(kind, tmp_path / "m")
    scan = np.random.default_rng(0).random((2, 32, 32)).astype(np.float32)
    np.save(tmp_path / "a.npy", scan)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    settings = ["--mode", "slice2d", "--window", "0,1"]
    assert main(["features", "a.npy", "--out", "f.npz", "--model", "m", *settings]) == 0
    assert main(["verify", "m", "--volume", "1x2x32", "--device", "cpu"]) == 0
    assert main(["plan", "m", "--volume", "1x2x32", "--modes", "slice2d", "--gpu", "h100"]) == 0
    assert main(["demo", "--volume", "a.npy", "--out", "p.png", "--size", "32", "--model", "m"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.count("vision_model of the weights from m") == 2  # of verify and demo
    tensors, metadata = load_features("f.npz")
    assert metadata["weights"] == "vision_model of the weights from m"
    tower = model.vision_model
    with torch.no_grad():  # by hand
        hidden = tower(pixel_values=torch.from_numpy(scan)[:, None].expand(-1, 3, -1, -1)).last_hidden_state
    patches = hidden[:, -4:].reshape(2, 2, 2, 32)
    torch.testing.assert_close(tensors["patches"], patches, rtol=1e-4, atol=1e-4)


def test_none_or_several_are_refused_as_they_are(tmp_path, monkeypatch, capsys):
    one, two = (BY_NAME["hf-dinov3"].make(num_hidden_layers=1) for _ in range(2))
    both = nn.ModuleDict({"left": one, "right": nn.ModuleDict({"eye": two})})
    assert supported_parts(both) == ["left", "right.eye"] and part_of(both) == ""
    assert supported_parts(one) == [""] and part_of(one) == "" and supported_parts(nn.ReLU()) == []
    assert part_of(nn.ModuleDict({"right": nn.ModuleDict({"eye": two})})) == "right.eye"
    with pytest.raises(ValueError, match="model.left and model.right.eye are supported: lift one of them"):
        pcf.lift(both)
    tr.DeiTModel(tr.DeiTConfig(**IMAGE)).save_pretrained(tmp_path / "m")
    np.save(tmp_path / "a.npy", np.ones((2, 32, 32)))
    monkeypatch.chdir(tmp_path)
    for words in (
        ["features", "a.npy", "--model", "m", "--out", "f.npz"],
        ["plan", "m", "--volume", "1x2x32", "--gpu", "h100"],
    ):
        assert main(words) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "model must be of a supported class, got " in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "m"]
