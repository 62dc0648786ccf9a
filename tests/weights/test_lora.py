"""Folders of PEFT as `--model`: the model that an adapter is for, with the adapter in it, or one line."""

import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as tr

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.optional import MissingPackageError
from planecycle_fast.scans.feature_files import load_features
from planecycle_fast.weights.load import load_model, model_without_weights
from planecycle_fast.weights.normalisation import normalisation_by_name

from ..host_models import BY_NAME
from ..saved_models import timms

peft = pytest.importorskip("peft", reason="reads folders of PEFT")
TARGETS = ["q_proj", "v_proj"]


def adapted(folder, dtype=torch.float32, base="base", **settings):
    """A base model and an adapter of it, in `folder`; the model with both, not merged."""
    torch.manual_seed(1)
    host = BY_NAME["hf-dinov3"].make(num_hidden_layers=2).to(dtype)
    host.save_pretrained(folder / base)
    host = load_model(str(folder / base))[0]
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": TARGETS} | settings))
    model = peft.get_peft_model(host, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def edit(folder, **changes):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


KINDS = {
    "LoRA": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "MLP and a norm": {"target_modules": ["up_proj", "down_proj"], "modules_to_save": ["norm2"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_in_the_model(tmp_path, kind):
    theirs = adapted(tmp_path, **KINDS[kind])
    model, note = load_model(str(tmp_path / "adapter"))
    assert note == f"adapter {tmp_path / 'adapter'} merged into weights from {tmp_path / 'base'}"
    assert type(model).__name__ == "DINOv3ViTModel" and not model.training
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        got, expected = model(images).last_hidden_state, theirs(pixel_values=images).last_hidden_state
        plain = load_model(str(tmp_path / "base"))[0](images).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.05


def with_head(kind):
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, image_size=32)
    if kind == "ViT":
        return tr.ViTForImageClassification(tr.ViTConfig(num_labels=5, patch_size=16, **sizes))
    if kind == "DINOv2":
        return tr.Dinov2ForImageClassification(tr.Dinov2Config(num_labels=5, patch_size=16, **sizes))
    text = sizes | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    return tr.CLIPModel(tr.CLIPConfig(text_config=text, vision_config=sizes | {"patch_size": 16}))


OF_MORE = {  # what was adapted, the part of it that is lifted, and what else
    "ViT": ("vit", {"modules_to_save": ["classifier"]}),
    "ViT, every setting by name": (
        "vit",
        {"target_modules": r"vit\..*(q_proj|query)", "alpha_pattern": {r"vit\..*\.0\..*": 99}, "bias": "all"},
    ),
    "DINOv2": ("dinov2", {"modules_to_save": ["layernorm", "classifier"], "use_dora": True}),
    "CLIP": ("vision_model", {}),
}


@pytest.mark.parametrize("kind", OF_MORE)
def test_adapters_of_models_that_hold_the_one_lifted(tmp_path, kind):
    part, settings = OF_MORE[kind]
    torch.manual_seed(1)
    whole = with_head(kind.split(",")[0]).eval()
    whole.save_pretrained(tmp_path / "base")
    whole = type(whole).from_pretrained(tmp_path / "base").eval()
    names = {name.rsplit(".", 1)[-1] for name, _ in whole.named_modules()}
    targets = TARGETS if "q_proj" in names else ["query", "value"]
    model = peft.get_peft_model(whole, peft.LoraConfig(**({"r": 4, "target_modules": targets} | settings)))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    loaded, note = load_model(str(tmp_path / "adapter"))
    assert note.endswith(f"adapter {tmp_path / 'adapter'} merged into weights from {tmp_path / 'base'}")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = getattr(model.eval().base_model.model, part)(pixel_values=images).last_hidden_state
        plain = load_model(str(tmp_path / "base"))[0](pixel_values=images).last_hidden_state
        got = loaded(pixel_values=images).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.05
    weights(lambda s: {k: v for k, v in s.items() if ".1." not in k or "lora_" not in k})(tmp_path)
    with pytest.raises(ValueError, match=r"adapter .* lacking and 0 unknown, .*\.1\."):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_of_a_timm_model_with_a_head(tmp_path):
    whole = timms(tmp_path / "base", "vit_small_patch16_224", num_classes=5)
    model = peft.get_peft_model(whole, peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["norm", "head"]))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path, base_model_name_or_path="base")  # beside it; PEFT does not know timm's
    loaded, _ = load_model(str(tmp_path / "adapter"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model.eval().base_model.model.forward_features(images)
        torch.testing.assert_close(loaded.forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_16_bits_are_merged_in_float32(tmp_path):
    theirs = adapted(tmp_path, torch.bfloat16).float()
    images = torch.randn(1, 3, 32, 32)
    model, _ = load_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = theirs(pixel_values=images).last_hidden_state
        torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_the_commands(tmp_path, monkeypatch, capsys):
    theirs = adapted(tmp_path)
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((2, 32, 32)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    edit(tmp_path, base_model_name_or_path="base")  # as one writes it
    assert main(["features", "a.npy", "--model", "adapter", "--out", "f.npz", "--window", "0,1"]) == 0
    tensors, metadata = load_features("f.npz")
    assert metadata["model"] == "adapter" and metadata["weights"] == "adapter adapter merged into weights from base"
    assert metadata["mean"] == [0, 0, 0]  # of the base model, as the adapter's folder says nothing
    volume = torch.from_numpy(np.load("a.npy")).expand(1, 3, -1, -1, -1)
    with torch.no_grad():
        expected = pcf.lift(theirs.get_base_model())(volume)
    torch.testing.assert_close(tensors["patches"], expected.patches[0], rtol=1e-4, atol=1e-4)
    assert main(["verify", "adapter", "--volume", "1x2x32", "--device", "cpu"]) == 0
    assert main(["plan", "adapter", "--volume", "1x2x32", "--modes", "slice2d", "--gpu", "h100"]) == 0
    capsys.readouterr()
    assert model_without_weights("adapter").config.num_hidden_layers == 2
    (tmp_path / "adapter" / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.25}')
    assert normalisation_by_name(load_model("adapter")[0], "adapter") == ((0.5,) * 3, (0.25,) * 3)


def test_a_folder_that_was_moved_with_its_base(tmp_path):
    adapted(tmp_path / "first")
    edit(tmp_path / "first", base_model_name_or_path="base")
    shutil.move(tmp_path / "first", tmp_path / "second")
    assert load_model(str(tmp_path / "second" / "adapter"))[1].endswith(f"weights from {tmp_path / 'second' / 'base'}")


def weights(change):
    def edited(folder):
        file = folder / "adapter" / "adapter_model.safetensors"
        state = {k: v.contiguous() for k, v in change(safetensors.torch.load_file(file)).items()}
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})

    return edited


INTO = "adapter .* cannot be put into its model: "
CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
REFUSED = {
    "base gone": (lambda f: shutil.rmtree(f / "base"), "base must be a folder that exists, or a known name$"),
    "base itself": (lambda f: edit(f, base_model_name_or_path="adapter"), "cannot be loaded: maximum recursion"),
    "base not cached": (
        lambda f: edit(f, base_model_name_or_path="some/vit"),
        "some/vit is not in the local cache, no",
    ),
    "base random": (lambda f: edit(f, base_model_name_or_path="vit_tiny_patch16_224"), "can be found, got RANDOM"),
    "no base": (
        lambda f: edit(f, base_model_name_or_path=None),
        "must name the model .* base_model_name_or_path, got None",
    ),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json must be readable JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), INTO),
    "damaged": (lambda f: (f / WEIGHTS).write_bytes(b"hello" * 9), INTO),
    "other modules": (lambda f: edit(f, target_modules=["query"]), f"{INTO}Target modules .*query"),
    "a prefix": (weights(lambda s: {f"module.{k}": v for k, v in s.items()}), "8 lacking and 8 unknown, "),
    "no layer 1": (weights(lambda s: {k: v for k, v in s.items() if ".1." not in k}), "4 lacking and 0 unknown, "),
    "a saved norm gone": (
        weights(lambda s: {k: v for k, v in s.items() if "norm2" not in k}),
        f"{INTO}.*norm2",
    ),
    "another rank": (lambda f: edit(f, r=5), f"{INTO}.*size mismatch"),
    "not finite": (weights(lambda s: {k: v * float("nan") for k, v in s.items()}), f"{INTO}NaNs detected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, monkeypatch, capsys, kind):
    change, message = REFUSED[kind]
    adapted(tmp_path, modules_to_save=["norm2"] if "norm" in kind else None)
    change(tmp_path)
    np.save(tmp_path / "a.npy", np.ones((2, 32, 32)))
    monkeypatch.chdir(tmp_path)
    assert main(["features", "a.npy", "--model", "adapter", "--out", "f.npz", "--random-weights"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not (tmp_path / "f.npz").exists(), err
    with pytest.raises(ValueError, match=message) as raised:
        load_model("adapter")
    assert err == f"planecycle-fast: {raised.value}\n"


def test_without_peft(tmp_path, monkeypatch):
    adapted(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"'peft' is not installed; .* pip install 'planecycle-fast\[lora\]'"):
        load_model(str(tmp_path / "adapter"))


def test_adapters_that_change_no_weights(tmp_path):
    host = BY_NAME["hf-dinov3"].make(num_hidden_layers=2)
    host.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 2, "token_dim": 64,
              "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1,
              "base_model_name_or_path": str(tmp_path / "base")}  # fmt: skip
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter .* cannot be put into its model: "):
        load_model(str(tmp_path / "adapter"))
