"""Weights that are not the model's are refused, by every command and in Python: nothing runs on random ones."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as tr

import planecycle_fast as pcf
from planecycle_fast.commands.cli import main
from planecycle_fast.cost.planning import plan
from planecycle_fast.scans.extraction import digest_of_model
from planecycle_fast.weights.load import load_model, model_without_weights
from planecycle_fast.weights.loaded_keys import (
    BY_DESIGN,
    check_finite,
    check_keys,
    check_plain,
    keys_of_error,
)

from ..host_models import BY_NAME, randomise
from ..saved_models import HOSTS, cached, edit, saved, timms


def cut(tensor):  # to another shape
    return tensor[:-1]


FAULTS = {  # what is done to the checkpoint, and what the message says
    "module": (lambda s: {f"module.{k}": v for k, v in s.items()}, "strip the prefix 'module.' from its keys"),
    "deep prefix": (lambda s: {f"net.backbone.{k}": v for k, v in s.items()}, "strip the prefix 'net.backbone.'"),
    "no layer 1": (lambda s: {k: v for k, v in s.items() if ".1." not in k}, r"lacking 1\d \(.*layer\.1\..*, \.\.\.\)"),
    "one key": (lambda s: {k: v for k, v in s.items() if "cls_token" not in k}, r"lacking 1 \(embeddings.cls_token\)"),
    "one more": (lambda s: s | {"extra.weight": torch.ones(2)}, r"with unknown 1 \(extra.weight\)"),
    "shape": (
        lambda s: {k: cut(v) if "cls_token" not in k and "2.norm1" in k else v for k, v in s.items()},
        r"with other shapes for 2 \(.*norm1.bias \(63,\) for \(64,\)",
    ),
    "nothing": (lambda s: {"nothing": torch.ones(1)}, r"lacking \d+ \(embeddings.cls_token"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("host", HOSTS)
def test_hugging_face_folders(tmp_path, host, fault):
    saved(tmp_path, host)
    change, message = FAULTS[fault]
    edit(tmp_path, change)
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=message) as raised:
            load(str(tmp_path))
        assert str(raised.value).startswith(f"model {tmp_path} must have the weights of a ")
        assert "\n" not in str(raised.value)


def test_right_weights_pass_whatever_the_layout(tmp_path):
    kinds = {"one": {}, "shards": {"max_shard_size": "20KB"}}
    for kind, settings in kinds.items():
        model = saved(tmp_path / kind, **settings)
        loaded, note = load_model(str(tmp_path / kind))
        assert note == f"weights from {tmp_path / kind}"
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        bare = model_without_weights(str(tmp_path / kind))
        assert all(p.is_meta for p in bare.parameters()) and bare.state_dict().keys() == model.state_dict().keys()
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3


def of_torch(folder):
    """As pytorch_model.bin."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return state


def test_weights_of_torch_save(tmp_path):
    model = saved(tmp_path)
    state = of_torch(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(load_model(str(tmp_path))[0].parameters(), model.parameters()))
    assert all(p.is_meta for p in model_without_weights(str(tmp_path)).parameters())
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match="strip the prefix 'module.'"):
            load(str(tmp_path))


def test_shards_that_lack_a_layer(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = {key: file for key, file in index["weight_map"].items() if ".1." in key}
    for file in sorted(set(index["weight_map"].values())):
        state = safetensors.torch.load_file(tmp_path / file)
        left = {k: v for k, v in state.items() if k not in gone}
        safetensors.torch.save_file(left, tmp_path / file, metadata={"format": "pt"})
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if k not in gone}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=rf"lacking {len(gone)} \("):
            load(str(tmp_path))


def test_the_hubs_cache(tmp_path, monkeypatch):
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        if hasattr(sys.modules[module], "HF_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = saved(tmp_path / "mine")
    snapshot = cached(tmp_path / "cache", "some/vit", tmp_path / "mine")
    loaded, note = load_model("some/vit")
    assert note == "weights of some/vit from the local cache"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    edit(snapshot, FAULTS["module"][0])
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match="model some/vit must have the weights .*strip the prefix 'module.'"):
            load("some/vit")


def test_a_model_with_a_head_is_its_backbone(tmp_path):
    config = tr.Dinov2Config(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=2, image_size=56, patch_size=14, num_labels=7
    )
    with_head = tr.Dinov2ForImageClassification(config).eval()
    randomise(with_head)
    with_head.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert type(loaded).__name__ == "Dinov2Model"
    for key, value in with_head.dinov2.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert model_without_weights(str(tmp_path)) is not None
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if "mask_token" not in k})  # of training alone
    load_model(str(tmp_path))
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if "layernorm" not in k})
    with pytest.raises(ValueError, match=r"lacking 2 \(layernorm.bias, layernorm.weight\)$"):
        load_model(str(tmp_path))


