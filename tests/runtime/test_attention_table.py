"""The table that chooses attention: something for everything, every row for something, and what may change it."""

import dataclasses
import functools
import itertools
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from planecycle_fast.ops import attention_ref
from planecycle_fast.ops.choice import Choice
from planecycle_fast.ops.multihead_attention.attention import TORCHS, attention_on
from planecycle_fast.runtime import attention_table, attention_times, attentions, backends, sizes_seen
from planecycle_fast.runtime.attention_table import TABLE, choose_attention
from planecycle_fast.runtime.attentions import ATTENTIONS, AttentionCall

CUDA = torch.device("cuda", 0)
NAMES = [name for name in ATTENTIONS if name not in ("auto", "reference")]
MAJORS, DTYPES = range(5, 13), (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS, ROWS = (4, 16, 20, 64, 72, 128, 192, 256, 264), (0, 1, 21, 64, 65, 133, 261, 320, 1029, 4101, None)


@pytest.fixture
def machine(monkeypatch):
    """An NVIDIA GPU that has everything; `without` takes something away."""
    found = types.SimpleNamespace(capability=(9, 0), cudnn=91900, missing=set())

    def loads(name):
        return "it is not installed" if name in found.missing else (None, attentions.MODULES[name][0])

    def lacks(backend, device=None, op=None):
        return "no triton" if "triton" in found.missing else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found.capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: found.cudnn)
    monkeypatch.setattr(attentions, "_load", loads)
    monkeypatch.setattr(attentions, "why_not", lacks)
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    found.on = dict.fromkeys(attentions.SWITCHES, True)
    for name, (_, turn) in attentions.SWITCHES.items():
        monkeypatch.setitem(attentions.SWITCHES, name, (functools.partial(found.on.get, name), turn))
    _forget()
    yield found
    _forget()


def _forget():
    attention_table._kept.clear()
    sizes_seen._seen.clear()


def call(rows=261, dtype=torch.bfloat16, head_dim=64, backward=False, sequences=100, heads=6, scale=None):
    return AttentionCall(dtype, sequences, rows, heads, head_dim, backward, scale)


def names(repeats=False, **settings):
    return choose_attention(CUDA, call(**settings), repeats).attention


@pytest.mark.parametrize("missing", [(), ("triton",), ("triton", "flash2", "flash3", "flash4")], ids=str)
def test_it_has_something_usable_for_everything(machine, missing):
    machine.missing = {*missing}
    cases = itertools.product(MAJORS, DTYPES, HEAD_DIMS, ROWS, (False, True), (False, True))
    for major, dtype, head_dim, rows, backward, repeats in cases:
        machine.capability = major, 0
        asked = call(rows, dtype, head_dim, backward)
        found, why = attention_table._choose(CUDA, asked, repeats, own=True)
        assert found in NAMES and why.startswith(("measured on an H100", "static: "))
        assert attentions.why_not_attention(found) is None and attentions.why_not_call(found, CUDA, asked) is None
        assert found != "cudnn" or repeats


def test_every_row_is_taken_by_something(machine):
    taken = set()
    for missing in [set(), {"triton"}, {"triton", "flash3", "flash4"}]:
        machine.missing = missing
        machine.on.update(dict.fromkeys(machine.on, True))
        for off in [(), ("flash", "cudnn")]:
            machine.on.update(dict.fromkeys(off, False))
            for major, dtype, head_dim, rows in itertools.product((7, 8, 9, 10), DTYPES[1:], HEAD_DIMS, ROWS):
                machine.capability = major, 0
                for backward, repeats in itertools.product((False, True), repeat=2):
                    taken.add(attention_table._choose(CUDA, call(rows, dtype, head_dim, backward), repeats, True))
    chosen = {(row.attention, row.why) for row in TABLE}
    assert {*map(tuple, taken)} == chosen


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("packages", [(), ("flash3",)], ids=str)
def test_it_is_what_was_measured(machine, packages, repeats):
    """At lengths that were measured nothing that it may take was much faster."""
    machine.missing = {"triton", *({"flash3"} - {*packages})}
    for times, backward in ((attention_times.FORWARD, False), (attention_times.TRAINING, True)):
        for (head_dim, heads, rows), found in times.items():
            usable = {name: found[name] for name in {*found} - machine.missing - ({"cudnn"} if not repeats else set())}
            name = names(repeats, rows=rows, head_dim=head_dim, backward=backward, heads=heads)
            assert found.get(name, 0) <= 1.12 * min(usable.values()), (rows, name, usable)


