"""A stand-in for CUDA graphs on a CPU: it records calls, and a replay makes them again on the same memory.

What it shows is everything but capture itself. It differs from CUDA in that recording runs what it records, and that
the "device's" random numbers are the CPU's.
"""

import weakref
from contextlib import contextmanager, nullcontext

import torch

from planecycle_fast.engine import cuda_recorder


class FakeRecorder:
    def __init__(self):
        self.memory, self.recorded, self.given_back, self.waits = 2**30, [], 0, []
        self.capturing, self.now, self.error = False, "main", None

    def takes(self, device):
        return device.type == "cpu"

    def why_not(self, device):
        if not self.takes(device):
            return f"graphs need a CPU here, the volume is on {device}"
        return "another graph is being captured" if self.capturing else None

    def total_memory(self, device):
        return self.memory

    def on(self, device):
        return nullcontext()

    def stream(self, device):
        return self.now

    def wait_for(self, stream, device):
        self.waits.append((self.now, stream))

    def give_back(self):
        self.given_back += 1

    @contextmanager
    def same_draws(self, device):
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)

    def draws_alone(self):
        return False

    def settings(self):
        return (torch.are_deterministic_algorithms_enabled(),)

    def aside(self, device):
        return nullcontext()

    def no_waiting(self):
        return nullcontext()

    def record(self, forward, backward, device):
        if self.error is not None:
            raise self.error
        self.recorded.append(FakeRecorded(forward, backward, self))
        return self.recorded[-1]


class FakeRecorded:
    def __init__(self, forward, backward, recorder):
        # Not held: a graph on a GPU holds no Python either.
        self._passes = [each and weakref.WeakMethod(each) for each in (forward, backward)]
        self._autocast = _autocast_now()
        self._with_gradients = torch.is_grad_enabled()
        made = forward()
        self.gradients = [t.detach() for t in backward(made)] if backward else []
        self.outputs = [t.detach().clone() for t in made]
        self.nbytes = sum(t.nbytes for t in (*self.outputs, *self.gradients))
        self.addresses = [t.data_ptr() for t in (*self.outputs, *self.gradients)]

    def forward(self):
        self._state = torch.get_rng_state()
        try:
            self._made = self._run()
        except Exception:  # of a model that has been changed: a graph launches what it recorded, whatever that is now
            return
        for place, t in zip(self.outputs, self._made):
            place.copy_(t.detach())

    def _run(self):
        with torch.inference_mode(False), torch.set_grad_enabled(self._with_gradients), self._autocast():
            return self._passes[0]()()

    def backward(self):
        if self._made is None:  # for the second time: what forward has left on the device is there still
            after = torch.get_rng_state()
            torch.set_rng_state(self._state)
            self._made = self._run()
            torch.set_rng_state(after)
        with torch.enable_grad():
            made, self._made = self._passes[1]()(self._made), None
        for place, t in zip(self.gradients, made):
            place.copy_(t)


def _autocast_now():
    on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return lambda: torch.autocast("cpu", dtype, enabled=on, cache_enabled=False)


def use_standin(monkeypatch):
    recorder = FakeRecorder()
    monkeypatch.setattr(cuda_recorder, "RECORDER", recorder)
    return recorder