def with_heads():
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, image_size=32)
    sizes["patch_size"] = 16
    mae = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_intermediate_size=32)
    return {
        "ViTModel": tr.ViTForImageClassification(tr.ViTConfig(**sizes)),
        "ViTModel of masked images": tr.ViTForMaskedImageModeling(tr.ViTConfig(**sizes)),
        "ViTMAEModel": tr.ViTMAEForPreTraining(tr.ViTMAEConfig(decoder_num_attention_heads=2, **mae, **sizes)),
        "IJepaModel": tr.IJepaForImageClassification(tr.IJepaConfig(**sizes)),
        "CLIPVisionModel": tr.CLIPVisionModelWithProjection(tr.CLIPVisionConfig(**sizes)),
        "Dinov2Model": tr.Dinov2Backbone(tr.Dinov2Config(mlp_ratio=2, **sizes)),
        "DINOv3ViTModel": tr.DINOv3ViTBackbone(tr.DINOv3ViTConfig(**sizes)),
    }


@pytest.mark.parametrize("kind", with_heads())
def test_what_other_heads_have_or_lack_is_by_design(tmp_path, kind):
    with_heads()[kind].save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded, again = (load_model(str(tmp_path))[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded).__name__ == kind.split()[0]
    assert digest_of_model(loaded) == digest_of_model(again)  # by which a second run knows the first
    model_without_weights(str(tmp_path))
    edit(tmp_path, lambda s: {k: v for k, v in s.items() if ".1." not in k})
    with pytest.raises(ValueError, match=r"got a checkpoint lacking 1\d \([^)]*\.1\.[^)]*\)$"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("source", ["timm-dinov3-s", "facebook-stand-in"])
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_weights_of_another_implementation_name_the_way(tmp_path, source, prefix):
    saved(tmp_path)
    foreign = BY_NAME[source].make(depth=3).state_dict()
    edit(tmp_path, lambda s: {prefix + k: v.clone() for k, v in foreign.items()})
    with pytest.raises(ValueError, match=r"its keys are those of (timm|dinov3): pcf.convert_state_dict\(") as raised:
        load_model(str(tmp_path))
    assert (f"prefix={prefix!r}" in str(raised.value)) == bool(prefix)


DAMAGED = {
    "no header": lambda f: (f / "model.safetensors").write_bytes(b"hello" * 99),
    "half": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no configuration": lambda f: (f / "config.json").unlink(),
    "configuration": lambda f: (f / "config.json").write_text('{"model_type": '),
    "unknown kind": lambda f: (f / "config.json").write_text('{"model_type": "dinov9"}'),
    "a pickle": lambda f: of_torch(f) and (f / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n."),
    "a shard gone": lambda f: (sharded(f), min(f.glob("model-*")).unlink()),
    "index": lambda f: (sharded(f), (f / INDEX).write_text("{")),
    "empty index": lambda f: (sharded(f), (f / INDEX).write_text("{}")),
    "list for an index": lambda f: (sharded(f), (f / INDEX).write_text('{"weight_map": []}')),
    "bitsandbytes": lambda f: quantised(f, quant_method="bitsandbytes", load_in_8bit=True),
    "GPTQ": lambda f: quantised(f, quant_method="gptq", bits=4),
    "torchao": lambda f: quantised(f, quant_method="torchao", quant_type="int8wo"),
}


INDEX = "model.safetensors.index.json"


def sharded(folder):
    saved(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def quantised(folder, **settings):
    """By a library that is not installed, or with other weights than these."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_folders_are_one_line(tmp_path, monkeypatch, capsys, kind):
    saved(tmp_path / "m")
    DAMAGED[kind](tmp_path / "m")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(2, 16, 16)))
    monkeypatch.chdir(tmp_path)
    assert main(["features", "a.npy", "--model", "m", "--out", "f.npz"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("planecycle-fast: model m "), err
    assert ("index" not in kind) or INDEX in err
    assert "torch.load" not in err  # whose advice is to run what is in the file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "m"]


COMMANDS = {
    "features": ["features", "a.npy", "--out", "f.npz", "--model", "m"],
    "demo": ["demo", "--volume", "a.npy", "--out", "p.png", "--size", "32", "--model", "m"],
    "verify": ["verify", "m", "--volume", "1x2x32", "--device", "cpu"],
    "plan": ["plan", "m", "--volume", "1x2x32", "--modes", "slice2d", "--gpu", "h100"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", ["module", "no layer 1"])
def test_every_command_refuses(tmp_path, monkeypatch, capfd, command, fault):
    saved(tmp_path / "m")
    edit(tmp_path / "m", FAULTS[fault][0])
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(2, 32, 32)))
    monkeypatch.chdir(tmp_path)
    assert main(COMMANDS[command]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("planecycle-fast: model m must have the weights of a DINOv3ViTModel, got a checkpoint lack")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "m"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    saved(tmp_path)

    def spoil(state):
        state["layer.1.norm2.weight"][3] = value
        return state

    edit(tmp_path, spoil)
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 64 values of .*1.norm2.weight \(torch.float32\)$"):
        load_model(str(tmp_path))
    model = torch.nn.BatchNorm2d(2)
    model.running_var.fill_(value)
    model.weight.data.fill_(value)
    with pytest.raises(ValueError, match="model x must have finite weights, .* 2 of 2 values of weight .* in 1 more"):
        check_finite("x", model)


def test_names_that_are_no_folders(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="must be a folder, got a file: weights alone do not tell what model"):
        load_model(str(file))
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(ValueError, match=r"must be a folder that exists, or a known name"):
            load_model(name)
    (tmp_path / "config.json").write_text('{"architecture": "vit_of_tomorrow"}')
    with pytest.raises(ValueError, match="must be of an architecture of timm .*, got 'vit_of_tomorrow'"):
        load_model(str(tmp_path))


def test_what_may_be_missing_is_a_short_list():
    assert set(BY_DESIGN) >= {"dinov2", "dinov2_with_registers", "dinov3_vit", "timm"}
    assert all(len(missing) + len(unexpected) <= 8 for missing, unexpected in BY_DESIGN.values())
    model = BY_NAME["timm-dinov3-s"].make()
    check_keys("x", model, ["head.weight"], ["head.bias"])
    with pytest.raises(ValueError, match=r"with unknown 4 \(a.2, a.10, b, \.\.\.\)"):
        check_keys("x", model, [], ["c", "b", "a.10", "a.2"])


def test_keys_of_torchs_own_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict({"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3), "x.y": torch.ones(1)})
    assert keys_of_error(raised.value) == (["1.weight", "1.bias"], ["x.y"], [("0.weight", (3, 5), (3, 2))])
    assert keys_of_error(RuntimeError("out of memory")) is None


def test_the_helpers_of_python(tmp_path):
    model = saved(tmp_path / "m")
    lifted = pcf.lift(pcf.load_model(str(tmp_path / "m"))[0])
    volume = torch.randn(1, 3, 2, 32, 32)
    assert torch.equal(lifted(volume).patches, pcf.lift(model)(volume).patches)
    edit(tmp_path / "m", FAULTS["module"][0])
    with pytest.raises(ValueError, match="strip the prefix"):
        pcf.load_model(str(tmp_path / "m"))
    with pytest.raises(ValueError, match="strip the prefix"):
        plan(str(tmp_path / "m"), (1, 3, 2, 32, 32))
    state = BY_NAME["timm-dinov3-s"].make(depth=3).state_dict()
    with pytest.raises(ValueError, match="needs 12 of them|that needs"):
        short = {k: v for k, v in state.items() if not k.startswith("blocks.1.")}
        pcf.convert_state_dict(short, model=model)


@pytest.mark.parametrize("error", [MemoryError(), ImportError("DLL load failed"), RuntimeError("out of\nmemory")])
def test_what_stops_a_model_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fail(name):
        raise error

    np.save(tmp_path / "a.npy", np.ones((2, 32, 32)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("planecycle_fast.weights.load._load", fail)
    assert main(["features", "a.npy", "--model", "m", "--out", "f.npz"]) == 1
    text = "MemoryError" if isinstance(error, MemoryError) else f"model m cannot be loaded: {str(error).split()[0]}"
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"planecycle-fast: {text}") and err.count("\n") == 1


def narrow(dtype):
    def change(state):
        return {k: (v * 10).to(dtype) if v.ndim == 2 and "mlp" in k else v for k, v in state.items()}

    return change


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("layout", ["hugging face", "bin", "timm"])
def test_weights_of_8_bits_without_their_scales(tmp_path, layout, dtype):
    """Loaders make float32 of them as they are."""
    folder = tmp_path / "model"
    if layout == "timm":
        timms(folder, change=narrow(dtype))
    else:
        saved(folder)
        edit(folder, narrow(dtype))
    if layout == "bin":
        of_torch(folder)
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match=r"must have weights of 16 bits or more, .* got .*mlp.* and \d more"):
            load(str(folder))


def test_other_tensors_of_integers_are_no_weights(tmp_path):
    """Such as the places of CLIP's positions, and counters."""
    saved(tmp_path)
    safetensors.torch.save_file(
        {
            "ids": torch.arange(4)[None],
            "flags": torch.ones(2, 2, dtype=torch.bool),
            "steps": torch.ones(3).to(torch.int8),
        },
        tmp_path / "others.safetensors",
    )
    check_plain("it", [str(tmp_path / "others.safetensors"), str(tmp_path / "model.safetensors")])


def test_no_name_is_not_the_working_directory(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    for load in (load_model, model_without_weights):
        with pytest.raises(ValueError, match="model must be a folder or a name, got an empty one"):
            load("")