def test_what_h100s_take(machine):
    assert [names(rows=rows) for rows in (21, 64, 65, 261, 320, 321, 1029, 2048)] == ["triton"] * 8
    assert names(rows=4101) == "flash3"
    assert names(rows=21, backward=True) == "triton" and names(True, rows=69, backward=True) == "cudnn"
    machine.missing = {"triton", "flash3"}
    _forget()
    assert [names(rows=rows) for rows in (21, 69, 1029)] == ["efficient", "flash", "flash"]
    assert [names(True, rows=rows) for rows in (21, 69, 1029)] == ["efficient", "cudnn", "cudnn"]
    assert names(rows=261, dtype=torch.float32) == "efficient" and names(dtype=torch.float64) == "sdpa"
    assert names(head_dim=20) == "sdpa"  # torch's own pads it


def test_sizes_that_are_not_known_take_what_needs_none(machine):
    for rows in (None, 21):
        for missing in (set(), {"triton", "flash3"}):
            machine.missing = missing
            _forget()
            found = names(rows=rows, sequences=None)
            assert found == ("flash" if rows is None else "efficient" if missing else "triton")
    assert names(rows=None, head_dim=20) == "sdpa"


def test_another_backend_keeps_kernels_of_ours_away(machine):
    assert choose_attention(CUDA, call(), False, own=False).attention == "flash3"


def test_torchs_switches_hold(machine):
    machine.missing = {"triton", "flash3"}
    assert names(True) == "cudnn" and names() == "flash"
    machine.on["cudnn"] = False
    assert names(True) == "flash"
    machine.on["flash"] = False
    assert names(True) == "efficient"
    machine.on["efficient"] = False
    assert names(True) == "sdpa"
    reason = attentions.why_not_attention("flash")
    assert reason == "torch.backends.cuda.enable_flash_sdp(False) turned it off"
    with pytest.raises(ValueError, match=r"attention 'cudnn' is not usable: .*enable_cudnn_sdp\(False\) turned it off"):
        attentions.check_attention("cudnn")


def test_when_cudnn_is_left_alone(machine, monkeypatch):
    machine.missing = {"triton", "flash3"}
    assert names(True, backward=True) == "cudnn" and names(False, backward=True) == "flash"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert names(True, backward=True) == "flash" and names(True) == "cudnn"
    _forget()
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert names(True) == "flash"
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED")
    _forget()
    machine.cudnn = 91400
    assert names(True) == "flash"
    assert attentions.why_not_attention("cudnn") == "it needs cuDNN 9.15 or newer, got 9.14.0"
    machine.cudnn, machine.capability = 91900, (8, 0)
    assert attentions.why_not_call("cudnn", CUDA, call()) == "it does not run on compute capability 8.x"


REASONS = [
    ("triton", {"dtype": torch.float64}, "it needs float32 or float16 or bfloat16, got float64"),
    ("triton", {"head_dim": 136}, "it needs a head dimension that is a multiple of 8 and at most 128, got 136"),
    ("triton", {"head_dim": 20}, "it needs a head dimension that is a multiple of 8 and at most 128, got 20"),
    ("triton", {"scale": -0.5}, "it needs a scale that is positive and finite, got -0.5"),
    ("flash", {"dtype": torch.float32}, "it needs float16 or bfloat16, got float32"),
    ("flash", {"sequences": 2**16}, "it takes at most 65535 sequences, got 65536"),
    ("flash", {"sequences": 2**15, "rows": 1029, "backward": True}, "its backward counts in 32 bits, too few for "),
    ("efficient", {"dtype": torch.float32, "head_dim": 6}, "multiple of 4, got 6"),
    ("cudnn", {"rows": 1}, "it needs at least two rows"),
]


@pytest.mark.parametrize("name, settings, message", REASONS, ids=str)
def test_what_attentions_do_not_take(machine, name, settings, message):
    assert message in attentions.why_not_call(name, CUDA, call(**settings))
    assert names(True, **settings) != name


def test_triton_by_name_needs_the_backend():
    with pytest.raises(ValueError, match=f"'triton' is not usable: {backends.why_not('triton', op='self_attention')}"):
        attentions.check_attention("triton")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [name for name in TORCHS if name != "sdpa"])
