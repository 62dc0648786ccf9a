"""CUDA graphs: all but capture itself, by a stand-in that records and replays calls (`graph_standin`).

The same on a real GPU: tests/gpu/test_gpu_graphs.py.
"""

import copy
import gc
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import planecycle_fast as pcf
from planecycle_fast.engine.cuda_graphs import Graph
from planecycle_fast.engine.cuda_recorder import CudaRecorder

from ..standins import Converter, DinoVisionTransformer
from ..toy import ToyViT, toy_lift
from .graph_standin import use_standin

VOLUME = torch.zeros(1, 3, 2, 4, 6)


@pytest.fixture
def recorder(monkeypatch):
    return use_standin(monkeypatch)


def lifted_and_volume(model=None, **settings):
    model = DinoVisionTransformer(depth=2, patch_size=2) if model is None else model
    return pcf.lift(model.eval(), **settings), torch.randn(1, 3, 2, 4, 6)


def same(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(model, run, volume, loss=lambda f: f.patches.square().sum() + f.pooled().sum()):
    """Outputs, and the gradients of all parameters."""
    model.zero_grad()
    out = run(volume)
    loss(out).backward()
    return [*out, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize(
    "model, volume, error, message",
    [
        (lambda v: v, VOLUME, TypeError, "model must be a torch.nn.Module, got function"),
        (toy_lift(ToyViT()), [0.0], TypeError, "volume must be a tensor, got list"),
        (toy_lift(ToyViT()).eval(), VOLUME, ValueError, "volume must be on a CUDA device to be captured .*, got cpu"),
        (object.__new__(DistributedDataParallel), VOLUME, ValueError, "model must be what DistributedDataParallel"),
    ],
    ids=["model", "volume", "device", "ddp"],
)
def test_bad_input(model, volume, error, message):
    with pytest.raises(error, match=message):
        pcf.cuda_graph(model, volume)


def test_replays_equal_eager_in_memory_of_their_own(recorder):
    lifted, volume = lifted_and_volume()
    graph, kept = pcf.cuda_graph(lifted, volume), []
    with torch.no_grad():
        for _ in range(3):
            volume = torch.randn_like(volume)
            kept.append((graph(volume), lifted(volume)))
    assert all(same(got, expected) for got, expected in kept)
    assert not graph(volume.requires_grad_()).patches.requires_grad  # of inference
    shared = pcf.cuda_graph(lifted, volume, own_results=False)
    first, old = shared(volume).patches, kept[-1][0].patches
    assert torch.equal(first, old)
    shared(torch.randn_like(volume))
    assert not torch.equal(first, old)


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_many_replays_have_the_same_bits_and_take_no_memory(recorder, times):
    lifted, volume = lifted_and_volume(DinoVisionTransformer(depth=1, patch_size=2, embed_dim=16))
    graph = pcf.cuda_graph(lifted, volume, gradients=True)
    expected = step(lifted, lifted, volume)

    def tensors():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    assert same(step(lifted, graph, volume), expected)
    before = tensors()
    for _ in range(times):
        got = step(lifted, graph, volume)
    assert same(got, expected) and tensors() <= before + len(got)
    [recorded] = recorder.recorded
    assert recorded.addresses == [t.data_ptr() for t in (*recorded.outputs, *recorded.gradients)]


def test_gradients_are_those_of_eager_and_add_up(recorder):
    lifted, volume = lifted_and_volume()
    lifted.blocks[0].attn.requires_grad_(False)  # frozen
    graph = pcf.cuda_graph(lifted.train(), volume.requires_grad_())
    for _ in range(2):
        volume, found = torch.randn_like(volume).requires_grad_(), []
        for run in (graph, lifted):
            torch.manual_seed(1)
            found.append([*step(lifted, run, volume), volume.grad])
            volume.grad = None
        assert same(*found) and found[0][-1] is not None
    results = []
    for run in (graph, lifted):
        lifted.zero_grad()
        for seed in range(3):
            torch.manual_seed(seed)
            run(torch.randn_like(volume)).patches.square().sum().backward()
        results.append([p.grad for p in lifted.parameters()])
    assert same(*results)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1)

    def forward(self, volume):
        return self.one(volume), [self.two(volume), "a constant", None], volume.shape


def test_outputs_without_a_gradient_give_none(recorder):
    """To weights that only they have: weight decay would move those otherwise."""
    model, volume = TwoHeads(), torch.randn_like(VOLUME)
    graph = pcf.cuda_graph(model, volume, gradients=True)
    for which in (0, 1):
        found = []
        for run in (graph, model):
            model.zero_grad()
            one, (two, *rest), shape = run(volume)
            assert rest == ["a constant", None] and shape == volume.shape
            (one, two)[which].square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        assert same(*found) and None in found[0]


def replaced(lifted):
    lifted.blocks[0].norm1.weight = nn.Parameter(lifted.blocks[0].norm1.weight.detach().clone())


def moved(lifted):
    lifted.blocks[0].norm1.weight.data = lifted.blocks[0].norm1.weight.data.clone()


def loaded(lifted):
    lifted.load_state_dict({name: t.clone() for name, t in lifted.state_dict().items()}, assign=True)


def set_pool(lifted):
    lifted.pool_method = "PCm"


CHANGES = [  # what somebody does after capture, and what is said
    (replaced, "norm1.weight has been replaced"),
    (moved, "norm1.weight has moved in memory"),
    (loaded, "has been replaced"),
    (lambda m: m.blocks[0].requires_grad_(False), "requires_grad has changed"),
    (lambda m: m.train(), "training has changed"),
    (lambda m: m.blocks[1].mlp.register_forward_hook(print), "hooks have been added"),
    (lambda m: m.blocks[1].register_forward_pre_hook(print), "hooks have been added"),
    (lambda m: pcf.unlift(m).blocks[1].register_forward_hook(print), "hooks have been added"),
    (lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()), "a module has been replaced"),
    (lambda m: setattr(m.blocks[0].norm1, "eps", 0.1), "norm1.eps has changed"),
    (lambda m: setattr(m.rope_embed, "base", 10.0), "rope_embed.base has changed"),
    (lambda m: m.scales.update(a=2.0), "a list or dictionary"),
    (lambda m: setattr(m.blocks[0].mlp, "forward", print), "has other attributes"),
    (set_pool, "pool_method has changed"),
    (lambda m: setattr(m, "gelu", "tanh_epilogue"), "gelu has changed"),
    (lambda m: m.tap(0).register_forward_hook(print), "settings have changed"),
    (lambda m: m.blocks.__setitem__(0, nn.Sequential(m.blocks[0])), "other attributes|a module has been|settings"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_a_change_is_never_silently_stale(recorder, change, message):
    model = DinoVisionTransformer(depth=2, patch_size=2)
    model.scales = {"a": 1.0}
    lifted, volume = lifted_and_volume(model)
    graph = pcf.cuda_graph(lifted, volume)
    graph(volume)
    change(lifted)
    with pytest.raises(ValueError, match=f"the model is not as it was captured: .*({message})"):
        graph(volume)


def test_parts_of_a_model_say_what_they_read(recorder):
    """A lifted model, or the methods of an accelerated one, within a model that is captured."""
    lifted, volume = lifted_and_volume()
    made = Converter()(DinoVisionTransformer("PlaneCycle", depth=2, patch_size=2).eval())
    for model, change in [
        (lifted, lambda: lifted.tap(0).register_forward_hook(print)),
        (pcf.accelerate(made), lambda: setattr(made.forward_features_list, "gelu", "tanh_epilogue")),
    ]:
        graph = pcf.cuda_graph(nn.Sequential(model).eval(), volume)
        graph(volume)
        change()
        with pytest.raises(ValueError, match="settings have changed"):
            graph(volume)


def test_weights_may_change_in_place(recorder):
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume)
    with torch.no_grad():
        lifted.blocks[0].norm1.weight.mul_(2)
        assert same(graph(volume), lifted(volume))


def test_what_was_not_captured_is_refused(recorder):
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume, gradients=True)
    for other, message in [
        (volume[:, :, :1], r"volume must have the captured shape, \(1, 3, 2, 4, 6\), got \(1, 3, 1, 4, 6\)"),
        (volume.double(), "volume must have the captured dtype"),
        (volume.to("meta"), "volume must have the captured device, cpu, got meta"),
        (volume.clone().requires_grad_(), "volume must need no gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            graph(other)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        graph(volume)
    with pytest.raises(ValueError, match="gradients must be of parameters or a volume"):
        pcf.cuda_graph(lifted.requires_grad_(False), volume, gradients=True)


def test_autocast_is_captured_as_it_is_on(recorder):
    lifted, volume = lifted_and_volume()
    with torch.autocast("cpu", torch.bfloat16):
        graph = pcf.cuda_graph(lifted, volume, gradients=True)
        results = [step(lifted, run, volume) for run in (graph, lifted)]
        assert same(*results) and results[0][0].dtype == lifted(volume).patches.dtype
        with torch.no_grad():
            lifted.blocks[0].mlp.fc1.weight.mul_(2)
        torch.clear_autocast_cache()  # or eager passes go on with the cast of before
        assert same(graph(volume), lifted(volume))


def test_backward_where_it_would_be_wrong(recorder):
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume, gradients=True)
    loss = graph(volume).patches.sum()
    loss.backward(retain_graph=True)
    expected = lifted.blocks[0].attn.qkv.weight.grad.clone()
    lifted.zero_grad()
    loss.backward()
    assert torch.equal(lifted.blocks[0].attn.qkv.weight.grad, expected)
    old = graph(volume).patches
    graph(volume)
    for run, message in [
        (lambda: loss.backward(), "backward of this pass has run already|second time"),
        (lambda: old.sum().backward(), "have been overwritten by a later one"),
        (
            lambda: torch.autograd.grad(
                graph(volume).patches.sum(), [*lifted.norm.parameters()], create_graph=True, allow_unused=True
            ),
            "no second derivative",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run()
    lifted.blocks[1].requires_grad_(False)
    graph = pcf.cuda_graph(lifted, volume, gradients=True)
    for weight in (lifted.norm.weight, lifted.blocks[1].mlp.fc1.weight):  # learnt, and frozen
        out = graph(volume).patches
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="parameters, or .*, have been written to between the forward pass"):
            out.sum().backward()


def test_results_of_the_graph_that_are_written_to(recorder):
    """They may be what backward reads."""
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume, gradients=True, own_results=False)
    step(lifted, graph, volume)
    found = graph(volume)
    found.patches.mul_(2)
    with pytest.raises(RuntimeError, match="results that are memory of the graph, have been written to"):
        found.pooled().sum().backward()


def test_a_volume_of_one_channel_is_read_as_one(recorder):
    """The weights' sum is multiplied then, with other roundings."""
    lifted, several = lifted_and_volume()
    graph, one = pcf.cuda_graph(lifted, several[:, :1].expand(-1, 3, -1, -1, -1)), torch.randn(1, 1, 2, 4, 6)
    with torch.no_grad():
        assert same(graph(one.expand(-1, 3, -1, -1, -1)), lifted(one.expand(-1, 3, -1, -1, -1)))
    with pytest.raises(ValueError, match="volume must be of one channel, expanded"):
        graph(several)


def test_random_numbers_are_new_in_every_replay(recorder):
    """Of dropout, drop path and the augmentation of positions, by a model that draws that on the CPU as well."""
    from ..host_models import BY_NAME

    host = BY_NAME["timm-dinov3-s"]
    model = host.make(depth=2, drop_path_rate=0.3, proj_drop_rate=0.2)
    lifted, volume = pcf.lift(model, backend="reference").train(), host.volume(1, 2)
    model.rope.shift_coords, model.rope.rescale_coords = 0.3, 2.0
    before = torch.get_rng_state()
    graph = pcf.cuda_graph(lifted, volume)
    assert torch.equal(torch.get_rng_state(), before)  # the capture takes none

    def run(function):
        torch.manual_seed(5)
        return [step(lifted, function, volume) for _ in range(2)]

    (first, second), expected = run(graph), run(lifted)
    assert not torch.equal(first[0], second[0])
    assert same(first, expected[0]) and same(second, expected[1])


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.weight, self.draw = nn.Parameter(torch.ones(1)), draw

    def forward(self, volume):
        return volume * self.weight * self.draw()


@pytest.mark.parametrize(
    "draw, message",
    [
        (random.random, "draws random numbers in Python"),
        (np.random.rand, "draws random numbers in Python"),
        (lambda: float(torch.rand(())), "draws random numbers on the CPU"),
    ],
)
def test_numbers_that_a_replay_would_repeat_are_refused(recorder, monkeypatch, draw, message):
    monkeypatch.setattr(recorder, "draws_alone", lambda: True)
    with pytest.raises(RuntimeError, match=message):
        pcf.cuda_graph(Draws(draw), VOLUME)


def test_generators_of_modules_and_what_is_left_of_them(recorder):
    model = Draws(lambda: float(torch.rand((), generator=model.generator)))
    model.generator = torch.Generator().manual_seed(0)
    state, python, arrays = model.generator.get_state(), random.getstate(), np.random.get_state()
    for draw in (model.draw, random.random, np.random.rand):
        model.draw = draw
        with pytest.raises(RuntimeError, match="draws random numbers in Python"):
            pcf.cuda_graph(model, VOLUME)
    assert torch.equal(model.generator.get_state(), state) and random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], arrays[1]) and np.random.get_state()[2] == arrays[2]


