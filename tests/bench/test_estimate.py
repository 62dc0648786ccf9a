"""What a sweep announces, against runs whose cells take known times: those of the first run on an H100."""

import re

import pytest
import torch

from planecycle_fast.bench import contenders, estimate, measure, sweep
from planecycle_fast.bench.cells import AUTHORS, FAST, GRAPH, PEER, REFERENCE, groups, parse_volume, quick
from planecycle_fast.bench.costs import Flops
from planecycle_fast.bench.measure import QUICK, Group
from planecycle_fast.optional import MissingPackageError

CUDA = torch.device("cuda")
WITHIN = 1.5
HOST = estimate.HostSpeed(26.02e-3 / 12, 1.3)  # an eager pass of ViT-S, 12 blocks, and a mode's first pass

# Seconds of a call, bf16, ViT-S, 4x64x64: benchmarks of the first run on an H100 with 16 slow cores.
CALLS = {
    ("inference", FAST): {"PCg": 18.9e-3, "slice2d": 18.7e-3, "PCm": 20.6e-3, "flatten3d": 19.8e-3},
    ("inference", REFERENCE): {"PCg": 17.8e-3}, ("inference", AUTHORS): {"PCg": 17.5e-3},
    ("inference", GRAPH): {"PCg": 2.8e-3},
    ("finetune", FAST): {"PCg": 85.6e-3, "slice2d": 83.6e-3, "flatten3d": 84e-3},
    ("finetune", REFERENCE): {"PCg": 67.2e-3}, ("finetune", AUTHORS): {"PCg": 70.4e-3},
    ("finetune", GRAPH): {"PCg": 6.5e-3},
}  # fmt: skip
LARGE = {  # the same of large volumes, inference
    ("ViT-S", "8x32x512"): {FAST: {"PCg": 72.2e-3, "slice2d": 69.7e-3, "PCm": 69.5e-3, "flatten3d": 561e-3},
                            REFERENCE: {"PCg": 128.8e-3}, AUTHORS: {"PCg": 158.3e-3}, GRAPH: {"PCg": 71.9e-3}},
    ("ViT-B", "8x32x512"): {FAST: {"PCg": 170.9e-3, "slice2d": 167.8e-3, "PCm": 168.4e-3},
                            REFERENCE: {"PCg": 277.9e-3}, AUTHORS: {"PCg": 334.2e-3}, GRAPH: {"PCg": 170.4e-3}},
    ("ViT-L", "4x32x512"): {FAST: {"PCg": 240.1e-3, "slice2d": 239.7e-3, "PCm": 241e-3},
                            REFERENCE: {"PCg": 380.1e-3}, AUTHORS: {"PCg": 453.6e-3}, GRAPH: {"PCg": 242.9e-3}},
}  # fmt: skip
COMPILED = {"slice2d": 1.5, "PCg": 0.8, "PCm": 1.6, "flatten3d": 1.3}  # first pass of a mode
# Seconds of a count of operations and of a plan, ViT-S: measured on one core of an Intel Xeon.
COUNTED = {"inference": 0.66, "probe": 0.57, "finetune": 1.21}
PLANNED = {"inference": (0.60, 0.53), "probe": (0.40, 0.79), "finetune": (0.68, 1.34)}  # kernels, reference


def operations(model, mode, volume):
    """Of linear layers and attention, two per multiplication and addition."""
    size, (blocks, channels) = parse_volume(volume), {"ViT-B": (12, 768), "ViT-L": (24, 1024)}.get(model, (12, 384))
    rows, length = size.batch * size.patches, size.patches if mode == "flatten3d" else size.patches // size.depth
    return blocks * (24 * channels**2 + 4 * length * channels) * rows


