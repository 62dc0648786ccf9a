"""Attention maps: against the scores of a plain transcription, on every plane, and what they cannot be made of."""

import pytest
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast import Stream
from planecycle_fast.geometry.planes import parse_cycle
from planecycle_fast.scans.viz import attention_picture, cut, heat_colours

from .. import naive
from ..host_models import BY_NAME, HOSTS

CYCLE = ("HW", "DW", "DH", "DHW")
SEQUENCE_OF = {"HW": 0, "DW": 1, "DH": 2}  # which of (d, h, w) says in which sequence a patch is


def recorded(host, model, volume, planes):
    """Softmax weights (N, heads, rows, rows) of each layer of the naive transcription, by the host's own blocks."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, *args, scale=None, **more):
        seen.append((q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1))
        return real(q, k, v, *args, scale=scale, **more)

    adapter = pcf.lift(model).adapter
    sizes = (volume.shape[2], volume.shape[3] // host.patch, volume.shape[4] // host.patch)
    tokens = adapter.embed(volume.transpose(1, 2).flatten(0, 1))
    tables = naive.make_rope(host.head_dim, host.normalize, dtype=volume.dtype) if host.rope else lambda *_: None
    blocks = []
    for i, block in enumerate(adapter.blocks):
        grid = parse_cycle(planes[i % len(planes)])[0].grid(sizes)
        blocks.append(lambda t, sincos, block=block, grid=grid: adapter.call_block(block, t, grid, sincos))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        for _ in naive.run(tokens, sizes, host.num_globals, blocks, planes, "PCg", "depth", tables):
            pass
    return seen, sizes


def by_hand(weights, row_of_query, plane, sizes, g, batch):
    """Weights of one query per sequence, gathered patch by patch."""
    depth, height, width = sizes
    out = torch.zeros(batch, weights.shape[1], *sizes, dtype=weights.dtype)
    per_volume = len(weights) // batch
    for b in range(batch):
        for d in range(depth):
            for h in range(height):
                for w in range(width):
                    place = {"HW": (d, h * width + w), "DW": (h, d * width + w), "DH": (w, d * height + h)}
                    sequence, row = place.get(plane, (0, (d * height + h) * width + w))
                    query = row_of_query(sequence)
                    if query is not None:
                        out[b, :, d, h, w] = weights[b * per_volume + sequence, :, query, g + row]
    return out


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov3", "hf-dinov2-registers", "timm-dinov3-l-qkvb"])
def test_maps_are_those_of_a_plain_transcription(name, backend):
    host = BY_NAME[name]
    model, volume, patch = host.make().double(), host.volume(dtype=torch.float64), (2, 1, 4)
    expected, sizes = recorded(host, model, volume, CYCLE)
    lifted = pcf.lift(model, cycle_order=CYCLE, backend=backend)
    with torch.no_grad():
        maps = lifted.attention_maps(volume, range(4), patch)
    d, h, w = patch
    _, height, width = sizes
    rows = {"HW": h * width + w, "DW": d * width + w, "DH": d * height + h, "DHW": (d * height + h) * width + w}
    assert [(m.layer, m.plane) for m in maps] == list(enumerate(CYCLE))
    for found, weights in zip(maps, expected):
        g, plane = host.num_globals, found.plane
        cls = by_hand(weights, lambda _: 0, plane, sizes, g, 2)
        torch.testing.assert_close(found.cls, cls, rtol=0, atol=1e-6)  # hosts' tables are float32
        own = patch[SEQUENCE_OF[plane]] if plane != "DHW" else 0
        row = g + rows[plane]
        chosen = by_hand(weights, lambda s, own=own, row=row: row if s == own else None, plane, sizes, g, 2)
        torch.testing.assert_close(found.patch, chosen, rtol=0, atol=1e-6)
        assert (chosen != 0).any() and ((chosen == 0).any() or plane == "DHW")


def test_slice2d_is_what_hugging_face_calls_attentions():
    host = BY_NAME["hf-dinov2"]
    model, volume = host.make(), host.volume(batch=1)
    lifted = pcf.lift(model, mode="slice2d")
    with torch.no_grad():
        maps = lifted.attention_maps(volume, 2)
        model.set_attn_implementation("eager")
        theirs = model(volume[0].transpose(0, 1), output_attentions=True).attentions  # (D, heads, rows, rows) each
    for found, weights in zip(maps, theirs[-2:]):
        expected = weights[:, :, 0, 1:].unflatten(-1, found.cls.shape[3:])
        torch.testing.assert_close(found.cls[0].transpose(0, 1), expected, rtol=1e-5, atol=1e-6)
        assert found.patch is None


@pytest.mark.parametrize("name", [host.name for host in HOSTS])
def test_every_host_has_maps(name):
    host = BY_NAME[name]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1)
    with torch.no_grad():
        [found] = lifted.attention_maps(volume, patch=(0, 0, 0))
        before = lifted(volume).patches
    with_cls = lifted.adapter.has_cls
    assert (found.cls is not None) == with_cls and found.patch.shape[2:] == before.shape[1:4]
    for weights in (found.cls, found.patch):
        assert weights is None or (weights.min() >= 0 and weights.max() <= 1)
    if not host.num_globals:  # nothing else to look at
        assert found.patch.sum((2, 3, 4)) == pytest.approx(1.0, abs=1e-5)


def test_the_pass_is_not_disturbed(monkeypatch):
    """Features are to the bit those of before, in the model's backend; nothing stays on the model."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.no_grad():
        before = lifted(volume)
        lifted.attention_maps(volume, 3, (0, 0, 0))
        after = lifted(volume)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lifted.modules())


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-vit"])
def test_maps_are_of_the_stream_that_hooks_leave(name):
    """What a hook before a block changes is what the one after its predecessor would have changed."""
    host = BY_NAME[name]
    model, volume, found = host.make(), host.volume(batch=1), []
    change = torch.randn(64)

    def before(_, args):
        return Stream(args[0].tokens() + change), args[1]

    def after(_, args, stream):
        return Stream(stream.tokens() + change)

    with torch.no_grad():
        for number, place, hook in ((3, "register_forward_pre_hook", before), (2, "register_forward_hook", after)):
            lifted = pcf.lift(model)
            plain = lifted.attention_maps(volume, [3], (0, 0, 0))[0].patch
            getattr(lifted.blocks[number], place)(hook)
            found.append(lifted.attention_maps(volume, [3], (0, 0, 0))[0].patch)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], plain, atol=1e-4)