def test_results_that_no_graph_knows(recorder):
    class Found:
        def __init__(self, patches):
            self.patches = patches

    model = nn.Linear(6, 2)
    model.forward = lambda x: Found(x)
    with pytest.raises(RuntimeError, match="the model returns a Found, which may hold tensors"):
        pcf.cuda_graph(model, VOLUME)


def test_cached_parametrizations(recorder):
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)).eval()
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match="parametrize.cached.. keeps weights"):
        pcf.cuda_graph(model, VOLUME)
    with torch.no_grad():
        graph = pcf.cuda_graph(model, VOLUME)
        model.parametrizations.weight.original0.mul_(2)
        assert torch.equal(graph(VOLUME + 1), model(VOLUME + 1))


def test_a_model_that_changes_as_it_runs(recorder):
    class Counts(Draws):
        def forward(self, volume):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(volume)

    with pytest.raises(RuntimeError, match="the model changes while it runs: .*other attributes"):
        pcf.cuda_graph(Counts(lambda: 1), VOLUME)

    class Writes(Draws):
        def forward(self, volume):
            with torch.no_grad():
                self.weight.add_(1)
            return super().forward(volume)

    for gradients in (False, True):
        with pytest.raises(RuntimeError, match="writes to its parameters"):
            pcf.cuda_graph(Writes(lambda: 1), VOLUME, gradients=gradients)


