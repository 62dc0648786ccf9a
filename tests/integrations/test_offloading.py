"""accelerate's cpu_offload, disk_offload and device_map, of lifted models and of 2D models before they are lifted."""

import copy

import pytest
import torch

import planecycle_fast as pcf
from planecycle_fast.hosts.placement import running_place, same_device
from planecycle_fast.runtime import native

from ..host_models import BY_NAME, EVERY_HOST, GRID

accelerate = pytest.importorskip("accelerate", reason="needs accelerate, of the extra integrations")
hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate, of the extra integrations")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys")


def device_map(model, devices):
    """Blocks in turn on these devices, everything else on the first, the root's own tensors on the last."""
    blocks, found = {id(block): i for i, block in enumerate(pcf.lift(model).adapter.blocks)}, {}

    def walk(module, prefix):
        for name, child in module._modules.items():
            if id(child) in blocks:
                found[prefix + name] = devices[blocks[id(child)] % len(devices)]
            elif child is not None and any(id(inner) in blocks for inner in child.modules()):
                walk(child, f"{prefix}{name}.")
            elif child is not None:
                found[prefix + name] = devices[0]
        tensors = {**module._parameters, **module._buffers}
        found.update({prefix + name: devices[-1] for name, tensor in tensors.items() if tensor is not None})

    walk(model, "")
    return found


def dispatched(model, tree, folder):
    """What is to be dispatched: the 2D model or the lifted one, with blocks on the CPU and the disk."""
    found = device_map(model, ["cpu", "disk"])
    return accelerate.dispatch_model(tree, found, main_device="cpu", offload_dir=folder, offload_buffers=True)


WAYS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(pcf.lift(model), CPU),
    "cpu with buffers": lambda model, folder: accelerate.cpu_offload(pcf.lift(model), CPU, offload_buffers=True),
    "cpu, then lifted": lambda model, folder: pcf.lift(accelerate.cpu_offload(model, CPU, offload_buffers=True)),
    "disk": lambda model, folder: accelerate.disk_offload(pcf.lift(model), folder, CPU),
    "device_map": lambda model, folder: dispatched(model, pcf.lift(model), folder),
    "device_map, then lifted": lambda model, folder: pcf.lift(dispatched(model, model, folder)),
}
QUICK = ["hf-dinov3", "timm-rope-mixed"]  # the second has learned frequencies, which are read and not called
# Where a size is not the trained one transformers reads their positions without calling the module that holds them:
# there the 2D model fails as well.
AT_TRAINED_SIZE = ("hf-clip", "hf-clip-gelu", "hf-siglip", "hf-siglip-gelu")
HOSTS = [pytest.param(p.values[0], id=p.id, marks=() if p.id in QUICK else pytest.mark.full) for p in EVERY_HOST]