def test_torchs_kernels_are_called_with_views_and_give_what_the_projection_takes(name, grad):
    """Without data: shapes and strides, forward and backward, of each operation of this version of torch."""
    packed = torch.empty(3, 21, 6, 64, dtype=torch.bfloat16, device="meta", requires_grad=grad)
    called = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append((str(func), [tuple(t.stride()) for t in args if isinstance(t, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    with Seen():
        out = attention_on(name, *packed.split(2, 2), 0.1)
    assert out.shape == (3, 21, 2, 64) and out.is_contiguous() and out.requires_grad == grad
    [strides] = [strides for op, strides in called if f"scaled_dot_product_{name}_attention" in op]
    assert strides == [(21 * 6 * 64, 64, 6 * 64, 1)] * 3  # nothing was copied
    if grad:
        (gradient,) = torch.autograd.grad(out.sum(), packed)
        assert gradient.shape == packed.shape


class OnGpu(torch.Tensor):
    device = CUDA


def test_a_pass_takes_the_table_and_others_torchs_own(machine, monkeypatch):
    machine.missing = {"triton", "flash3"}
    monkeypatch.setattr(backends, "_found", {"triton": None})
    choice = Choice.of("auto", "auto", True, CUDA)
    assert (choice.attention, choice.repeats) == ("auto", False)
    assert choice.attention_for(call(), plain=True).attention == "flash"
    assert choice.attention_for(call(), plain=False).attention == "sdpa"
    assert choice.attention_for(call(dtype=torch.float32), plain=True).attention == "efficient"
    under = dataclasses.replace(choice, autocast=torch.bfloat16)
    assert under.attention_for(call(), plain=True).attention == "flash"
    assert under.attention_for(call(dtype=torch.float32), plain=True).attention == "sdpa"  # which casts
    assert Choice.of("auto", "efficient", True, CUDA).attention_for(call(), True).attention == "efficient"
    with torch.autograd.forward_ad.dual_level():
        assert Choice.of("auto", "auto", True, CUDA).attention == "reference"
    assert Choice.of("auto", "auto", True, torch.device("cpu")).attention == "sdpa"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert Choice.of("reference", "auto", True, CUDA).attention == "sdpa"


def test_sizes_repeat_from_their_second_pass_on(machine, monkeypatch):
    monkeypatch.setattr(backends, "_found", {"triton": None})
    sizes = torch.Size((1, 3, 4, 64, 64))
    found = [Choice.of("auto", "auto", True, CUDA, sizes=sizes).repeats for _ in range(3)]
    assert found == [False, True, True]
    assert not Choice.of("auto", "auto", True, CUDA, sizes=(2, *sizes[1:])).repeats
    assert not Choice.of("auto", "flash", True, CUDA, sizes=sizes).repeats  # a name needs no table
    with torch.no_grad():
        choice = Choice.of("auto", "auto", True, CUDA, sizes=sizes)
    assert choice.here(torch.zeros(1, 2).as_subclass(OnGpu)).repeats  # the mode may change, this does not


def test_of_many_sizes_none_is_kept(machine):
    for n in range(2 * sizes_seen.MOST):
        assert not sizes_seen.seen_before((1, n))
    assert len(sizes_seen._seen) == sizes_seen.MOST
    assert not sizes_seen.seen_before((1, 2 * sizes_seen.MOST - 1)) and sizes_seen.seen_before((1, 0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_takes_the_same(machine, reentrant):
    """Around a whole model: the pass begins again in backward, when its sizes have been seen."""
    x, found = torch.ones(2, requires_grad=True), []

    def model(x):
        found.append(sizes_seen.seen_before((1, 3)))
        return x.sin()

    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    if reentrant:  # the first time without gradients, the second with: two kinds of a pass
        assert found[1::2] == [False, False]
    else:
        assert found == [False] * 4


def test_around_a_block_it_is_that_of_the_pass(machine, monkeypatch):
    machine.missing = {"triton", "flash3"}
    monkeypatch.setattr(backends, "_found", {"triton": None})
    found, x = [], torch.ones(2, requires_grad=True)
    choices = [Choice.of("auto", "auto", True, CUDA, sizes=(1, 3)) for _ in range(2)]

    def block(x, choice):
        here = choice.here(x.as_subclass(OnGpu))
        found.append(here.attention_for(call(backward=True), plain=True).attention)
        return x.sin()

    outputs = [checkpoint(block, x, choice, use_reentrant=False) for choice in choices]
    for out in reversed(outputs):
        out.sum().backward()
    assert found == ["flash", "cudnn", "cudnn", "flash"]


@pytest.fixture
def compiling(machine, monkeypatch):
    """The same for torch.compile, which asks torch for a GPU of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention_table, "why_not_attention", lambda name: "gone" if name in machine.missing else None)
    torch._dynamo.reset()
    yield machine
    torch._dynamo.reset()


def test_compiled_models_read_no_state(compiling, monkeypatch):
    """What is compiled asks for no sizes that have been seen, keeps nothing, and calls no package."""
    seen = []
    monkeypatch.setattr(sizes_seen, "_seen", {(1, 3): None})

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        chosen = choose_attention(CUDA, AttentionCall(x.dtype, *x.shape[:2], 6, 64, False), True)
        if sizes_seen.seen_before((1, 3)):
            return x + 2
        seen.append(chosen.attention)
        return x + 1

    x = torch.zeros(5, 4101, dtype=torch.bfloat16)
    assert compiled(x)[0, 0] == 1 and set(seen) == {"flash"} and not attention_table._kept


def test_symbols_stay_symbols_when_compiled(compiling):
    compiling.missing = {"triton"}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(q):
        asked = AttentionCall.of(q, q, q)
        found = choose_attention(CUDA, asked, False).attention
        return q + (1 if found == "flash" else 2)

    for rows in (21, 133, 1029):
        q = torch.zeros(3, rows, 2, 64, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(q, 1)
        assert compiled(q)[0, 0, 0, 0] == 1
    assert len(graphs) == 1
    torch._dynamo.reset()
    q = torch.zeros(3, 21, 2, 64, dtype=torch.bfloat16)
    assert compiled(q)[0, 0, 0, 0] == 2  # known: efficient


def test_attention_by_the_table_is_attention(monkeypatch):
    """On a machine without a GPU: what `attention` asks the table for, and that it does as it is told."""
    from planecycle_fast.ops.multihead_attention import attention as module

    asked = []

    def choose(device, of, repeats, own):
        asked.append((of, repeats, own))
        return attention_table.ChosenAttention("sdpa", "")

    monkeypatch.setattr(module, "resolve_attention", lambda *_: "auto")
    monkeypatch.setattr(module, "choose_attention", choose)
    q, k, v = torch.randn(3, 7, 3, 2, 16).unbind(2)
    torch.testing.assert_close(module.attention(q, k, v), attention_ref(q, k, v))
    assert asked == [(AttentionCall(torch.float32, 3, 7, 2, 16, False), False, False)]


def test_the_report_says_what_is_chosen_for_which_rows(machine, monkeypatch, capsys):
    """Of a model on the CPU, as if its tensors were on a GPU."""
    from planecycle_fast import lifted as lifting

    from ..host_models import BY_NAME

    monkeypatch.setattr(backends, "_found", {"triton": None})
    model = lifting.lift(BY_NAME["timm-dinov3-s"].make().bfloat16())
    monkeypatch.setattr(lifting, "running_place", lambda _: (CUDA, torch.bfloat16))
    model.report()
    table, lines = capsys.readouterr().out.split("attention, bfloat16, head dimension ")
    assert "attention: auto" in table
    rows = [line.split(": ")[1] for line in lines.splitlines() if line.startswith("  rows: ")]
    assert rows[0].startswith("up to ") and rows[-1].endswith(" and more") and len(rows) <= 8
    assert "triton (measured on an H100" in lines and lines.endswith("docs/attention-table.md)\n")
    assert max(map(len, lines.splitlines())) < 260
    machine.missing = {"triton", "flash3"}
    _forget()
    size = BY_NAME["timm-dinov3-s"].patch
    model.report((2, 3, 9, 10 * size, 11 * size))
    found = capsys.readouterr().out.splitlines()[-4:-1]
    assert [line.split(":")[0] for line in found] == ["  HW, 115 rows", "  DW, 104 rows", "  DH, 95 rows"]
    assert all("flash (measured" in line and "once sizes repeat cudnn (measured" in line for line in found)
    model.train().report()
    assert ", training:" in capsys.readouterr().out
    for given, told in (((3, 9, 10), r"\(3, 9, 10\)"), (5, "int"), ((2, 1, 9, 160, 160), r"\(2, 1, 9, 160, 160\)")):
        with pytest.raises(ValueError, match=rf"volume_shape must be five sizes \(B, 3, .* got {told}"):
            model.report(given)
