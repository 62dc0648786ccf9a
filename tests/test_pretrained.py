"""save_pretrained and from_pretrained: what comes back, what the libraries read, what is refused, no half folders."""

import json
import os
import shutil

import pytest
import timm
import torch
import transformers as tr

import planecycle_fast as pcf
from planecycle_fast import pretrained
from planecycle_fast.commands.cli import main

from .host_models import BY_NAME
from .saved_models import cached, timms
from .scan_writers import NOISE, write_nifti
from .toy import ToyAdapter, ToyViT

SETTINGS = dict(cycle_order=("HW", "DH", "DHW"), pool_method="PCm", globals_at="plane")
COME_BACK = ["hf-dinov3", "hf-dinov2", "hf-dinov2-registers", "hf-clip", "hf-siglip", "hf-mae", "hf-ijepa", "hf-vit"]


def equal(a, b):
    assert [t is None for t in a] == [t is None for t in b]
    assert all([torch.equal(x, y) for x, y in zip(a, b) if x is not None])


@pytest.mark.parametrize("name", COME_BACK)
@torch.no_grad()
def test_hugging_face_models_come_back(tmp_path, name, capfd):
    host = BY_NAME[name]
    model, volume = host.make(num_hidden_layers=2), host.volume(depth=3)
    depth = {} if host.rope else {"depth_position": "sincos"}
    lifted = pcf.lift(model, **SETTINGS, **depth)
    lifted.save_pretrained(tmp_path / "new" / "folder")
    back = pcf.from_pretrained(tmp_path / "new" / "folder")
    assert "shards" not in capfd.readouterr().err  # no bars
    for setting in ("mode", "cycle_order", "pool_method", "globals_at", "depth_position"):
        assert getattr(back, setting) == getattr(lifted, setting)
    equal(back(volume), lifted(volume))
    plain = tr.AutoModel.from_pretrained(tmp_path / "new" / "folder").eval()
    assert type(plain) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[key], tensor)
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["folder"]


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
@torch.no_grad()
def test_timm_models_come_back(tmp_path, name):
    patch = int(name.split("patch")[1][:2])
    sizes = {} if patch == 16 else {"img_size": 56}
    given = timms(tmp_path / "given", name, **sizes)
    args = dict(depth=3, embed_dim=64, num_heads=2) | sizes
    lifted = pcf.from_pretrained(tmp_path / "given", mode="slice2d")
    equal_to = pcf.lift(given, mode="slice2d")
    volume = torch.randn(1, 3, 2, 4 * patch, 4 * patch)
    equal(lifted(volume), equal_to(volume))
    lifted.save_pretrained(tmp_path / "again", model_args=args)
    back = pcf.from_pretrained(tmp_path / "again")
    assert back.mode == "slice2d"
    equal(back(volume), lifted(volume))
    plain = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True, num_classes=0).eval()
    assert all([torch.equal(t, plain.state_dict()[key]) for key, t in pcf.unlift(lifted).state_dict().items()])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]


def test_what_is_given_wins_over_what_is_recorded(tmp_path):
    host = BY_NAME["hf-dinov2"]
    pcf.lift(host.make(), **SETTINGS, depth_position="rope1d").save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / pretrained.SETTINGS).read_text())
    assert recorded["cycle_order"] == ["HW", "DH", "DHW"] and recorded["planecycle_fast"] == pcf.__version__
    assert not {"backend", "attention", "strict", "adapter"} & set(recorded)
    back = pcf.from_pretrained(str(tmp_path), cycle_order="HW,DW", depth_position="none", backend="reference")
    assert (back.cycle_order, back.pool_method, back.globals_at) == (("HW", "DW"), "PCm", "plane")
    assert (back.depth_position, back.backend) == ("none", "reference")
    flat = pcf.from_pretrained(tmp_path, mode="flatten3d")
    assert (flat.mode, flat.cycle_order, flat.depth_position) == ("flatten3d", ("DHW",), "rope1d")
    flat.save_pretrained(tmp_path)  # into the folder it is from
    assert json.loads((tmp_path / pretrained.SETTINGS).read_text()).keys() == {
        "planecycle_fast", "mode", "depth_position"}  # fmt: skip
    cycle = pcf.from_pretrained(tmp_path, mode="planecycle")
    assert (cycle.cycle_order, cycle.globals_at) == (("HW", "DW", "DH", "HW"), "depth")


