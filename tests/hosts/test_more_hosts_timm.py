"""timm's SigLIP, DeiT, EVA, EVA02, Perception Encoder, ViTs with RoPE and BEiT."""

import copy

import pytest
import timm
import torch

import planecycle_fast as pcf
from planecycle_fast.hosts import find_adapter
from planecycle_fast.hosts.parts import WHOLE
from planecycle_fast.hosts.timm_beit import relative_bias

from .. import naive
from ..host_models import BY_NAME, MORE_TIMM_HOSTS, TIMM
from ..test_lift_parity import globals_of
from .test_hosts import all_tokens, host_features


def skip_where_timm_fails(host, model, volume):
    """Older timm runs its mixed RoPE in float32 only: its own tables do not follow the model's dtype."""
    if host.name != "timm-rope-mixed" or TIMM >= (1, 0, 31):
        return
    try:
        host_features(host, model, volume)
    except RuntimeError as error:
        if "expected scalar type" not in str(error):
            raise
        pytest.skip(f"this timm's own {host.name} does not run in {volume.dtype}: {error}")


hosts = pytest.mark.parametrize("host", MORE_TIMM_HOSTS, ids=lambda h: h.name)
# BEiT's biases by timm's own means, as a reference here: a later timm without them fails.
RESIZES = TIMM >= (1, 0, 31) or hasattr(timm.models.beit.Attention, "set_window_size")
TWO_AXES = ("timm-rope-mixed", "timm-beit")  # what their attention knows of positions


@pytest.mark.skipif(TIMM <= (1, 0, 20), reason="timm 1.0.20 cannot build EVA02-E itself")
def test_blocks_in_another_order_are_among_the_hosts():
    assert BY_NAME["timm-eva02-e"] in MORE_TIMM_HOSTS


@hosts
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_slice2d_is_the_2d_model(host, train, on_reference):
    model, volume = host.make(drop_path_rate=0.5, proj_drop_rate=0.1, pos_drop_rate=0.1).train(train), host.volume()
    lifted = pcf.lift(model, mode="slice2d")
    with torch.no_grad():
        torch.manual_seed(7)
        got = all_tokens(lifted(volume))
        torch.manual_seed(7)
        assert torch.equal(got, host_features(host, model, volume))
        lifted.eval().bfloat16()
        volume = volume.bfloat16()
        skip_where_timm_fails(host, model, volume)
        assert torch.equal(all_tokens(lifted(volume)), host_features(host, model, volume))


def naive_block(host, model, number):
    """A block of timm's on a grid of any size, by timm's own means: (tokens, grid) -> tokens."""
    block = model.blocks[number]

    def run(tokens, grid):
        if "beit" in host.name:
            if not RESIZES:
                pytest.skip("this timm does not resize BEiT's biases itself")
            if model.rel_pos_bias is not None:
                shared = copy.deepcopy(model.rel_pos_bias)
                shared.set_window_size(grid)
                return block(tokens, shared_rel_pos_bias=shared())
            resized = copy.deepcopy(block)
            resized.attn.set_window_size(grid)
            return resized(tokens)
        if not host.rope:
            return block(tokens)
        rope = model.rope
        if host.name == "timm-rope-mixed":
            return block(tokens, rope=rope.get_embed(shape=grid)[number])
        settings = dict(temperature=rope.temperature, in_pixels=False, ref_feat_shape=rope.ref_feat_shape)
        settings |= dict(grid_offset=rope.grid_offset, grid_indexing=rope.grid_indexing)
        table = torch.cat(timm.layers.build_rotary_pos_embed(grid, dim=host.head_dim, **settings), -1)
        return block(tokens, rope=table.to(tokens.dtype))

    return run