def test_maps_have_gradients():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1).requires_grad_()
    [found] = lifted.attention_maps(volume, [1], (1, 1, 1))
    (found.cls.square().sum() + found.patch.square().sum()).backward()
    assert volume.grad.abs().max() > 0


def test_lower_precision_keeps_its_softmax():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make().bfloat16()), host.volume(dtype=torch.bfloat16)
    with torch.no_grad():
        [found] = lifted.attention_maps(volume)
    assert found.cls.dtype == torch.float32


def _eager(model):
    model.set_attn_implementation("eager")


def _hooked(model):
    model.blocks[-1].attn.register_forward_hook(lambda *_: None)


def _off(model):
    model.blocks[-1].attn.fused_attn = False


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("hf-dinov3", _eager, "the model's attention is 'eager'; only 'sdpa' is replaced"),
        ("timm-dinov3-s", _hooked, "EvaAttention: it has hooks"),
        ("timm-dinov2-s", _off, "timm's fused attention is off"),
    ],
)
def test_attention_that_is_the_models_own_is_refused(name, change, reason):
    host = BY_NAME[name]
    model = host.make()
    change(model)
    message = (
        rf"layers must have attention that can be taken apart, got layer {len(pcf.lift(model).blocks) - 1}: {reason}"
    )
    with pytest.raises(ValueError, match=message):
        pcf.lift(model).attention_maps(host.volume())


def test_an_adapter_of_ones_own_is_refused():
    class Whole(type(pcf.lift(BY_NAME["timm-dinov2-s"].make()).adapter)):
        def call_block(self, block, tokens, grid, sincos):
            return block(tokens)

    host = BY_NAME["timm-dinov2-s"]
    with pytest.raises(ValueError, match="got layer 4: its adapter does not take blocks apart"):
        pcf.lift(host.make(), adapter=Whole).attention_maps(host.volume())


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"patch": (0, 0)}, ValueError, r"patch must be indices \(d, h, w\) within \(4, 3, 5\) patches, got \(0, 0\)"),
        ({"patch": (4, 0, 0)}, ValueError, r"within \(4, 3, 5\) patches, got \(4, 0, 0\)"),
        ({"patch": (0, 0, -6)}, ValueError, r"within \(4, 3, 5\) patches"),
        ({"patch": 3}, TypeError, r"patch must be the indices \(d, h, w\) of a patch, got 3"),
        ({"patch": (0.0, 1, 1)}, TypeError, "patch must be the indices"),
        ({"patch": "dhw"}, TypeError, "patch must be the indices"),
        ({"layers": 9}, ValueError, "layers must be between 1 and the model's 5 layers, got 9"),
        ({"layers": [7]}, ValueError, "layers must hold indices of the model's 5 layers"),
        ({"volume": torch.zeros(1, 3, 4, 48)}, ValueError, "volume must have shape"),
    ],
)
def test_bad_input(settings, error, message):
    host = BY_NAME["timm-dinov3-s"]
    with pytest.raises(error, match=message):
        pcf.lift(host.make()).attention_maps(**({"volume": host.volume()} | settings))


