"""A lifted model and its host are one: keys, parameters, training, loading, copies, hooks, LoRA."""

import copy
import io
import pickle

import peft
import pytest
import torch

import planecycle_fast as pcf

from .host_models import BY_NAME, EVERY_HOST
from .toy import PATCH, ToyAdapter, ToyViT, toy_lift

NAMES = ["hf-dinov3", "hf-dinov2", "timm-dinov3-s", "timm-dinov3-s-qkvb", "timm-dinov2-s-reg4", "facebook-stand-in"]
FAMILIES = [BY_NAME[name] for name in NAMES]
families = pytest.mark.parametrize("host", FAMILIES, ids=lambda h: h.name)


def run(model, volume):
    with torch.no_grad():
        return model(volume).patches


def same_objects(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return list(a) == list(b) and all(a[k] is b[k] for k in a)


@pytest.mark.parametrize("host", EVERY_HOST)
def test_same_keys_same_objects_and_the_host_untouched(host):
    model = host.make()
    volume = host.volume()
    images = volume[:, :, 0]
    with torch.no_grad():
        before = host.tokens(model, images)
    keys, forward, members = list(model.state_dict()), model.forward, dict(model.__dict__)
    lifted = pcf.lift(model)
    run(lifted, volume)
    assert list(lifted.state_dict()) == keys == list(model.state_dict())
    assert same_objects(lifted, model)
    assert [id(b) for b in lifted.buffers()] == [id(b) for b in model.buffers()]
    assert model.__dict__ == members and model.forward == forward
    with torch.no_grad():
        assert torch.equal(host.tokens(model, images), before)
    assert pcf.unlift(lifted) is model


@families
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_load_before_or_after_lifting(host, assign):
    volume, source = host.volume(), host.make()
    expected = run(pcf.lift(source), volume)
    state = {k: v.clone() for k, v in source.state_dict().items()}

    before = host.make()
    before.load_state_dict(state, assign=assign)
    assert torch.equal(run(pcf.lift(before), volume), expected)

    after = host.make()
    lifted = pcf.lift(after)
    assert not torch.equal(run(lifted, volume), expected)
    assert lifted.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(run(lifted, volume), expected)
    assert same_objects(lifted, after)

    through_host = host.make()
    lifted = pcf.lift(through_host)
    through_host.load_state_dict(state, assign=assign)
    assert torch.equal(run(lifted, volume), expected)


@families
def test_deepcopy_is_independent_and_whole(host):
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model, cycle_order=("DW", "HW"), pool_method="PCm")
    copied = copy.deepcopy(lifted)
    expected = run(lifted, volume)
    assert torch.equal(run(copied, volume), expected)
    assert copied.cycle_order == ("DW", "HW") and copied.pool_method == "PCm"
    assert same_objects(copied, pcf.unlift(copied)) and pcf.unlift(copied) is not model
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(run(lifted, volume), expected)


@families
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(host, how):
    lifted, volume = pcf.lift(host.make(), globals_at="plane"), host.volume()
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(lifted))
    else:
        buffer, alone = io.BytesIO(), io.BytesIO()
        torch.save(lifted, buffer)
        torch.save(pcf.unlift(lifted), alone)
        assert buffer.tell() < 1.05 * alone.tell()  # each tensor once
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded, volume), run(lifted, volume))
    assert same_objects(loaded, pcf.unlift(loaded)) and loaded.globals_at == "plane"


@families
def test_training_shows_in_both(host):
    model, volume = host.make(), host.volume()
    lifted, other = pcf.lift(model), pcf.lift(model, mode="slice2d")
    images = volume[:, :, 0]
    with torch.no_grad():
        before = host.tokens(model, images)
    optimizer = torch.optim.SGD(lifted.parameters(), lr=0.1)
    features = lifted(volume)
    (features.patches.square().mean() + features.pooled().sum()).backward()
    optimizer.step()
    with torch.no_grad():
        after = host.tokens(model, images)
        assert not torch.allclose(before, after)
        got = other(volume).cls[:, 0]
    torch.testing.assert_close(got, after[:, 0], rtol=0, atol=1e-5)


