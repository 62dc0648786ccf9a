"""A group of cells: compared before it is timed, what does not fit is a result, predictions beside measurements."""

from types import SimpleNamespace

import pytest
import torch

from planecycle_fast.bench import expected, measure, networks
from planecycle_fast.bench.cells import (
    ACCELERATED,
    AUTHORS,
    COMPILED,
    FAST,
    GRAPH,
    MODES,
    REFERENCE,
    STEPS,
    Cell,
    parse_volume,
    quick,
)
from planecycle_fast.bench.contenders import NotHereError, authors, vit
from planecycle_fast.bench.measure import Group
from planecycle_fast.bench.timing import compare

from .. import peers
from ..engine.graph_standin import use_standin
from .small_bench import EFFORT, VOLUME, cell, small  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture
def host(small):  # noqa: F811
    return small("ViT-S", CPU, torch.float32)


def measured(cells, host):
    return Group(cells, CPU, host).measure(EFFORT)


@pytest.mark.parametrize("step", STEPS)
def test_every_mode_is_compared_measured_and_foreseen(host, step):
    cells = [cell(mode, code, step=step) for mode in MODES for code in (FAST, REFERENCE)]
    for result in measured(cells, host).values():
        assert result["status"] == "measured", result["reason"]
        assert result["error"] <= 1e-4 and result["compared_at"] == VOLUME
        assert 0 < result["p20"] <= result["seconds"] <= result["p80"] and result["rounds"] == 3
        assert result["planned_flops"] == pytest.approx(result["flops"], rel=0.01)
        assert result["launches"] > 0 and result["moved_bytes"] > 0 and result["weight_bytes"] > 0
    assert all([p.grad is None for p in host.parameters()])


SMALLEST = [cell(volume=volume, step=step) for volume, step in {(of.volume, of.step) for of in quick(CPU, ["ViT-S"])}]
SMALLEST = sorted(SMALLEST, key=lambda of: (parse_volume(of.volume).patches, of.step))


@pytest.mark.parametrize(
    "of", [of if i == 1 else pytest.param(of, marks=pytest.mark.full) for i, of in enumerate(SMALLEST)], ids=str
)
def test_foreseen_memory_is_within_a_tenth_of_that_of_quick_cells(of):
    """The real ViT-S, all modes of the quick sweep."""
    host = vit("ViT-S", CPU, torch.float32)
    modes = [each.mode for each in quick(CPU, ["ViT-S"]) if each.group == of.group and each.code == FAST]
    cells = [of._replace(mode=mode) for mode in modes] + [of._replace(code=REFERENCE)]
    for each, result in Group(cells, CPU, host).measure(measure.Effort("test", 1, 0, 60)).items():
        assert result["planned_bytes"] == pytest.approx(result["peak_bytes"], rel=0.1), each


@peers.needs_planecycle
@pytest.mark.parametrize("step", ["inference", "finetune"])
def test_the_authors_code_has_the_same_weights(host, step):
    cells = [cell(mode, AUTHORS, step=step) for mode in MODES] + [cell("PCg", ACCELERATED, step=step)]
    results = measured(cells, host)
    assert [result["status"] for result in results.values()] == ["measured"] * 5, results
    assert all([result["error"] <= 1e-5 and result["launches"] > 0 for result in results.values()])


@peers.needs_planecycle
def test_the_authors_code_of_a_gated_mlp(small):  # noqa: F811
    host = small("ViT-7B", CPU, torch.float32)
    results = measured([cell(mode, AUTHORS, model="ViT-7B") for mode in MODES], host)
    assert [result["status"] for result in results.values()] == ["measured"] * 4, results


@peers.needs_planecycle
def test_the_authors_flatten3d_takes_heads_of_64_channels():
    host = vit("ViT-7B", CPU, torch.float32, depth=1, embed_dim=128, num_heads=1)
    with pytest.raises(NotHereError, match="heads of 64 channels"):
        authors(host, "flatten3d")


def test_what_is_not_here_says_so(host, monkeypatch):
    monkeypatch.delenv("PLANECYCLE_REPO", raising=False)
    results = measured([cell(code=AUTHORS), cell(code=GRAPH), cell()], host)
    assert [result["status"] for result in results.values()] == ["not here", "not here", "measured"]
    assert "PLANECYCLE_REPO" in results[cell(code=AUTHORS)]["reason"]
    assert "CUDA" in results[cell(code=GRAPH)]["reason"]


@pytest.mark.parametrize("step", STEPS)
def test_a_wrong_contender_is_not_timed(host, monkeypatch, step):
    make = networks.make

    def wrong(model, mode, code, *rest):
        return make(model, "PCm" if code == FAST else mode, code, *rest)

    monkeypatch.setattr(networks, "make", wrong)
    results = measured([cell(step=step), cell(code=REFERENCE, step=step)], host)
    refused, fine = results.values()
    assert refused["status"] == "refused: outputs differ" and "of the largest value" in refused["reason"]
    assert "seconds" not in refused and refused["error"] > 1e-3
    assert fine["status"] == "measured"


def test_modes_are_far_apart_even_in_lower_precision(host):
    """Else a comparison would not tell them from each other: the random weights see to it."""
    volume = torch.randn(parse_volume(VOLUME).shape)
    with torch.no_grad():
        found = {mode: networks.make(host, mode, REFERENCE, volume)(volume) for mode in MODES}
    for mode, outputs in found.items():
        others = {name: found[name] for name in MODES if name != mode}
        errors = compare(others, outputs, max(expected.TOLERANCE.values()))
        assert min([agreement.error for agreement in errors.values()]) > 2 * max(expected.TOLERANCE.values())