def test_parameters_that_are_kept_elsewhere(recorder):
    model = Draws(lambda: 1)
    kept = model.weight
    for elsewhere in (kept, torch.ones(1, requires_grad=True), 2 * torch.ones(1, requires_grad=True)):
        model.draw = lambda elsewhere=elsewhere: elsewhere
        for frozen in (False, True):
            model.weight.requires_grad_(not frozen)
            if elsewhere.requires_grad:
                with pytest.raises(RuntimeError, match="keeps parameters elsewhere than in its modules"):
                    pcf.cuda_graph(model, VOLUME, gradients=not frozen or None)


def test_running_statistics_are_those_of_eager(recorder):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).train()
    images = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    eager = copy.deepcopy(model)
    graph = pcf.cuda_graph(model, images[0])
    for each in images:
        assert torch.equal(graph(each), eager(each))
    assert same(model.state_dict().values(), eager.state_dict().values())


@torch.no_grad()
def test_norms_in_training_within_a_model_that_is_not(recorder):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    model[0].train()
    eager, images = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    graph = pcf.cuda_graph(model, images)
    assert same(model.state_dict().values(), eager.state_dict().values())
    assert torch.equal(graph(images), eager(images))
    assert same(model.state_dict().values(), eager.state_dict().values())
    model[1].p = 0.2
    with pytest.raises(ValueError, match="1.p has changed"):  # before anything has run
        graph(images)
    assert same(model.state_dict().values(), eager.state_dict().values())