@hosts
@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's interpolation of tables
@pytest.mark.parametrize("pool_method, globals_at", [("PCg", "depth"), ("PCm", "plane")])
def test_equals_the_naive_transcription(host, pool_method, globals_at):
    model, volume, sizes, cycle = host.make().double(), host.volume(dtype=torch.float64), (4, 3, 5), ("DW", "HW", "DH")
    with torch.no_grad():
        skip_where_timm_fails(host, model, volume)
        embedded = find_adapter(model)(model).embed(volume.movedim(2, 1).flatten(0, 1))
        blocks = [naive_block(host, model, i) for i in range(len(model.blocks))]
        grids = lambda plane, sizes: tuple(sizes[axis] for axis in naive.ROPE_AXES[plane])  # noqa: E731
        *_, (x, g) = naive.run(embedded, sizes, host.num_globals, blocks, cycle, pool_method, globals_at, grids)
        features = pcf.lift(model, cycle_order=cycle, pool_method=pool_method, globals_at=globals_at)(volume)
    torch.testing.assert_close(features.patches, model.norm(x), rtol=0, atol=1e-5)
    if host.num_globals:
        torch.testing.assert_close(globals_of(features), model.norm(g), rtol=0, atol=1e-5)


@hosts
def test_parts_compute_what_whole_blocks_do(host, monkeypatch):
    model, volume = host.make(), host.volume(batch=1)
    outputs, gradients = [], []
    for backend, whole in (("reference", True), ("reference", False), ("cpu", False)):
        with monkeypatch.context() as patched:
            if whole:
                patched.setattr(find_adapter(model), "parts", lambda *_: WHOLE)
            lifted = pcf.lift(model, backend=backend, strict=False)
            with torch.no_grad():
                outputs.append(lifted(volume).patches)
            model.zero_grad()
            lifted(volume).patches.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=0, atol=1e-5)
    for each in gradients[1:]:
        torch.testing.assert_close(each, gradients[0], rtol=1e-3, atol=1e-6)
    unused = {n for n, _ in model.named_parameters()} - set(gradients[0])
    assert all(name.split(".")[0] in ("attn_pool", "fc_norm") for name in unused)  # what comes after the features


@pytest.mark.parametrize("name", ["timm-eva02-s", "timm-eva02-clip", "timm-pe", "timm-beit", "timm-siglip"])
def test_lora(name):
    peft = pytest.importorskip("peft")
    host = BY_NAME[name]
    model, volume = host.make(), host.volume()
    found = {n.rsplit(".", 1)[-1] for n, m in model.blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    config = peft.LoraConfig(r=2, target_modules=sorted(found | {"patch_embed.proj"}), init_lora_weights=False)
    with torch.no_grad():
        plain = host_features(host, model, volume)
        peft.inject_adapter_in_model(config, model)
        lifted = pcf.lift(model, mode="slice2d")
        got = all_tokens(lifted(volume))
        for module in model.modules():
            if "qkv_bias_separate" in vars(module):  # else the host passes qkv's bare weight to a function
                module.qkv_bias_separate = True
        expected = host_features(host, model, volume)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-5)
    assert not torch.allclose(got, plain, atol=1e-2)
    pcf.lift(model)(volume).patches.square().mean().backward()
    lora = [p for n, p in model.named_parameters() if "lora_" in n and "attn_pool" not in n]
    assert lora and all(p.grad is not None and p.grad.any() for p in lora)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("window, grid", [((3, 5), (7, 5)), ((3, 5), (2, 9)), ((4, 4), (1, 6)), ((1, 3), (4, 2))])
def test_biases_of_beit_are_resampled_as_timm_does_it(window, grid):
    attention = timm.models.beit.Attention(8, num_heads=2, window_size=window)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    got = relative_bias(attention, grid)
    if not RESIZES:
        pytest.skip("this timm does not resize BEiT's biases itself")
    if window[0] > 1:  # timm resizes no table of one patch
        attention.set_window_size(grid)
        torch.testing.assert_close(got[None], attention._get_rel_pos_bias(), rtol=0, atol=1e-4)
    assert got.shape == (2, 1 + grid[0] * grid[1], 1 + grid[0] * grid[1])