def test_wrong_gradients_are_seen_where_features_are_right(host, monkeypatch):
    make = networks.make

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    def wrong(model, mode, code, *rest):
        run = make(model, mode, code, *rest)
        if code == FAST:
            take = run.take
            run.take = lambda out, volume: tuple([Twice.apply(t) for t in take(out, volume)])
        return run

    monkeypatch.setattr(networks, "make", wrong)
    assert measured([cell(step="inference")], host)[cell(step="inference")]["status"] == "measured"
    result = measured([cell(step="finetune")], host)[cell(step="finetune")]
    assert result["status"] == "refused: outputs differ" and result["error"] == pytest.approx(1, rel=1e-3)


OUT_OF_MEMORY = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("calls", [0, 2], ids=["made", "timed"])
def test_out_of_memory_is_a_result(host, monkeypatch, error, calls):
    """When a contender is first called, and when it runs in turns with the others."""
    step_of, called = measure.step_of, []

    def failing(step, network):
        run = step_of(step, network)

        def call(volume):
            called.append(1)
            if len(called) > calls:
                raise error
            return run(volume)

        return call if network.run.model.mode == "flatten3d" else run

    monkeypatch.setattr(measure, "step_of", failing)
    results = measured([cell("slice2d"), cell("flatten3d"), cell("PCg")], host)
    assert [result["status"] for result in results.values()] == ["measured", "out of memory", "measured"]
    assert "seconds" not in results[cell("flatten3d")]


def test_another_error_is_a_failure_with_its_words(host, monkeypatch):
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 1 / 0)
    result = measured([cell()], host)[cell()]
    assert (result["status"], result["reason"]) == ("failed", "ZeroDivisionError: division by zero")


def test_what_would_not_fit_is_not_run(host, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(measure, "network", lambda *_: pytest.fail("it was made"))
    result = measured([cell()], host)[cell()]
    assert result["status"] == "skipped: would not fit in memory" and "GiB predicted" in result["reason"]


def test_where_the_reference_does_not_fit_a_small_volume_is_compared(host, monkeypatch):
    made = expected.network

    def large(of, host, volume):
        if of.code == REFERENCE and volume.shape[2] > 4:
            raise MemoryError
        return made(of, host, volume)

    monkeypatch.setattr(expected, "network", large)
    of = cell(volume="1x6x64")
    result = measured([of], host)[of]
    assert result["status"] == "measured" and result["compared_at"] == expected.SMALL


def test_where_float32_weights_do_not_fit_the_dtype_is_the_contenders(small, monkeypatch):  # noqa: F811
    def full(host):
        raise torch.OutOfMemoryError("CUDA out of memory")

    host, of = small("ViT-S", CPU, torch.bfloat16), cell()._replace(dtype="bf16")
    monkeypatch.setattr(expected, "copy", SimpleNamespace(deepcopy=full))
    result = Group([of], CPU, host).measure(EFFORT)[of]
    assert (result["status"], result["compared_at"]) == ("measured", "1x4x64, with the reference in bf16")


def test_lower_precision_is_compared_with_float32(small):  # noqa: F811
    of = cell()._replace(dtype="bf16")
    result = Group([of], CPU, small("ViT-S", CPU, torch.bfloat16)).measure(EFFORT)[of]
    assert result["status"] == "measured" and 1e-4 < result["error"] < 0.1


def test_inputs_change_between_calls(host, monkeypatch):
    step_of, seen = measure.step_of, []

    def watched(step, network):
        run = step_of(step, network)
        return lambda volume: seen.append(volume.data_ptr()) or run(volume)

    monkeypatch.setattr(measure, "step_of", watched)
    measured([cell()], host)
    assert len(set(seen[-3:])) == 3


@pytest.mark.full
def test_compiled(host):
    of = cell(code=COMPILED)
    result = measured([of], host)[of]
    assert result["status"] == "measured" and "launches" not in result


def test_a_peer_has_nothing_to_be_compared_with(small):  # noqa: F811
    of = Cell("ACS ResNet-50", "fp32", "1x4x32", "inference", "", "peer")
    result = Group([of], CPU, None).measure(EFFORT)[of]
    if result["status"] == "not here":
        pytest.skip(result["reason"])
    assert result["status"] == "measured" and "error" not in result and result["flops"] > 0


def test_a_peer_that_would_not_fit_is_not_run(small, monkeypatch):  # noqa: F811
    monkeypatch.setattr(measure, "peer_peak", lambda of: 2**50)
    of = Cell("ViViT-B", "fp32", "1x4x32", "inference", "", "peer")
    result = Group([of], CPU, None).measure(EFFORT)[of]
    if result["status"] != "not here":
        assert result["status"] == "skipped: would not fit in memory"


@pytest.mark.parametrize("step", ["inference", "finetune"])
def test_graphs_are_captured_before_they_are_timed(small, monkeypatch, step):  # noqa: F811
    """By the stand-in for CUDA graphs: such a cell is measured as any other, by `lift(graphs=True)`."""
    recorder = use_standin(monkeypatch)
    cells = [cell(code=code, step=step) for code in (GRAPH, FAST)]
    results = Group(cells, CPU, small("ViT-S", CPU, torch.float32)).measure(EFFORT)
    assert [results[each]["status"] for each in cells] == ["measured", "measured"]
    assert len(recorder.recorded) == 1 and bool(recorder.recorded[0].gradients) == (step == "finetune")