def test_a_folder_without_settings_and_the_cache(tmp_path, monkeypatch):
    host = BY_NAME["hf-dinov3"]
    model = host.make(num_hidden_layers=2)
    model.save_pretrained(tmp_path / "plain")
    assert pcf.from_pretrained(tmp_path / "plain").cycle_order == ("HW", "DW", "DH", "HW")
    pcf.lift(model, "slice2d").save_pretrained(tmp_path / "lifted")
    cached(tmp_path / "cache", "someone/lifted", tmp_path / "lifted")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert pcf.from_pretrained("someone/lifted").mode == "slice2d"


def test_random_weights_are_asked_for():
    with pytest.raises(ValueError, match="must have weights, got RANDOM.*random_weights=True takes it"):
        pcf.from_pretrained("vit_tiny_patch16_224")
    assert pcf.from_pretrained("vit_tiny_patch16_224", mode="slice2d", random_weights=True).mode == "slice2d"
    with pytest.raises(ValueError, match="model must be a known"):
        pcf.from_pretrained("no_such_model")
    with pytest.raises(ValueError, match="mode must be one of"):
        pcf.from_pretrained("vit_tiny_patch16_224", mode="3d", random_weights=True)


def test_pixels_stay_what_they_were(tmp_path):
    BY_NAME["hf-dinov2"].make().save_pretrained(tmp_path / "given")
    statistics = '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}\n'
    (tmp_path / "given" / "preprocessor_config.json").write_text(statistics)
    for lifted in (pcf.from_pretrained(tmp_path / "given"), pcf.lift(tr.AutoModel.from_pretrained(tmp_path / "given"))):
        lifted.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == statistics
    pcf.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == statistics
    pcf.lift(BY_NAME["hf-dinov2"].make()).save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "preprocessor_config.json").exists()


def test_weights_of_before_do_not_stay_beside_the_new_ones(tmp_path):
    host = BY_NAME["hf-dinov2"]
    lifted = pcf.lift(host.make())
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pytorch_model.bin").write_text("old")
    lifted.save_pretrained(tmp_path)
    assert not (tmp_path / "pytorch_model.bin").exists()
    lifted.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.json").exists()
    pcf.from_pretrained(tmp_path)
    lifted.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt", pretrained.SETTINGS]


@pytest.mark.parametrize("where", ["weights", "settings"])
def test_nothing_is_left_of_what_could_not_be_written(tmp_path, monkeypatch, where):
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make(), "slice2d")
    lifted.save_pretrained(tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    else:
        monkeypatch.setattr(pretrained.json, "dumps", full)
    with torch.no_grad():
        next(lifted.parameters()).add_(1)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            lifted.save_pretrained(tmp_path / folder)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["old"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


def lora(model):
    peft = pytest.importorskip("peft", reason="needs peft, extra lora")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "q_proj"]))
    return pcf.lift(model)


def compiled(model):
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    return pcf.lift(model)


def parametrised(model):
    linear = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    torch.nn.utils.parametrizations.weight_norm(linear)
    return pcf.lift(model)


def quantised(model):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, extra integrations")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return pcf.lift(model)


def spoilt(model):
    with torch.no_grad():
        model.layernorm.weight[3] = torch.nan
    return pcf.lift(model)


def shorter(model):
    del model.encoder.layer[-1]
    return pcf.lift(model)


REFUSED = {
    lora: "got an adapter of PEFT at .*merge it first",
    compiled: "must come back from a folder to be saved",
    parametrised: "must come back from a folder to be saved",
    quantised: "must have plain weights to be saved, got .*quantise after loading",
    spoilt: "must have finite weights.*layernorm.weight",
    shorter: "must come back from a folder to be saved",
}


