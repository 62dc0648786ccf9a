"""What a pass reads of a block is whole, whatever other threads do to the model meanwhile."""

import threading

import pytest
import torch
from torch import nn

import planecycle_fast as pcf
from planecycle_fast.engine import passes
from planecycle_fast.hosts import description

from ..host_models import BY_NAME


def nothing(*_):
    pass


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


CHANGES = {  # what another thread does to the first block
    "a hook on the lifted block": lambda m: m.blocks[0].register_forward_hook(nothing),
    "a hook on the host's block": lambda m: m.lifted_blocks[0].host.register_forward_hook(nothing),
    "a hook on its norm": lambda m: m.lifted_blocks[0].host.norm1.register_forward_hook(nothing),
    "another norm": lambda m: setattr(m.lifted_blocks[0].host, "norm1", nn.Sequential(m.lifted_blocks[0].host.norm1)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_block_runs(change, grad, monkeypatch):
    """After the block's plan has been made and it has run, perhaps with the last norm; before it returns."""
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume, todo = pcf.lift(host.make()), host.volume(), []
    run_block = passes.run_block

    def interleaved(*args):
        out = run_block(*args)
        while todo:
            in_a_thread(lambda: todo.pop()(lifted))
        return out

    with torch.set_grad_enabled(grad):
        expected = lifted(volume).patches
        monkeypatch.setattr(passes, "run_block", interleaved)
        todo.append(CHANGES[change])
        for _ in range(2):  # the pass that it falls into, and the next one
            torch.testing.assert_close(lifted(volume).patches, expected, rtol=0, atol=1e-5)
    assert not todo


@pytest.mark.parametrize("name", ["timm-dinov3-s", "hf-dinov2", "facebook-stand-in"])
def test_a_change_while_a_block_is_read(name, monkeypatch):
    host = BY_NAME[name]
    lifted, volume, done = pcf.lift(host.make()), host.volume(), []
    expected, describe = lifted(volume).patches, description.describe

    def interleaved(parts):
        found = describe(parts)
        if not done and parts.block is lifted.lifted_blocks[1].host:
            done.append(1)
            in_a_thread(lambda: parts.norm(1).register_forward_hook(nothing))
        return found

    lifted.lifted_blocks[1].host.mlp.register_forward_hook(nothing).remove()
    monkeypatch.setattr(description, "describe", interleaved)
    lifted.lifted_blocks[1].host.note = "read again"
    for _ in range(2):
        torch.testing.assert_close(lifted(volume).patches, expected, rtol=0, atol=1e-5)
    assert done and "norm1" in lifted.descriptions()[1].kept


def test_readings_are_exchanged_as_one():
    """A thread in the middle of reading a block does not disturb one that compares."""
    lifted = pcf.lift(BY_NAME["timm-dinov3-s"].make())
    reading, block = lifted.lifted_blocks[0].reading, lifted.lifted_blocks[0].host
    before, why_not, inner = reading.now(), reading.parts.why_not, []

    def interleaved():
        if not inner:
            inner.append(None)
            block.mlp.note = "changed while it is read"
            in_a_thread(lambda: inner.append(reading.now()))
        return why_not()

    reading.parts.why_not = interleaved
    block.note = "changed"
    now = reading.now()
    assert now is not before and inner[1] is not before and reading.now() is now


@torch.no_grad()
def test_threads_that_infer_while_hooks_come_and_go():
    host = BY_NAME["timm-dinov3-s"]
    lifted, volume = pcf.lift(host.make()), host.volume(batch=1, depth=2)
    expected, wrong, stop = lifted(volume).patches, [], threading.Event()

    def infer():
        try:
            for _ in range(25):
                torch.testing.assert_close(lifted(volume).patches, expected, rtol=0, atol=1e-5)
        except Exception as error:
            wrong.append(error)
        stop.set()

    threads = [threading.Thread(target=torch.no_grad()(infer)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not stop.is_set():
        for block in lifted.blocks:
            modules = block, block.host, block.host.norm2, block.host.mlp
            for handle in [module.register_forward_hook(nothing) for module in modules]:
                handle.remove()
            block.host.mlp.act = nn.GELU()
    for thread in threads:
        thread.join()
    assert not wrong