@pytest.mark.parametrize("host", HOSTS)
def test_offloaded_models(host, tmp_path):
    model, volume = host.make(), host.volume(1, grid=(4, 4) if host.name in AT_TRAINED_SIZE else GRID)
    with torch.no_grad():
        plain = pcf.lift(copy.deepcopy(model))
        expected, between = plain(volume), plain.intermediate(volume, [1, -1])
        try:
            maps = plain.attention_maps(volume, 2, patch=(0, 0, 0))
        except ValueError:  # attention that cannot be taken apart
            maps = None
        for way, offload in WAYS.items():
            (tmp_path / way).mkdir()
            lifted = offload(copy.deepcopy(model), str(tmp_path / way))
            assert any(p.device.type == "meta" for p in lifted.parameters()), way
            for _ in range(2):
                torch.testing.assert_close(lifted(volume), expected, rtol=0, atol=1e-5)
            for got, wanted in zip(lifted.intermediate(volume, [1, -1]), between, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
            if maps is not None:
                for got, wanted in zip(lifted.attention_maps(volume, 2, patch=(0, 0, 0)), maps, strict=True):
                    torch.testing.assert_close(got.patch, wanted.patch, rtol=0, atol=1e-6)
            assert any(p.device.type == "meta" for p in lifted.parameters()), f"{way}: weights have stayed"


def test_what_is_checked_is_where_modules_will_run():
    host = BY_NAME["hf-dinov3"]
    lifted = accelerate.cpu_offload(pcf.lift(host.make()), CPU)
    assert next(lifted.parameters()).device.type == "meta" and running_place(lifted) == (CPU, torch.float32)
    with pytest.raises(ValueError, match=r"volume must have the model's dtype, torch.float32, got torch.float64"):
        lifted(host.volume(1, dtype=torch.float64))
    embeddings = pcf.unlift(lifted).embeddings
    hooks.add_hook_to_module(embeddings, hooks.ModelHook(), append=True)  # several in a row: a SequentialHook
    assert running_place(lifted) == (CPU, torch.float32)
    bare = pcf.lift(host.make().to("meta"))  # taken away by nobody who would bring it back
    with pytest.raises(ValueError, match="volume must be on the model's device, meta, got cpu"):
        bare(host.volume(1))
    assert same_device(torch.device("cuda"), torch.device("cuda:1")) and not same_device(CPU, torch.device("meta"))


@pytest.mark.parametrize("way", ["cpu", "cpu, then lifted", "device_map"])
@pytest.mark.parametrize("name", ["hf-dinov3", "timm-dinov3-s"])
@torch.no_grad()
def test_windows_lists_and_scans_of_offloaded_models(name, way, tmp_path, capsys):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(1, depth=4)
    plain, lifted = pcf.lift(copy.deepcopy(model)), WAYS[way](model, str(tmp_path))
    slices = volume.shape[3:]
    for got, expected in [
        (pcf.sliding_window(lifted, volume, (2, *slices)), pcf.sliding_window(plain, volume, (2, *slices))),
        (pcf.map_volumes(lifted, [volume])[0], plain(volume)),
    ]:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    settings = dict(window=None, mean=(0.5,) * 3, std=(0.2,) * 3)
    given = pcf.prepare(torch.rand(2, 20, 20), lifted, **settings)
    assert torch.equal(given.pixels, pcf.prepare(given.image[:, :20, :20], plain, **settings).pixels)
    with pytest.raises(ValueError, match="max_memory must be left out for a model whose weights are offloaded"):
        pcf.sliding_window(lifted, volume, max_memory=2**30)
    lifted.report()
    assert way != "cpu" or not native.ready() or "rope: cpu" in capsys.readouterr().out  # not what runs on meta


@pytest.mark.parametrize("name", ["timm-dinov3-s", "timm-rope-mixed"])
def test_rows_go_where_a_block_is_and_tables_with_them(name):
    """A block whose weights are on another device, and a hook that moves what it is called with."""
    host = BY_NAME[name]
    lifted, seen = pcf.lift(host.make()), []
    for block in lifted.blocks[1:]:
        block.to("meta")

    def move(module, args):
        seen.append((args[0].residual.device.type, args[0].branch, args[0].scale))
        return pcf.Stream(args[0].residual.to("meta")), args[1]

    for block in lifted.blocks[1:]:
        block.register_forward_pre_hook(move)
    lifted.norm.to("meta")
    with torch.no_grad():
        assert lifted(host.volume(1)).patches.device.type == "meta"
    assert seen == [("cpu", None, None), *[("meta", None, None)] * (len(seen) - 1)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("first", ["lifted", "2D"])
@pytest.mark.parametrize("name", ["hf-dinov3", "timm-dinov3-s"])
def test_blocks_on_two_gpus(name, first, tmp_path):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(1)
    with torch.no_grad():
        plain = pcf.lift(copy.deepcopy(model).to("cuda:0"))
        expected, maps = plain(volume.to("cuda:0")), plain.attention_maps(volume.to("cuda:0"), 3)
        found = device_map(model, [0, 1]) | {n: 0 for n, _ in model.named_parameters(recurse=False)}
        lifted = pcf.lift(model) if first == "lifted" else None
        accelerate.dispatch_model(lifted if lifted is not None else model, found)
        lifted = lifted if lifted is not None else pcf.lift(model)
        assert {p.device.index for p in lifted.parameters()} == {0, 1}
        torch.testing.assert_close(lifted(volume.to("cuda:0")), expected, rtol=0, atol=1e-4)
        assert all(f.patches.device.index == 0 for f in lifted.intermediate(volume.to("cuda:0"), 3))
        for got, wanted in zip(lifted.attention_maps(volume.to("cuda:0"), 3), maps, strict=True):
            torch.testing.assert_close(got.cls, wanted.cls, rtol=0, atol=1e-4)