def test_sharded_weights_are_gathered_first(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = BY_NAME["hf-dinov2"].make()
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="must have plain weights.*got DTensor.*gather what is sharded"):
            pcf.lift(model).save_pretrained(tmp_path)
        assert os.listdir(tmp_path) == []
        pcf.lift(model).save_pretrained(tmp_path, state_dict=dict(gathered))
    finally:
        torch.distributed.destroy_process_group()
    assert all([torch.equal(t, gathered[name]) for name, t in pcf.from_pretrained(tmp_path).state_dict().items()])


@pytest.mark.parametrize("change", REFUSED)
def test_models_that_would_not_come_back_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=REFUSED[change]) as error:
        change(BY_NAME["hf-dinov2"].make()).save_pretrained(tmp_path / "folder")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_other_classes_are_refused(tmp_path):
    for lifted, words in (
        (pcf.lift(BY_NAME["facebook-stand-in"].make()), "must be of Hugging Face or timm.*lifted.state_dict"),
        (pcf.lift(ToyViT(), adapter=ToyAdapter), "must be of Hugging Face or timm.*got ToyViT"),
        (pcf.lift(BY_NAME["hf-dinov2-backbone"].make()), "got a Dinov2Backbone, whose folder gives a Dinov2Model"),
    ):
        with pytest.raises(ValueError, match=words):
            lifted.save_pretrained(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_a_timm_model_with_a_head_and_for_one_size(tmp_path):
    lifted = pcf.lift(timm.create_model("vit_tiny_patch16_224", num_classes=10).eval(), "slice2d")
    lifted.save_pretrained(tmp_path)
    volume = torch.randn(1, 3, 1, 224, 224)
    with torch.no_grad():
        equal(pcf.from_pretrained(tmp_path)(volume), lifted(volume))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 10


@pytest.mark.parametrize("change", [dict(num_heads=4), dict(depth=2), dict(embed_dim=128)])
def test_timm_models_that_would_be_built_otherwise_are_refused(tmp_path, change):
    args = dict(depth=3, embed_dim=64, num_heads=2)
    lifted = pcf.lift(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **args).eval())
    with pytest.raises(ValueError, match="must come back from a folder"):
        lifted.save_pretrained(tmp_path / "folder", model_args=args | change)
    assert os.listdir(tmp_path) == []


def test_folders_and_options_that_are_refused(tmp_path):
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be one, or new, got the file"):
        lifted.save_pretrained(tmp_path / "file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must not hold an adapter of PEFT"):
        lifted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="folder must be one, or new, got no name"):
        lifted.save_pretrained("")
    for file in ("config.json", pretrained.SETTINGS):
        (tmp_path / "odd" / file).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"must not hold a folder in place of a file, got .*{file}"):
            lifted.save_pretrained(tmp_path / "odd")
        assert os.listdir(tmp_path / "odd") == [file]
        shutil.rmtree(tmp_path / "odd")
    with pytest.raises(ValueError, match="push_to_hub must be left out"):
        lifted.save_pretrained(tmp_path / "new", push_to_hub=True)
    with pytest.raises(ValueError, match="options must not give files of weights other names"):
        lifted.save_pretrained(tmp_path / "new", variant="fp16")
    lifted.save_pretrained(tmp_path / "new", is_main_process=False)  # as accelerate's users write it
    assert sorted(os.listdir(tmp_path)) == ["adapter", "file"]
    gathered = {name: tensor + 1 for name, tensor in lifted.state_dict().items()}  # of an FSDP model, for example
    lifted.save_pretrained(tmp_path / "new", state_dict=dict(gathered))
    for name, tensor in pcf.from_pretrained(tmp_path / "new").state_dict().items():
        assert torch.equal(tensor, gathered[name])