class Machine:
    """A clock, and what takes time on it."""

    def __init__(self, slower=1.0):
        self.now, self.slower, self.seen, self.took = 0.0, slower, set(), []

    def __call__(self):
        return self.now

    def flops(self, model, mode, volume, step):
        if (model, mode, volume, step) not in self.seen:
            self.seen.add((model, mode, volume, step))
            self.now += COUNTED[step]
        return Flops(operations(model, mode, volume) * (3 if step == "finetune" else 1), 0)

    def measure(self, group, effort):
        """As `Group.measure` goes about it, in known times."""
        before, calls = self.now, []
        for cell in group.cells:
            call = self.call(cell)
            calls.append(call)
            if cell.code == FAST and (cell.mode, cell.step == "finetune") not in self.seen:
                self.seen.add((cell.mode, cell.step == "finetune"))
                self.spend(COMPILED[cell.mode] * (2 if cell.step == "finetune" else 1))
            kernels = cell.code in (FAST, GRAPH)
            planned = (cell.mode, kernels, cell.volume, cell.step)
            if cell.code != PEER and planned not in self.seen:
                self.seen.add(planned)
                self.spend(PLANNED[cell.step][0 if kernels else 1])
            compared = 1 + (cell.step != "inference") * 0.3  # features too
            expected = compared if cell.code == FAST else 0  # the reference, once per mode
            self.spend((compared + 1) * call + 0.02)  # and its memory
            self.spend(expected * max(call, operations(cell.model, cell.mode, cell.volume) / 45e12))  # in float32
            graph = 5 * self.call(cell._replace(code=FAST))
            self.spend({GRAPH: graph, AUTHORS: 0.3, PEER: 0.5}.get(cell.code, 0.03))  # made
            if cell.code in (AUTHORS, PEER):
                self.spend(0.6)  # metered
            self.spend(0.35 + 2 * call)  # profiled
        if "profiler" not in self.seen:
            self.seen.add("profiler")
            self.spend(4.0)
        rounds = next(n for n in range(3, effort.rounds + 1) if n == effort.rounds or n * sum(calls) > effort.seconds)
        self.spend(rounds * sum(calls) + 0.3)
        self.took.append(self.now - before)
        return {cell: {"status": "measured", "reason": "", "seconds": 0.5} for cell in group.cells}

    def call(self, cell):
        if (cell.model, cell.volume) in LARGE:
            return LARGE[cell.model, cell.volume][cell.code][cell.mode]
        step = "inference" if cell.step == "probe" or cell.code == PEER else cell.step
        extra = 3e-3 if cell.step == "probe" else 0.0
        return CALLS[step, FAST if cell.code == PEER else cell.code].get(cell.mode, 19e-3) + extra

    def spend(self, seconds):
        self.now += self.slower * seconds


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs cells: the rows, seconds announced, those said to be left after each group, those taken."""

    def swept(machine, cells, limit=None):
        for module in (sweep, estimate):
            monkeypatch.setattr(module, "perf_counter", machine)
        monkeypatch.setattr(estimate, "flops", machine.flops)
        monkeypatch.setattr(sweep, "measured", lambda *_: HOST)
        monkeypatch.setattr(sweep, "_ceilings", lambda *_: {"ceiling_flops": 753e12, "ceiling_bandwidth": 3e12})
        monkeypatch.setattr(sweep, "environment_of", lambda _: {"device": "An H100"})
        monkeypatch.setattr(measure.Hosts, "of", lambda *_: None)
        monkeypatch.setattr(measure, "release", lambda _: None)
        monkeypatch.setattr(Group, "measure", lambda group, effort: machine.measure(group, effort))
        monkeypatch.setenv(contenders.REPO, "here")
        found = sweep.run_sweep(cells, CUDA, tmp_path, QUICK, "planecycle-fast bench", limit)
        err = capsys.readouterr().err
        opening = re.search(r"cells in \d+ groups, about (.+)", err)[1]
        left = [seconds(words) for words in re.findall(r"; about (.+) left", err)]
        return found, seconds(opening), left, machine.took

    return swept


def seconds(words):
    number, unit = words.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def assert_left(left, took, after=0):
    """After every group what is said to be left holds, until it is a few seconds, said in whole ones."""
    for i, words in enumerate(left):
        if i >= after and sum(took[i + 1 :]) > 3:
            assert 1 / WITHIN < words / sum(took[i + 1 :]) < WITHIN, (i, left, took)


def test_the_quick_sweep_takes_what_was_announced(run):
    _, announced, left, took = run(Machine(), quick(CUDA))
    assert len(took) == 9 and 1 / WITHIN < announced / sum(took) < WITHIN
    assert announced > 62 / WITHIN  # so long it had taken on an H100 when it was stopped
    assert_left(left, took)


@pytest.mark.parametrize(("model", "volume"), LARGE)
def test_large_volumes_take_what_was_announced(run, model, volume):
    cells = [cell for cell in quick(CUDA, [model], [volume], steps=["inference"])
             if cell.mode in LARGE[model, volume][FAST]]  # fmt: skip
    _, announced, _, took = run(Machine(), cells)
    assert len(took) == 1 and 1 / WITHIN < announced / sum(took) < WITHIN


@pytest.mark.parametrize("slower", [0.4, 2.5])
def test_what_is_left_is_corrected_by_what_was_done(run, slower):
    """A machine on which groups take other times than could be foreseen."""
    _, announced, left, took = run(Machine(slower), quick(CUDA))
    assert not 1 / WITHIN < announced / sum(took) < WITHIN
    assert_left(left, took, after=1)


def test_a_limit_is_kept(run):
    found, _, _, took = run(Machine(), quick(CUDA), limit=50)
    counted = sum([COUNTED[step] for step in ["inference"] * 16 + ["probe"] * 3 + ["finetune"] * 3])
    assert 0 < len(took) < 9 and counted + sum(took) <= 50
    assert {row["status"] for row in found} == {"measured", "left out: no time"}


def test_what_happens_once_belongs_to_the_first_group_that_runs():
    estimator = estimate.Estimator(CUDA, HOST, QUICK)
    group, *_ = groups(quick(CUDA, ["ViT-S"], ["1x64x64"], steps=["inference"]))
    assert estimator.once(group) == pytest.approx(4 * HOST.kernels + estimate.FIRST_PROFILE)
    assert estimator.once(group) == 0
    backward, *_ = groups(quick(CUDA, ["ViT-S"], ["1x64x64"], steps=["finetune"]))
    assert estimator.once(backward) == pytest.approx(4 * 2 * HOST.kernels)


def test_the_host_is_timed(monkeypatch):
    """The first pass of the first mode starts libraries; that of the second compiles kernels alone."""
    times = iter([9.0, 0.012, 0.008, 0.009, 1.009])
    monkeypatch.setattr(estimate, "_seconds", lambda *_: next(times))
    found = estimate.measured(torch.device("cpu"), torch.float32)
    assert found == pytest.approx((0.009 / estimate.PROBED, 1.0))
    monkeypatch.undo()
    found = estimate.measured(torch.device("cpu"), torch.float32)
    assert 0 < found.block < 1 and found.kernels >= 0


def test_without_a_model_the_host_is_that_of_the_first_run(monkeypatch):
    def missing(*_, **__):
        raise MissingPackageError("package 'timm' is not installed")

    monkeypatch.setattr(estimate, "vit", missing)
    assert estimate.measured(torch.device("cpu"), torch.float32) == estimate.UNKNOWN
    monkeypatch.setattr(estimate, "flops", missing)
    group, *_ = groups(quick(CUDA, ["ViT-S"], ["1x64x64"], steps=["inference"]))
    assert estimate.Estimator(CUDA, estimate.UNKNOWN, QUICK).seconds(group, 1e12) == 1.0


@pytest.mark.parametrize("name", ["ViT-S", "ViT-L"])
def test_blocks_are_those_of_the_models(name):
    assert len(contenders.vit(name, "meta", torch.float32).blocks) == estimate.BLOCKS[name]