def test_a_model_without_a_class_token_wants_a_patch():
    host = BY_NAME["timm-vit-no-globals"]
    with pytest.raises(ValueError, match="patch must be given for a model without a class token, got None"):
        pcf.lift(host.make()).attention_maps(host.volume())


@pytest.mark.parametrize(
    "name, instead",
    [
        ("output_attentions", "attention_maps"),
        ("output_hidden_states", "intermediate"),
        ("pixel_values", "called volume"),
        ("interpolate_pos_encoding", "settings are those of lift"),
    ],
)
def test_what_the_2d_models_forward_takes_is_explained(name, instead):
    host = BY_NAME["hf-dinov2"]
    lifted = pcf.lift(host.make())
    with pytest.raises(TypeError, match=f"a lifted model takes a volume alone, got {name}; .*{instead}"):
        lifted(host.volume(), **{name: True})


def test_negative_patches_and_other_integers():
    import numpy as np

    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.no_grad():
        [one] = lifted.attention_maps(volume, patch=(3, 2, 4))
        for same in ((-1, -1, -1), np.array([3, 2, 4]), torch.tensor([3, 2, 4]), [3, -1, 4]):
            assert torch.equal(lifted.attention_maps(volume, patch=same)[0].patch, one.patch)


def test_the_picture(tmp_path):
    from matplotlib.image import imread

    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1)
    with torch.no_grad():
        maps = lifted.attention_maps(volume, 2, (1, 2, 3))
    attention_picture(maps, torch.rand(4, 48, 80), tmp_path / "a.png", patch=(1, 2, 3), axes="SPR")
    assert imread(tmp_path / "a.png").ndim == 3 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="maps must hold a map, got none"):
        attention_picture([], torch.rand(4, 48, 80), tmp_path / "b.png")
    with torch.no_grad():
        two = lifted.attention_maps(host.volume(batch=2))
    with pytest.raises(ValueError, match="maps must be of one volume, got weights of 2"):
        attention_picture(two, torch.rand(4, 48, 80), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_heat_is_black_where_nobody_looks_and_bright_where_most_do():
    weights = torch.zeros(3, 4, 5)
    weights[1, 2, 3], weights[0, 0, 0] = 0.5, 0.01
    colours = heat_colours(weights)
    assert colours.shape == (3, 4, 5, 3) and colours.min() >= 0 and colours.max() <= 1
    brightness = colours.sum(-1)
    assert brightness[1, 2, 3] == brightness.max() > 1.5 and brightness[2, 0, 0] == brightness.min() < 0.1
    assert cut(colours, 0, 0.5, None).shape == (4, 5, 3)
    assert heat_colours(torch.zeros(1, 2, 3)).max() < 0.1


def test_a_pretrained_cfg_model_by_name_has_maps():
    """As README shows it; of timm's own size, two layers."""
    model = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, depth=2).eval()
    with torch.no_grad():
        [found] = pcf.lift(model).attention_maps(torch.randn(1, 3, 2, 32, 32))
    assert found.cls.shape == (1, 6, 2, 2, 2)


@pytest.mark.full
def test_the_example(tmp_path):
    """docs/attention.png, but for what roundings of another CPU change."""
    import subprocess
    import sys
    from pathlib import Path

    import numpy as np
    from matplotlib.image import imread

    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, root / "examples" / "attention_maps.py", tmp_path / "a.png"], check=True, cwd=root)
    made, committed = imread(tmp_path / "a.png"), imread(root / "docs" / "attention.png")
    assert made.shape == committed.shape and np.abs(made - committed).mean() < 0.01