def test_a_folder_on_a_file_system_of_its_own(tmp_path, monkeypatch):
    """Nothing is renamed from outside of it, where it could not be, and its parent is left alone."""
    (tmp_path / "mount").mkdir()

    def replace(source, target, replace=os.replace):
        if not source.is_relative_to(tmp_path / "mount"):
            raise OSError(18, "Invalid cross-device link")
        assert os.listdir(tmp_path) == ["mount"]
        replace(source, target)

    monkeypatch.setattr(pretrained.os, "replace", replace)
    pcf.lift(BY_NAME["hf-dinov2"].make()).save_pretrained(tmp_path / "mount")
    assert sorted(os.listdir(tmp_path / "mount")) == ["config.json", "model.safetensors", pretrained.SETTINGS]


def test_an_adapter_of_one_s_own_is_asked_for(tmp_path):
    class Mine(type(pcf.lift(BY_NAME["hf-dinov2"].build()).adapter)):
        def norm(self, tokens):
            return tokens

    pcf.lift(BY_NAME["hf-dinov2"].make(), adapter=Mine).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lifted by an adapter of its own, Mine; give it"):
        pcf.from_pretrained(tmp_path)
    assert isinstance(pcf.from_pretrained(tmp_path, adapter=Mine).adapter, Mine)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "must have settings as JSON"),
        ("[1]", "must have settings of a lift"),
        ('{"planes": 3}', "must have settings of a lift.*got 'planes'"),
        ('{"mode": 3}', "must have a name as mode"),
        ('{"cycle_order": ["HW", 1]}', "must have a name as cycle_order"),
        ('{"mode": "4d"}', "settings of a lift in .*planecycle.json: mode must be one of"),
        ('{"cycle_order": ["HD"]}', "settings of a lift in .*planecycle.json: .*must be one of HW"),
        ('{"depth_position": "rope"}', "settings of a lift in .*planecycle.json: depth_position must be one of"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, text, match):
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make())
    lifted.save_pretrained(tmp_path)
    (tmp_path / pretrained.SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        pcf.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_features_of_the_command_follow_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lifted = pcf.lift(BY_NAME["hf-dinov2"].make(num_hidden_layers=2), **SETTINGS, depth_position="sincos")
    lifted.save_pretrained("model")
    write_nifti("a.nii", NOISE)
    assert main(["features", "a.nii", "--out", "a.safetensors", "--model", "model"]) == 0
    settings = pcf.load_features("a.safetensors")[1]["settings"]
    assert settings["cycle_order"] == ["HW", "DH", "DHW"] and settings["globals_at"] == "plane"
    assert settings["depth_position"] == "sincos" and settings["mode"] == "planecycle"
    more = ["--mode", "slice2d", "--depth-position", "none"]
    assert main(["features", "a.nii", "--out", "b.safetensors", "--model", "model", *more]) == 0
    settings = pcf.load_features("b.safetensors")[1]["settings"]
    assert settings["mode"] == "slice2d" and settings["depth_position"] == "none"
    assert main(["features", "a.nii", "--out", "a.safetensors", "--model", "model", *more]) == 1  # other features
    (tmp_path / "model" / pretrained.SETTINGS).write_text("{")
    capsys.readouterr()
    assert main(["features", "a.nii", "--out", "c.safetensors", "--model", "model"]) == 1
    assert capsys.readouterr().err.startswith("planecycle-fast: model model must have settings as JSON")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("command", ["verify", "export"])
def test_other_commands_follow_the_folder(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    model = BY_NAME["hf-dinov2"].make(num_hidden_layers=1)
    pcf.lift(model, "slice2d", depth_position="sincos").save_pretrained("model")
    arguments = [command, "model", "--volume", "1x2x28", *(["--to", "jit"] if command == "export" else [])]
    capsys.readouterr()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert ", slice2d, backend" in out if command == "verify" else "depth_position=sincos" in out
    more = ["--mode", "flatten3d", "--overwrite"] if command == "export" else ["--mode", "flatten3d"]
    assert main([*arguments, *more]) == 0 and "flatten3d" in capsys.readouterr().out