def test_hooks_on_gradients_run_once(recorder):
    lifted, volume = lifted_and_volume()
    lifted.norm.weight.register_hook(lambda g: 2 * g)
    graph = pcf.cuda_graph(lifted, volume, gradients=True)
    lifted.norm.bias.register_hook(lambda g: 3 * g)
    assert same(step(lifted, graph, volume), step(lifted, lifted, volume))


def test_weights_are_leaves_of_no_other_pass_while_they_are_recorded(recorder):
    """A pass that is alive, as a loss of the step before, binds them to its stream."""
    lifted, volume = lifted_and_volume()
    alive = lifted(volume).patches.sum()
    parameters, during = [*lifted.parameters()], []

    def run(volume):
        during.append([*lifted.parameters()])
        return lifted(volume)

    graph = Graph(lifted, run, volume, gradients=True)
    assert all(not any(p is leaf for p in parameters) for leaf in during[-1])
    assert [p.data_ptr() for p in during[-1]] == [p.data_ptr() for p in parameters]
    assert all(p is now for p, now in zip(parameters, lifted.parameters()))
    assert same(step(lifted, graph, volume), step(lifted, lifted, volume)) and alive.grad_fn is not None


def test_errors_are_no_hangs(recorder):
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume)
    recorder.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured here: another graph"):
        pcf.cuda_graph(lifted, volume)
    with pytest.raises(RuntimeError, match="cannot be replayed here: another graph"):
        graph(volume)
    recorder.capturing = False
    recorder.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: out of memory"):
        pcf.cuda_graph(lifted, volume)
    assert recorder.given_back == 1
    lifted.norm.to("meta")
    with pytest.raises(ValueError, match="its norm.weight is on meta, the volume on cpu"):
        pcf.cuda_graph(lifted, volume)


