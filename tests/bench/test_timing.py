"""The timing helper of the benchmark suite: synchronised, in turns, on inputs that change. Nothing here is timed."""

import pytest
import torch

from planecycle_fast.bench import timing
from planecycle_fast.bench.timing import by_turns, compare, interleaved, summary

INPUTS = [(torch.full((2,), float(i)),) for i in range(3)]


def test_contenders_take_turns_and_inputs_rotate():
    seen = []
    contenders = {name: lambda x, name=name: seen.append((name, int(x[0]))) for name in "ab"}
    times = interleaved(contenders, INPUTS, device="cpu", rounds=4, warmups=1)
    assert seen == [(name, i % 3) for i in range(5) for name in "ab"]
    assert [times[name].rounds for name in "ab"] == [4, 4]


def test_every_call_is_between_two_synchronisations(monkeypatch):
    events = []
    monkeypatch.setattr(timing, "synchronise", lambda device: events.append("wait"))
    monkeypatch.setattr(timing, "perf_counter", lambda: events.append("clock") or 0.0)
    interleaved({"a": lambda x: events.append("call")}, INPUTS, device="cpu", rounds=2, warmups=1)
    one = ["wait", "clock", "call", "wait", "clock"]
    assert events == [*one, "clock", *one, *one]  # a warm-up, the beginning of all rounds, two rounds


def test_times_are_of_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    lasts = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first is a warm-up

    def run(x):
        now[0] += next(lasts)

    assert interleaved({"a": run}, INPUTS, device="cpu", rounds=5, warmups=1)["a"] == pytest.approx((3, 1.8, 4.2, 5))


def test_seconds_end_the_rounds_but_three_are_made(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def run(x):
        now[0] += 10.0

    assert interleaved({"a": run}, INPUTS, device="cpu", rounds=9, seconds=1)["a"].rounds == 3
    assert interleaved({"a": run}, INPUTS, device="cpu", rounds=9, seconds=45)["a"].rounds == 5
    assert len(by_turns({"a": run}, INPUTS, device="cpu", rounds=9, seconds=1, least=6)["a"]) == 6


def test_what_raises_leaves_the_turns_to_the_others_or_is_raised():
    def fails(x):
        if len(seen) > 2:
            raise ValueError("no more")

    seen, errors = [], {}
    contenders = {"bad": fails, "fine": seen.append}
    found = by_turns(contenders, INPUTS, device="cpu", rounds=5, warmups=1, raised=errors.__setitem__)
    assert list(found) == ["fine"] and len(found["fine"]) == 5 and str(errors["bad"]) == "no more"
    with pytest.raises(ValueError, match="no more"):
        by_turns(contenders, INPUTS, device="cpu", rounds=5)


def test_synchronise_waits_for_cuda_whatever_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    timing.synchronise("cpu")
    timing.synchronise("cuda:1")
    assert waited == [None, torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (({}, INPUTS), ValueError, "contenders"),
        (({"a": 3}, INPUTS), TypeError, "callable, got int for 'a'"),
        (({"a": print}, []), ValueError, "inputs"),
        (({"a": print}, [torch.zeros(1)]), TypeError, "tuples of arguments, got Tensor"),
        (({"a": print}, [(torch.zeros(1, device="meta"),)]), ValueError, "cpu, got a tensor on meta"),
        (({"a": print}, [({"x": [torch.zeros(1, device="meta")]},)]), ValueError, "on meta"),
    ],
)
def test_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        interleaved(*arguments, device="cpu")


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        interleaved({"a": print}, INPUTS, device="cpu", rounds=0)


def test_compare_takes_what_agrees_and_says_why_not():
    expected = (torch.tensor([1.0, -4.0]), {"b": torch.ones(2)})
    found = compare(
        {
            "same": expected,
            "near": (torch.tensor([1.02, -4.0], dtype=torch.float64), {"b": torch.ones(2)}),
            "far": (torch.tensor([1.0, -4.0]), {"b": torch.tensor([1.0, 1.5])}),
            "nan": (torch.tensor([1.0, float("nan")]), {"b": torch.ones(2)}),
            "shape": (torch.ones(3), {"b": torch.ones(2)}),
            "fewer": torch.tensor([1.0, -4.0]),
        },
        expected,
        0.01,
    )
    assert [name for name, agreement in found.items() if agreement.reason is None] == ["same", "near"]
    assert found["near"].error == pytest.approx(0.005, rel=1e-3)
    assert found["far"].error == pytest.approx(0.5) and "5.0e-01 of the largest value" in found["far"].reason
    assert found["nan"].error == found["shape"].error == float("inf")
    assert "shapes [(3,), (2,)], expected [(2,), (2,)]" in found["shape"].reason


def test_summary():
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0, 6))


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(timing, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(timing, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(timing, "interleaved", lambda found, *_, **__: dict.fromkeys(found, summary([0.5])))
    assert timing.ceiling_flops("cpu", torch.float32) == 2 * 64**3 / 0.5
    assert timing.ceiling_bandwidth("cpu") == 2 * 4096 / 0.5