def test_other_sizes(on_reference):
    eva, beit = BY_NAME["timm-eva02-b"], BY_NAME["timm-beit"]
    for grid in ((1, 1), (4, 4), (7, 2)):
        model, volume = eva.make(), eva.volume(batch=1, grid=grid)
        with torch.no_grad():
            got = all_tokens(pcf.lift(model, mode="slice2d")(volume))
            assert torch.equal(got, host_features(eva, model, volume))
    model, volume = beit.make(), beit.volume(grid=(2, 6))
    with pytest.raises(
        ValueError, match=r"fixed size, 48 x 80 pixels, got 32 x 96; build the model with img_size=\(32, 96"
    ):
        pcf.lift(model)(volume)
    if not RESIZES:
        pytest.skip("this timm does not resize BEiT's biases itself")
    model.set_input_size((32, 96))
    with torch.no_grad():
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(beit, model, volume))


@hosts
def test_under_autocast(host, on_reference):
    model, volume = host.make(), host.volume(batch=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(all_tokens(pcf.lift(model, mode="slice2d")(volume)), host_features(host, model, volume))
        rounded = pcf.lift(model)(volume).patches
    with torch.no_grad():
        torch.testing.assert_close(rounded.float(), pcf.lift(model)(volume).patches, rtol=0, atol=0.1)


def test_siglip_pools_by_attention():
    host = BY_NAME["timm-siglip"]
    model, volume = host.make(), host.volume(batch=2, depth=1)
    lifted = pcf.lift(model, mode="slice2d")
    with torch.no_grad():
        features = lifted(volume)
        torch.testing.assert_close(lifted.attn_pool(features.patches.flatten(1, 3)), model(volume[:, :, 0]))
    assert features.cls is None and features.registers is None


@hosts
def test_flatten3d(host):
    model, volume = host.make(), host.volume(batch=1)
    if host.name.startswith(TWO_AXES) or host.name == "timm-beitv2":
        with pytest.raises(ValueError, match=r"two axes.*DHW \(mode 'flatten3d'\); expected planes HW, DW and DH"):
            pcf.lift(model, mode="flatten3d")
    elif host.rope and host.name != "timm-eva02-e":  # of one slice: the third axis turns everything alike
        tables = [*find_adapter(model)(model).rope(torch.float32).sincos((4, 3, 5))]
        sin, cos = [t.view(4, 3, 5, host.head_dim) for t in tables]
        depth, rest = slice(None, host.head_dim // 4), slice(host.head_dim // 4, None)
        depth, rest = (rest, depth) if model.rope.grid_indexing == "xy" else (depth, rest)
        if model.rope.grid_indexing == "ij":
            assert (sin[..., depth].std((1, 2)) < 1e-6).all() and (sin[..., rest].std(0) < 1e-6).all()
        assert ((sin**2 + cos**2) - 1).abs().max() < 1e-6
        assert pcf.lift(model, mode="flatten3d")(volume).patches.shape == (1, 4, 3, 5, 64)
    else:
        assert pcf.lift(model, mode="flatten3d")(volume).patches.shape == (1, 4, 3, 5, 64)


def test_rotary_embeddings_that_move_in_training_are_refused():
    model = BY_NAME["timm-eva02-s"].make(depth=1)
    model.rope.shift_coords = 0.5
    with pytest.raises(ValueError, match=r"moves its coordinates at random in training \(shift_coords\)"):
        pcf.lift(model)
    pixels = BY_NAME["timm-eva02-s"].make(depth=1)
    pixels.rope.in_pixels = True
    with pytest.raises(ValueError, match="model must be of a supported class, got timm.models.eva.Eva"):
        pcf.lift(pixels)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["timm-eva02-b", "timm-rope-mixed", "timm-beit"])
def test_gradient_checkpointing_copies_and_traces(name):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(batch=1)
    lifted = pcf.lift(model)

    def gradients():
        model.zero_grad()
        lifted(volume).patches.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)
    model.set_grad_checkpointing(False)
    with torch.no_grad():
        out = lifted(volume).patches
        torch.testing.assert_close(copy.deepcopy(lifted)(volume).patches, out)
        trace = torch.jit.trace(lifted, 2 * volume)
        torch.testing.assert_close(trace(volume)[0], out, rtol=0, atol=1e-5)