@families
def test_train_eval_and_dtype_show_in_both(host):
    model = host.make()
    lifted = pcf.lift(model)
    for change, mode in ((lifted.train, True), (model.eval, False), (model.train, True), (lifted.eval, False)):
        change()
        assert lifted.training == model.training == mode
        assert all(m.training == mode for m in [*lifted.modules(), *model.modules()])
    lifted.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.bfloat16()
    assert {p.dtype for p in lifted.parameters()} == {torch.bfloat16}
    assert same_objects(lifted, model)
    if host.name.startswith("timm-dinov3"):
        assert lifted.rope.periods.dtype == torch.float32  # timm's own rule survives a cast of the lifted model
    lifted.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_two_lifts_at_once_differ_only_in_their_planes():
    model = ToyViT().double()
    volume = torch.randn(1, 3, 3, 4 * PATCH, 5 * PATCH, dtype=torch.float64)
    first, second = toy_lift(model), toy_lift(model, mode="flatten3d")
    alone = run(first, volume)
    assert not torch.allclose(alone, run(second, volume))
    assert torch.equal(run(first, volume), alone)
    assert same_objects(first, second)


class RootHost(ToyViT):
    """A host that does things of its own at its root, with names that `LiftedModel` uses too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.adapter = torch.nn.Linear(2, 2)
        self.planes = torch.nn.Parameter(torch.zeros(3))
        self.flag = False
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        if f"{prefix}old_tokens" in state:
            state[f"{prefix}tokens"] = state.pop(f"{prefix}old_tokens")

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()  # frozen
        return self

    def _apply(self, fn):
        super()._apply(fn)
        self.periods = self.periods.double()
        return self


def test_what_a_host_does_at_its_root():
    model = RootHost()
    lifted = toy_lift(model)
    assert "scratch" not in lifted.state_dict() and list(lifted.state_dict()) == list(model.state_dict())
    assert lifted.planes[0].name == "HW" and {"adapter.weight", "planes"} <= set(lifted.state_dict())

    assert not lifted.train().norm.training and lifted.blocks[0].training and model.training
    lifted.float()
    assert model.periods.dtype == torch.float64 and model.tokens.dtype == torch.float32
    assert lifted.double() is lifted

    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    state["old_tokens"] = state.pop("tokens") + 1
    assert lifted.load_state_dict(state) == ([], [])
    assert model.tokens.eq(1).all()

    lifted.flag = True
    assert model.flag is True and lifted.flag is True
    lifted.note = "mine"
    assert not hasattr(model, "note")
    lifted.norm = torch.nn.Identity()
    assert model.norm is lifted.norm


def test_an_error_in_an_adapter_is_shown_as_it_is():
    class Wrong(ToyAdapter):
        @property
        def blocks(self):
            return self.model.blockz

    with pytest.raises(AttributeError, match="'ToyViT' object has no attribute 'blockz'"):
        pcf.lift(ToyViT(), adapter=Wrong)(torch.zeros(1, 3, 2, 4, 6))


def test_data_parallel_is_refused():
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        toy_lift(ToyViT())._replicate_for_data_parallel()


TARGETS = {"hf": ["q_proj", "v_proj"], "timm": ["qkv"], "facebook": ["qkv"]}


@families
def test_lora_on_a_lifted_model(host):
    model, volume = host.make(), host.volume()
    lifted = pcf.lift(model)
    plain = run(lifted, volume)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[host.name.split("-")[0]], init_lora_weights=False)
    with_lora = peft.get_peft_model(lifted, config).eval()
    got = run(with_lora, volume)
    assert not torch.allclose(got, plain, atol=1e-3)
    assert any("lora" in key for key in model.state_dict())  # it shows in the host as well

    with_lora.train()(volume).patches.square().mean().backward()
    trained = {name: p for name, p in with_lora.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name and p.grad is not None and p.grad.any() for name, p in trained.items())

    merged = with_lora.eval().merge_and_unload()
    torch.testing.assert_close(run(merged, volume), got, rtol=0, atol=2e-5)


def test_inference_mode_first_then_training():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume()
    with torch.inference_mode():
        lifted(volume)
    lifted(volume).patches.sum().backward()
    assert all(p.grad is not None for n, p in lifted.named_parameters() if n.startswith("blocks"))


def test_a_lifted_model_inside_another_module():
    host = BY_NAME["hf-dinov2"]
    whole = torch.nn.ModuleDict({"backbone": pcf.lift(host.make()), "head": torch.nn.Linear(64, 2)})
    state = {k: torch.zeros_like(v) for k, v in whole.state_dict().items()}
    assert whole.load_state_dict(state) == ([], [])
    assert not any(p.any() for p in pcf.unlift(whole["backbone"]).parameters())
    whole.train()
    assert whole["backbone"].training
