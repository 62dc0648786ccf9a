"""Inference on backend "cpu": which blocks run in one call, in groups of how many sequences, in how much memory."""

import re
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import planecycle_fast as pcf
from planecycle_fast.bench.costs import peak_bytes
from planecycle_fast.engine import block as stream
from planecycle_fast.engine import cpu_groups as groups
from planecycle_fast.runtime import native

from ..host_models import BY_NAME

if not native.ready():
    pytest.skip(f"backend 'cpu' is not usable: {native.why_not_native()}", allow_module_level=True)

from planecycle_fast.ops import blocks_cpu


@pytest.fixture
def calls(monkeypatch):
    """Of each call of the operation, how many blocks it ran."""
    made = []

    def counted(x, normed, tensors, *rest):
        found = blocks_cpu.blocks_in_place(x, normed, tensors, *rest)
        assert x.numel() == normed.numel() == 0  # taken
        made.append(len(tensors))
        return found

    monkeypatch.setattr(groups, "_loaded", [counted])
    return made


@pytest.mark.parametrize("size", [1, 2**30], ids=["one sequence at a time", "all at once"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "settings",
    [{}, {"pool_method": "PCm"}, {"globals_at": "plane"}, {"mode": "slice2d"}, {"cycle_order": ("DW", "DW", "HW")}],
    ids=str,
)
@pytest.mark.parametrize("name", ["timm-dinov3-s", "timm-dinov2-g", "timm-dinov3-no-globals", "hf-dinov3-gated"])
def test_blocks_in_one_call_are_those_one_by_one(monkeypatch, calls, name, settings, context, size):
    """To the bit, and without more memory."""
    host = BY_NAME[name]
    monkeypatch.setattr(groups, "GROUP_BYTES", size)
    lifted, volume = pcf.lift(host.make(), backend="cpu", **settings), host.volume(batch=2, depth=3, grid=(4, 5))
    made, peaks, count = [], [], len(lifted.blocks)
    with context():
        for most in (0, groups.CALL):
            monkeypatch.setattr(groups, "CALL", most)
            made.append(lifted(volume))
            peaks.append(peak_bytes(lifted, volume))
    assert calls == [1] * 2 * count + [count] * 2 and count > 2
    assert all(a is b or torch.equal(a, b) for a, b in zip(*made))
    assert peaks[1] <= peaks[0]


@torch.no_grad()
def test_a_stream_that_was_read_is_free(monkeypatch, calls):
    """Its memory is there for what the block makes."""
    host, came, alive, [operation] = BY_NAME["timm-dinov3-s"], [], [], groups._loaded

    def watching(block, held, layer, following):
        came[:] = [weakref.ref(t) for t in held[0][:2] if t is not None]
        return groups.run_in_groups(block, held, layer, following)

    def watched(*arguments):
        alive.append([t() is not None for t in came])
        return operation(*arguments)

    monkeypatch.setattr(stream, "run_in_groups", watching)
    monkeypatch.setattr(groups, "_loaded", [watched])
    monkeypatch.setattr(groups, "CALL", 0)
    lifted = pcf.lift(host.make(), backend="cpu")
    lifted(host.volume())
    count = len(lifted.blocks)
    assert alive == [[True]] + [[False, False]] * (count - 1) and calls == [1] * count  # the first is the residual


@torch.no_grad()
def test_which_blocks_run_in_one_call(calls):
    """All that come one after another and are alike, unless somebody sees what is between them."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), backend="cpu", strict=False), host.volume()
    count, reference = len(lifted.blocks), pcf.lift(lifted.host, backend="reference")

    def ran(*layers):
        calls.clear()
        found = lifted.intermediate(volume, layers or [count - 1])
        for a, b in zip(found, reference.intermediate(volume, layers or [count - 1])):
            torch.testing.assert_close(a.patches, b.patches)
        return calls

    assert ran() == [count]
    assert ran(0, 2) == [1, 2]
    assert ran(*range(count)) == [1] * count
    seen = []
    handle = lifted.blocks[2].register_forward_hook(lambda m, args, out: seen.append((args[0].tokens(), out.tokens())))
    assert ran() == [2, 1, count - 3] and len(seen) == 1
    handle.remove()
    handle = lifted.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    assert ran() == [1, count - 2]  # the one between them as a whole
    handle.remove()
    lifted.blocks[1].attn.proj.bias = None
    lifted.blocks[2].mlp = nn.Sequential(lifted.blocks[2].mlp)
    assert ran() == [2, count - 3]
    lifted.blocks[3].norm2.eps *= 2
    assert ran() == [2, 1, count - 4]


@pytest.mark.parametrize("name", ["timm-dinov3-s", "timm-dinov3-no-globals"])
@torch.no_grad()
def test_what_hooks_keep_stays_what_it_was(name):
    """Of the first block too, whose stream nobody else has seen before; what comes out of hooks is checked."""
    host, kept = BY_NAME[name], []
    lifted = pcf.lift(host.make(), backend="cpu", cycle_order=("HW",))

    def keep(module, args):
        assert type(args[0]) is pcf.Stream
        kept.extend([(t, t.clone()) for t in args[0] if t is not None])

    for block in lifted.blocks:
        block.register_forward_pre_hook(keep)
    lifted(host.volume())
    assert len(kept) == len(lifted.blocks)  # one tensor each
    assert all(torch.equal(t, before) for t, before in kept)
    lifted.blocks[0].register_forward_hook(lambda m, args, out: out._replace(residual=out.residual[:, 1:]))
    with pytest.raises(ValueError, match="must have"):
        lifted(host.volume())


@torch.no_grad()
def test_a_call_is_short(monkeypatch, calls):
    """Signals have to wait for its end."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), backend="cpu", mode="slice2d"), host.volume()
    rows = volume.shape[2] * (lifted.adapter.num_globals + lifted(volume).patches[0, 0].shape[:2].numel())
    for at_once in (1, 2, 3):
        monkeypatch.setattr(groups, "CALL", at_once * 12 * volume.shape[0] * rows * lifted.embed_dim**2)
        calls.clear()
        lifted(volume)
        assert calls[0] == at_once and sum(calls) == len(lifted.blocks) and max(calls) == at_once


@torch.no_grad()
def test_groups_of_equal_size(monkeypatch):
    class Groups(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "planecycle_fast_cpu::add_norm_":
                sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make(), backend="cpu", mode="slice2d"), host.volume(batch=2, depth=5, grid=(2, 3))
    hidden, rows, sizes = lifted.blocks[0].mlp.fc1.out_features, lifted.adapter.num_globals + 6, []
    expected = {1: [1] * 10, 3: [3, 3, 3, 1], 4: [4, 4, 2], 6: [5, 5], 9: [5, 5], 100: [10]}
    for at_once, of_one in expected.items():
        monkeypatch.setattr(groups, "GROUP_BYTES", at_once * rows * hidden * volume.element_size())
        sizes.clear()
        with Groups():
            lifted(volume)
        assert sizes == of_one * len(lifted.blocks)


def test_it_brings_along_the_operations_that_it_is_made_of():
    """Each has a fake of its own, without which a plan, or whatever runs first in a process, would raise."""
    made_of = set(re.findall(r'"planecycle_fast_cpu::(\w+)"', (native.csrc() / "blocks.cpp").read_text()))
    assert {"rope_", "add_norm", "add_norm_", "swiglu", "swiglu_"} <= made_of
    code = "from planecycle_fast.ops import blocks_cpu, native_ops; print(*native_ops.OPS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made_of <= {*done.stdout.split()}