def test_another_stream_waits_for_the_last_replay(recorder):
    lifted, volume = lifted_and_volume()
    graph = pcf.cuda_graph(lifted, volume)
    graph(volume)
    recorder.now = "side"
    graph(volume)
    graph(volume)
    assert recorder.waits == [("side", "main")]


def test_what_the_recorder_asks_of_cuda(monkeypatch):
    """Without a GPU, as far as that goes: both passes on the present stream, in one pool, and replayed one by one."""
    real, seen, reserved = CudaRecorder(), [], iter([100, 700])

    class FakeGraph:
        def replay(self):
            seen.append(("replay", graphs.index(self)))

    @contextmanager
    def capture(graph, pool, stream, mode):
        graphs.append(graph)
        seen.append(("capture", pool, stream, mode))
        yield

    graphs, device = [], torch.device("cuda", 0)
    fakes = dict(
        CUDAGraph=FakeGraph, graph=capture, graph_pool_handle=lambda: "pool", current_stream=lambda device: "stream",
        memory_reserved=lambda device: next(reserved), synchronize=lambda device: None, empty_cache=lambda: None,
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    weight = torch.ones(2, requires_grad=True)
    recorded = real.record(lambda: [2 * weight], lambda made: [*torch.autograd.grad(made[0].sum(), weight)], device)
    recorded.backward()
    recorded.forward()
    expected = ("capture", "pool", "stream", "thread_local")
    assert seen == [expected, expected, ("replay", 1), ("replay", 0)] and recorded.nbytes == 600
    assert not recorded.outputs[0].requires_grad and recorded.gradients[0].tolist() == [2, 2]
    assert real.takes(device) and not real.takes(torch.device("cpu"))
    assert "CUDA graphs need a CUDA device" in real.why_not(torch.device("cpu"))
    before = real.settings()
    with sdpa_kernel(SDPBackend.MATH):
        assert real.settings() != before
    assert real.settings() == before
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # after which torch's older switches raise when they are read
        assert real.settings() != before
    finally:
        matmul.fp32_precision = precision
    assert real.settings() == before
